"""Word lists of the generators: plain English words and common proper nouns, grouped by what they name."""

from __future__ import annotations

from train.tasks.lists import read

named: dict[str, tuple[str, ...]] = read("words")
"""By the name that other data files know a list by."""

FIRST_NAMES = named["first names"]
SURNAMES = named["surnames"]
CITIES = named["cities"]
PROFESSIONS = named["professions"]
FOODS = named["foods"]
ANIMALS = named["animals"]
INSTRUMENTS = named["instruments"]
LANGUAGES = named["languages"]
SUBJECTS = named["subjects"]
SPORTS = named["sports"]
HOBBIES = named["hobbies"]
COLOURS = named["colours"]
VEHICLES = named["vehicles"]
MONTHS = named["months"]
WEEKDAYS = named["weekdays"]
PRODUCTS = named["products"]
COMPANY_STEMS = named["company stems"]
COMPANY_KINDS = named["company kinds"]
SYLLABLES_HEAD = named["syllables head"]
SYLLABLES_TAIL = named["syllables tail"]
TOPICS = named["topics"]
