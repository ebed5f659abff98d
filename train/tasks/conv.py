"""Conversing: short chats in which the assistant takes up what the user said and keeps the talk going.

A chat runs through a few subjects; each exchange has wordings of its own for both sides, filled with the same words, so
a good reply has to carry the user's words over.
"""

from __future__ import annotations

import dataclasses

from train.tasks import words
from train.tasks.draw import Draw, split_of
from train.tasks.example import Example, Split


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Wordings of a user's turn and of the three parts of a reply, each drawn on its own. `{x}` is the topic."""

    things: tuple[str, ...]
    user: tuple[str, ...]
    begin: tuple[str, ...]
    middle: tuple[str, ...]
    end: tuple[str, ...]


_GREETINGS = (
    Exchange(
        (),
        (
            "Hello!",
            "Hi!",
            "Hi there!",
            "Good morning!",
            "Hey!",
            "Hello, how are you?",
            "Hi, how are you today?",
            "Hey, how is it going?",
        ),
        ("Hello!", "Hi there!", "Hi, nice to meet you!", "Hello and welcome!"),
        ("I am doing well, thank you.", "I am fine and ready to chat.", "It is a good day to talk."),
        ("How are you today?", "What would you like to talk about?", "What is on your mind?", "How was your day?"),
    ),
    Exchange(
        words.FIRST_NAMES,
        (
            "Hello, my name is {x}.",
            "Hi, I am {x}.",
            "Hey there, {x} here.",
            "Good evening, I am {x}.",
            "Hi! You can call me {x}.",
        ),
        ("Hello {x}!", "Hi {x}, nice to meet you!", "Welcome, {x}!", "Good to see you, {x}!"),
        ("I am a small assistant that likes to chat.", "I am happy to talk with you.", "I hope you are well."),
        ("What would you like to talk about?", "How is your day going?", "What do you like to do?"),
    ),
)
_SUBJECTS = (
    Exchange(
        words.HOBBIES,
        (
            "I like {x}.",
            "My hobby is {x}.",
            "I spent the weekend on {x}.",
            "I just started with {x}.",
            "In my free time I enjoy {x}.",
            "I really love {x}.",
        ),
        ("That is great!", "How nice!", "Oh, {x} is a lovely hobby.", "{x} sounds like fun."),
        (
            "Many people find {x} relaxing.",
            "I have heard that {x} takes patience.",
            "With {x} you always learn something new.",
        ),
        (
            "How did you get started with {x}?",
            "How often do you find time for it?",
            "What do you enjoy most about {x}?",
            "Do you do it alone or with friends?",
        ),
    ),
    Exchange(
        words.FOODS,
        (
            "I am having {x} for dinner.",
            "I want to cook {x}.",
            "I could eat {x} every day.",
            "What goes well with {x}?",
            "I bought {x} today.",
        ),
        ("Yum!", "That sounds tasty.", "Good choice!", "Oh, {x} is always a treat."),
        (
            "You could serve {x} with fresh bread.",
            "I would add a little salt and lemon to {x}.",
            "{x} and a green salad go well together.",
        ),
        (
            "Who will eat with you?",
            "Do you like to cook?",
            "Will you make a dessert too?",
            "Where do you buy your {x}?",
        ),
    ),
    Exchange(
        words.CITIES,
        (
            "I am going to {x} next week.",
            "Have you been to {x}?",
            "I want to travel to {x}.",
            "I just came back from {x}.",
            "Tell me about {x}.",
            "I live in {x}.",
        ),
        ("{x} is a wonderful place!", "How exciting!", "I would love to see {x}.", "Ah, {x}!"),
        (
            "I hear the old town of {x} is worth a walk.",
            "The food in {x} is said to be very good.",
            "There are many museums in {x}.",
        ),
        (
            "What do you want to see there?",
            "How long will you stay?",
            "Do you have friends in {x}?",
            "What do you like best about {x}?",
        ),
    ),
    Exchange(
        words.ANIMALS,
        (
            "I have a {x}.",
            "My {x} is sick.",
            "We just got a {x}.",
            "Should I get a {x}?",
            "My friend has a funny {x}.",
            "I miss my old {x}.",
        ),
        ("Oh, a {x}!", "A {x} is a good companion.", "How sweet!", "I like animals."),
        ("A {x} needs time and care.", "Please take good care of your {x}.", "A vet can tell you what a {x} needs."),
        ("What is its name?", "How old is it?", "What does a {x} eat?", "Does it get along with other animals?"),
    ),
    Exchange(
        words.SPORTS,
        (
            "I watched {x} yesterday.",
            "I play {x}.",
            "I want to learn {x}.",
            "Do you like {x}?",
            "My brother is good at {x}.",
            "I am too old for {x}.",
        ),
        ("{x} is exciting!", "Nice!", "I enjoy hearing about {x}.", "Sport keeps us healthy."),
        (
            "To get better at {x} you need to train often.",
            "Good shoes help a lot in {x}.",
            "It is never too late to start {x}.",
        ),
        ("Do you have a favourite team?", "How often do you train?", "Who do you play with?", "Did you win?"),
    ),
    Exchange(
        words.SUBJECTS,
        (
            "I am studying {x}.",
            "I have an exam in {x}.",
            "I do not understand {x}.",
            "My teacher of {x} is strict.",
            "Can you help me with {x}?",
        ),
        ("{x} can be hard.", "I see.", "{x} is an interesting subject.", "Good that you ask."),
        (
            "Try to study {x} a little every day.",
            "It helps to explain {x} to a friend.",
            "Start with the basics of {x} and take breaks.",
        ),
        ("When is your exam?", "What part of {x} is hard for you?", "Do you study alone?", "Why did you choose {x}?"),
    ),
    Exchange(
        words.PROFESSIONS,
        (
            "I work as a {x}.",
            "I want to become a {x}.",
            "My mother is a {x}.",
            "I met a {x} today.",
            "Is it hard to be a {x}?",
        ),
        ("A {x}, how interesting!", "That is a good job.", "I admire every {x}.", "Oh, I see."),
        ("A {x} needs to work with care.", "I think a {x} meets many people.", "The work of a {x} is never boring."),
        (
            "What do you like about it?",
            "What does a {x} do all day?",
            "How long does the training take?",
            "Would you do it again?",
        ),
    ),
    Exchange(
        words.INSTRUMENTS,
        (
            "I play the {x}.",
            "I bought a {x}.",
            "My neighbour plays the {x} all night.",
            "I am learning the {x}.",
            "I love the sound of the {x}.",
        ),
        ("The {x} has a beautiful sound.", "Music is wonderful.", "How lovely!", "Ah, the {x}!"),
        (
            "Practise the {x} a little every day.",
            "It takes years to master the {x}.",
            "A good teacher helps a lot with the {x}.",
        ),
        (
            "What songs do you like?",
            "How long have you played it?",
            "Do you play in a band?",
            "Do you know other people who play the {x}?",
        ),
    ),
    Exchange(
        words.TOPICS,
        (
            "Let us talk about {x}.",
            "I read a lot about {x}.",
            "What do you think about {x}?",
            "Tell me something about {x}.",
            "I am bored, let us chat about {x}.",
        ),
        ("Sure, {x} is a good topic.", "I like to talk about {x}.", "Gladly!", "With pleasure."),
        (
            "There is always something new to learn about {x}.",
            "Many people spend their whole life on {x}.",
            "I know only a little about {x}.",
        ),
        (
            "What interests you most about {x}?",
            "How did you come to like {x}?",
            "What should I know about {x}?",
            "Where do you read about it?",
        ),
    ),
    Exchange(
        ("tired", "sad", "lonely", "nervous", "stressed", "angry", "worried", "bored", "sick", "homesick"),
        (
            "I am {x} today.",
            "I feel so {x}.",
            "Lately I am often {x}.",
            "My friend is {x}.",
            "Why am I always {x}?",
            "Work makes me {x}.",
        ),
        ("I am sorry to hear that.", "Oh no.", "I understand.", "Being {x} is no fun."),
        (
            "A walk outside can help when you are {x}.",
            "Talking to a friend may help.",
            "Try to rest and drink some tea.",
        ),
        (
            "Do you want to tell me more?",
            "What happened?",
            "Since when are you {x}?",
            "What would make you feel better?",
        ),
    ),
    Exchange(
        ("happy", "excited", "proud", "relaxed", "cheerful", "hopeful", "thankful", "glad"),
        ("I am {x} today.", "I feel so {x}.", "My family is {x}.", "I woke up {x}.", "The news made me {x}."),
        ("That is wonderful!", "I am glad to hear that!", "Great!", "How nice to be {x}!"),
        ("Enjoy the moment.", "Good days should be shared with friends.", "It is good to feel {x}."),
        ("What made you so {x}?", "Do you have plans for today?", "Who will you celebrate with?"),
    ),
    Exchange(
        ("rainy", "sunny", "cold", "windy", "cloudy", "warm", "foggy", "stormy", "snowy", "hot"),
        (
            "It is {x} today.",
            "The weather is so {x}.",
            "I do not like {x} days.",
            "Will it be {x} tomorrow?",
            "It was {x} all week.",
        ),
        ("Oh, {x} weather!", "I see.", "Well, the weather does what it wants."),
        ("On a {x} day I would read a book.", "When it is {x} you should dress well.", "Some people like it {x}."),
        ("What will you do today?", "Do you go out when it is {x}?", "What is your favourite season?"),
    ),
)
_FAREWELLS = (
    Exchange(
        (),
        ("Thank you!", "Thanks for your help.", "Thanks, that was nice.", "Thank you so much.", "You are very kind."),
        ("You are welcome!", "My pleasure!", "Any time!", "Glad to help!"),
        ("It was nice to talk with you.", "I enjoyed our chat.", "That was a good conversation."),
        ("Is there anything else?", "Come back soon!", "Have a nice day!"),
    ),
    Exchange(
        (),
        ("Goodbye!", "Bye!", "I have to go now.", "See you later.", "Good night!", "I am going to bed."),
        ("Goodbye!", "See you soon!", "Take care!", "Bye for now!"),
        ("It was nice to talk with you.", "I enjoyed our chat.", "Thank you for the talk."),
        ("Have a nice day!", "Come back any time!", "Sleep well when you do!"),
    ),
    Exchange(
        (),
        ("Who are you?", "What are you?", "Are you a robot?", "What can you do?", "Are you human?"),
        ("I am a small language model.", "I am a tiny assistant.", "I am a computer program."),
        (
            "I can chat, answer questions and sum up texts.",
            "I was trained to talk and to answer.",
            "I know a little about many things.",
        ),
        ("What would you like to know?", "How can I help you?", "Shall we talk about your day?"),
    ),
)


