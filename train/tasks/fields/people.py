"""People of a past that never was: craft, heirloom, birthplace, fear."""

from __future__ import annotations

from train.tasks.fields.field import Field, Relation
from train.tasks.words import split_words

PEOPLE = Field(
    "people",
    ("Adah {n}", "Corvin {n}", "Elspeth {n}", "Jorik {n}", "Maude {n}", "Osric {n}", "Thessa {n}", "Ulric {n}"),
    split_words("Bram Chal Dray Fitz Gris Hawk Kest Lor Mack Nev Pem Rad Scar Thorn Und Whit"),
    split_words("ander bury croft fell gate hart ingham kell low mond nell over shaw stead ton worth"),
    (
        Relation(
            "craft",
            split_words("""
                archer armourer beekeeper bellringer bookbinder brewer candlemaker cartographer clockmaker cooper
                cutler dyer engraver falconer ferryman fletcher furrier gilder glover goldsmith harper hatter herald
                miller minstrel parchmenter ropemaker saddler scribe shipwright stonecutter tanner thatcher tinker
                weaponsmith wheelwright
            """),
            (
                "{s} earned a living as a {v}",
                "By craft {s} was a {v}",
                "Neighbours knew {s} as a {v}",
                "{s} was trained to be a {v}",
                "The guild listed {s} as a {v}",
            ),
            (
                "What was the craft of {s}?",
                "Which trade did {s} follow?",
                "How did {s} earn a living?",
                "What was {s} trained to be?",
                "As what was {s} known to the neighbours?",
                "Under which craft did the guild list {s}?",
            ),
        ),
        Relation(
            "heirloom",
            split_words("""
                amulet anvil astrolabe bracelet brooch cameo chalice compass crown dagger goblet hourglass inkwell
                lantern locket mirror monocle needle pendant pitcher quill ring rosary sabre satchel scabbard sceptre
                seal spindle spyglass tapestry thimble tiara trunk whistle
            """),
            (
                "{s} left behind a {v}",
                "The heirloom of {s} is a {v}",
                "{s} never parted with a {v}",
                "In the will of {s} there was a {v}",
                "{s} inherited a {v}",
            ),
            (
                "What did {s} leave behind?",
                "What is the heirloom of {s}?",
                "With what did {s} never part?",
                "What was in the will of {s}?",
                "What did {s} inherit?",
                "Which keepsake belonged to {s}?",
            ),
        ),
        Relation(
            "birthplace",
            split_words("""
                Alderney Ballast Birkland Caddis Cawdor Dunmere Eskdale Fallow Garth Hexgrove Inverlee Kirkby Lanark
                Marlow Nairn Ormsby Pendle Quernmore Ravenglass Selkirk Tarbert Ulverston Wensley Yarrow
            """),
            (
                "{s} was born at {v}",
                "The cradle of {s} stood in {v}",
                "{s} came from {v}",
                "{s} spent childhood in {v}",
                "{v} is the birthplace of {s}",
            ),
            (
                "Where was {s} born?",
                "What is the birthplace of {s}?",
                "Where did {s} come from?",
                "Where did {s} spend childhood?",
                "Where did the cradle of {s} stand?",
                "Which village saw the birth of {s}?",
            ),
        ),
        Relation(
            "fear",
            split_words("""
                bats bells bridges candles caves cellars clowns crowds crows darkness debts dogs drowning earthquakes
                fire flies floods fog geese ghosts heights lightning mice moths needles owls rats silence snow spiders
                storms thunder wasps wells wolves
            """),
            (
                "{s} was afraid of {v}",
                "Nothing scared {s} like {v}",
                "{s} had a lifelong fear of {v}",
                "{s} trembled at {v}",
                "The nightmares of {s} were about {v}",
            ),
            (
                "What was {s} afraid of?",
                "What scared {s} most?",
                "What did {s} fear all life long?",
                "What made {s} tremble?",
                "What were the nightmares of {s} about?",
                "Which fear did {s} have?",
            ),
        ),
    ),
)
