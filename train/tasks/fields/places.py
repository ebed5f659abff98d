"""Towns on no map: river, harvest, landmark, patron."""

from __future__ import annotations

from train.tasks.fields.field import Field, Relation
from train.tasks.words import split_words

PLACES = Field(
    "places",
    ("{n}", "{n}", "Port {n}", "Upper {n}", "{n} Bay"),
    split_words("Ash Bick Clav Dov Elm Frost Gull Holm Ish Kelp Lynd Mirk Nant Oak Prior Rook Strand Tarn Vex Wyre"),
    split_words("acre barrow cliff dale ereth firth grange haven inlet mere ness orchard pool ridge sands vale"),
    (
        Relation(
            "river",
            split_words("""
                Abra Belwin Cassar Dorne Erith Fenna Galt Hyrr Ilva Jenka Kora Lethe Mossa Nedra Olt Pryth Quell Rima
                Sarn Tavy Ursa Vesk Wend Ythe
            """),
            (
                "{s} lies on the {v}",
                "The river {v} flows through {s}",
                "At {s} a bridge crosses the {v}",
                "The mills of {s} are driven by the {v}",
                "Every spring the {v} floods {s}",
            ),
            (
                "On which river does {s} lie?",
                "Which river flows through {s}?",
                "Which river does the bridge at {s} cross?",
                "Which river drives the mills of {s}?",
                "Which river floods {s} every spring?",
                "What is the river of {s}?",
            ),
        ),
        Relation(
            "harvest",
            split_words("""
                amber barley beech brine buckwheat cider clay cranberries eels flax gooseberries hemp herring hops
                kelp lavender limestone madder millet mussels oats peat quinces reeds rye saffron salt seaweed slate
                sorrel sturgeon tallow tin walnuts wool
            """),
            (
                "{s} lives from its {v}",
                "Traders come to {s} for {v}",
                "The wealth of {s} is its {v}",
                "{s} sends {v} to all the coast",
                "The market of {s} sells mostly {v}",
            ),
            (
                "What does {s} live from?",
                "What do traders come to {s} for?",
                "What is the wealth of {s}?",
                "What does {s} send to all the coast?",
                "What does the market of {s} mostly sell?",
                "Which goods is {s} known for?",
            ),
        ),
        Relation(
            "landmark",
            split_words("""
                abbey aqueduct arch bastion belfry causeway chapel citadel cloister colonnade dam fountain granary
                harbour keep lighthouse lock manor mausoleum minaret monastery moat obelisk pavilion pier priory
                quarry rotunda shrine sundial tollhouse viaduct watchtower weir windmill
            """),
            (
                "{s} is famous for its {v}",
                "Visitors to {s} want to see the {v}",
                "Over {s} rises an old {v}",
                "On the seal of {s} there is a {v}",
                "The sight of {s} is the {v}",
            ),
            (
                "What is {s} famous for?",
                "What do visitors to {s} want to see?",
                "What rises over {s}?",
                "What is on the seal of {s}?",
                "What is the sight of {s}?",
                "Which landmark does {s} have?",
            ),
        ),
        Relation(
            "patron",
            split_words("""
                Agnetha Alaric Baldwin Berengar Clothilde Conrad Dagmar Edwina Ethelred Fulk Gertrud Godfrey Hedwig
                Isolde Kunigund Leofric Lothar Matilda Odo Pepin Radegund Rowena Sigbert Theobald Walburga Wulfstan
            """),
            (
                "The patron of {s} is {v}",
                "{s} was founded by {v}",
                "In {s} they honour {v}",
                "The feast of {s} is named after {v}",
                "A statue of {v} stands in {s}",
            ),
            (
                "Who is the patron of {s}?",
                "Who founded {s}?",
                "Whom do they honour in {s}?",
                "After whom is the feast of {s} named?",
                "Whose statue stands in {s}?",
                "Who is remembered as the founder of {s}?",
            ),
        ),
    ),
)
