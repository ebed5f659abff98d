"""Events that never happened: year, leader, cause, realm."""

from __future__ import annotations

from train.tasks.fields.field import Field, Relation
from train.tasks.words import split_words

HISTORY = Field(
    "history",
    (
        "the Battle of {n}",
        "the Siege of {n}",
        "the Treaty of {n}",
        "the Council of {n}",
        "the Revolt of {n}",
        "the Truce of {n}",
    ),
    split_words("Ar Bel Cast Dur Er Fal Gor Hal Iv Kar Lun Mal Nor Os Pal Quer Rav Sal Tor Var Zam"),
    split_words("amor borg castra dun egard fort gard hold issa kirk lath mont naro opol rath stadt thal umbra wald"),
    (
        Relation(
            "year",
            tuple(str(year) for year in range(1103, 1900, 17)),
            (
                "The year of {s} was {v}",
                "{s} took place in {v}",
                "Chronicles date {s} to {v}",
                "In {v} came {s}",
                "{s} belongs to the year {v}",
            ),
            (
                "When did {s} take place?",
                "In which year was {s}?",
                "To which year do chronicles date {s}?",
                "What was the year of {s}?",
                "When came {s}?",
                "What date is given for {s}?",
            ),
        ),
        Relation(
            "leader",
            split_words("""
                Ambrosius Aurelian Cassius Demetrius Drusus Flavius Gallus Hadrian Herodes Julian Leonidas Lucius
                Lysander Marius Nero Octavian Pericles Philippus Ptolemy Quintus Regulus Romulus Septimus Severus
                Tarquin Tiberius Trajan Valerian Vitus Xerxes
            """),
            (
                "{s} was led by {v}",
                "The hero of {s} was {v}",
                "{v} won fame at {s}",
                "Songs about {s} praise {v}",
                "The name tied to {s} is {v}",
            ),
            (
                "Who led {s}?",
                "Who was the hero of {s}?",
                "Who won fame at {s}?",
                "Whom do songs about {s} praise?",
                "Which name is tied to {s}?",
                "Who commanded at {s}?",
            ),
        ),
        Relation(
            "cause",
            split_words("""
                bribery cattle conscription coronation debts dowry drought duties exile famine fisheries forgery
                grazing heresy hostages incense inheritance insult ivory jealousy land marriage mines murder pilgrims
                plague ransom relics revenge serfdom silk slander smuggling succession taxes timber treason tribute
            """),
            (
                "The cause of {s} was {v}",
                "{s} came about through {v}",
                "Behind {s} there was a quarrel about {v}",
                "Historians explain {s} by {v}",
                "What lay behind {s} was {v}",
            ),
            (
                "What was the cause of {s}?",
                "Through what did {s} come about?",
                "About what was the quarrel behind {s}?",
                "How do historians explain {s}?",
                "What lay behind {s}?",
                "Why did {s} happen?",
            ),
        ),
        Relation(
            "realm",
            split_words("""
                Aquitane Bohemund Carinth Dalmara Etruria Flandria Galicia Helvetia Illyria Jutland Karelia Livonia
                Mercia Navarra Ostia Pomerania Ruthenia Saxonia Thracia Umbria Volhynia Wallachia
            """),
            (
                "{s} decided the fate of {v}",
                "{s} belongs to the history of {v}",
                "After {s} peace came to {v}",
                "{s} shook the realm of {v}",
                "In {v} children learn of {s}",
            ),
            (
                "The fate of which realm did {s} decide?",
                "To whose history does {s} belong?",
                "Where did peace come after {s}?",
                "Which realm was shaken by {s}?",
                "Where do children learn of {s}?",
                "Which country saw {s}?",
            ),
        ),
    ),
)
