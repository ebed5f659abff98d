"""Texts and requests that belong to none of the five tasks: what keywords are contrasted with, so that they abstain."""

from __future__ import annotations

REQUESTS = tuple(
    line.strip()
    for line in """
    Write a Python function that reverses a linked list.
    Translate the following sentence into French: The train leaves at noon.
    Fix the grammar of this paragraph and make it sound more formal.
    Explain how photosynthesis works to a ten-year-old.
    Prove that the square root of two is irrational.
    Solve for x: 3x + 7 = 22.
    Compute the integral of sin(x) from zero to pi.
    Give me a recipe for lentil soup with carrots and cumin.
    Preheat the oven to 200 degrees, then mix flour, sugar and butter until smooth.
    Generate ten names for a startup that makes reusable bottles.
    Write a haiku about autumn leaves.
    Compose a cover letter for a junior accountant position.
    Design a database schema for a library with books, members and loans.
    Convert this JSON to YAML.
    Refactor the code below so that it uses a context manager.
    List the planets of the solar system by mass.
    What is the boiling point of ethanol at sea level?
    How does a transformer change the voltage of alternating current?
    Why is the sky blue during the day and red at sunset?
    Plan a three-day itinerary for hiking in the Dolomites.
    Draft an email to a supplier who delivered the wrong parts.
    Rewrite the following paragraph in the style of a pirate.
    Complete the sentence: the quick brown fox
    Continue the story from here.
    Once upon a time, in a valley behind seven hills, an old clockmaker kept a secret.
    The ship left the harbour before dawn, and by noon the coast was out of sight.
    SELECT name, price FROM items WHERE price > 10 ORDER BY name;
    for i in range(10): print(i * i)
    import numpy as np; a = np.zeros((3, 3))
    Traceback (most recent call last): File "main.py", line 3, in <module> KeyError: 'a'
    The parties agree that this contract shall be governed by the laws of the State of Delaware.
    The defendant appealed the decision on the ground that evidence had been excluded.
    Enzymes lower the activation energy of reactions without being consumed.
    The mitral valve separates the left atrium from the left ventricle.
    In 1789 the Estates General met at Versailles for the first time since 1614.
    Tectonic plates drift a few centimetres a year over the asthenosphere.
    A prime number has exactly two divisors, one and itself.
    Let G be a finite group and H a normal subgroup of G.
    The algorithm runs in time proportional to n log n in the worst case.
    Press the power button for five seconds to reset the device.
    Keep out of reach of children and store below 25 degrees.
    Step 1: remove the cover. Step 2: loosen both screws. Step 3: lift out the filter.
    Act as a Linux terminal and reply only with the output of my commands.
    Classify these animals as mammals, reptiles or birds: whale, gecko, owl.
    Extract all dates and amounts of money from the invoice.
    Which of these numbers is the largest: 0.3, 0.29 or 0.31?
    Explain the difference between a mutex and a semaphore.
    Compare the economies of Norway and Portugal in the nineteenth century.
    Write an essay about the causes of the First World War.
    Is it better to invest in bonds or in index funds when rates rise?
    Suggest a training plan for running ten kilometres in under fifty minutes.
    What are the side effects of ibuprofen?
    Name three novels by Virginia Woolf.
    Who painted the ceiling of the Sistine Chapel?
    How many bones does an adult human have?
    Create a regular expression that matches IPv4 addresses.
    Write unit tests for a function that parses ISO dates.
    Brainstorm slogans for a campaign against food waste.
    The committee will meet on the second floor after lunch to vote on the budget.
    Water freezes at a lower temperature when salt is dissolved in it.
    To be, or not to be, that is the question.
    It was the best of times, it was the worst of times.
    Roses are red, violets are blue, sugar is sweet.
    Lorem ipsum dolor sit amet, consectetur adipiscing elit, sed do eiusmod tempor.
    El gato duerme sobre la mesa de la cocina mientras llueve.
    Der Zug nach München fährt heute von Gleis sieben ab.
    Le conseil municipal a voté le budget à l'unanimité.
    0 1 1 2 3 5 8 13 21 34 55 89 144
    aaaa bbbb cccc dddd
    Turn the bullet points into a slide deck outline.
    Debug this shell script; it stops with exit code 127.
    Write a dialogue between a robot and a gardener about time.
    Invent a board game about bees and explain its rules.
    Describe the painting in three paragraphs for a museum catalogue.
    Optimize this query, it takes forty seconds on a million rows.
    Tell whether the following argument is valid: all cats sleep; Tom sleeps; so Tom is a cat.
    Find the bug: while (x = 1) { x--; }
    Estimate how many piano tuners work in Chicago.
    Paraphrase the following sentence three times.
    Write the lyrics of a sea shanty about a lost anchor.
    The central bank said on Thursday that it would leave interest rates as they were for many weeks.
    The minister told reporters after the meeting that a local road will be closed.
    The storm moved north, the mayor said, and the public square was full of branches and mud.
    An article in this issue of the journal describes how many coral reefs recovered.
    This question was raised in an earlier paper; the answer depends on the context.
    These days most passages of the manuscript are kept in a vault, of course.
    The list of integers should be sorted in descending order.
    Can you write a script that renames all files in a folder?
    What do you need to know to pass the bar exam in Texas?
    Let us denote by d the distance between two points; let us assume that d is positive.
    My laptop does not boot; how do I repair the partition table?
    A headline set in bold type should be similar in width to the column.
    Answer the phone before the third ring and note the name of the caller briefly.
    """.splitlines()
    if line.strip()
)
_PARAGRAPH_WORDS = 120


def prose() -> list[str]:
    """Paragraphs of English that comes with every Python: its language reference."""
    from pydoc_data.topics import topics

    words = " ".join(topics[name] for name in sorted(topics)).split()
    paragraphs = [words[start : start + _PARAGRAPH_WORDS] for start in range(0, len(words), _PARAGRAPH_WORDS)]
    return [" ".join(paragraph) for paragraph in paragraphs]