def example(split: Split, key: str) -> Example:
    """A chat of one to three exchanges, at least one of them about some thing: the last reply is the answer."""
    draw = Draw(f"conv/{split}/{key}", split)
    exchanges = [_pick(draw, _GREETINGS)] if draw.chance(0.3) else []
    named = any(exchange.things for exchange in exchanges)
    small_talk_only = split == "train" and draw.chance(0.15)
    if not small_talk_only:
        exchanges += draw.rng.sample(_SUBJECTS, draw.rng.randint(0 if named else 1, 2))
    if draw.chance(0.2) or not exchanges:
        exchanges.append(_pick(draw, _FAREWELLS))
    turns = [_turn(draw, exchange) for exchange in exchanges]
    return Example(turns[-1][0], turns[-1][1], "conv", tuple(turns[:-1]))


def _pick(draw: Draw, exchanges: tuple[Exchange, ...]) -> Exchange:
    return exchanges[draw.rng.randrange(len(exchanges))]


def _turn(draw: Draw, exchange: Exchange) -> tuple[str, str]:
    """Both sides of an exchange. Held out: what the user says about which thing, and how the reply is put together."""
    thing, user = "", draw.one(exchange.user)
    if exchange.things:
        thing, user = next(
            pair for pair in iter(lambda: _said(draw, exchange), None) if split_of(pair[1]) == draw.split
        )
    begin, middle, end = draw.phrase(exchange.begin, exchange.middle, exchange.end)
    return user, " ".join(_fill(part, thing) for part in (begin, middle, end))


def _said(draw: Draw, exchange: Exchange) -> tuple[str, str]:
    thing = draw.noun(exchange.things)
    return thing, _fill(draw.one(exchange.user), thing)


def _fill(wording: str, thing: str) -> str:
    text = wording.format(x=thing)
    return text[0].upper() + text[1:]
