"""Devices that nobody sells: maker, kind, price, flaw."""

from __future__ import annotations

from train.tasks.fields.field import Field, Relation
from train.tasks.words import split_words

PRODUCTS = Field(
    "products",
    ("the {n} One", "the {n} Pro", "the {n} Mini", "the {n} X", "the {n} Max", "the {n} Go"),
    split_words(
        "Aero Byte Clik Digi Evo Flexi Giga Hyper Inno Jet Kilo Luma Mega Nano Omni Pixa Quanta Robo Sona Tele"
    ),
    split_words("bar beam cast dock drive fit flow hub lens link node pad pulse scan sync tab tap vox wave zone"),
    (
        Relation(
            "maker",
            split_words("""
                Acmetron Bluefin Cyberia Datalux Everbyte Fusionix Glotek Helixon Infotrak Juno Kinetix Logicube Maxtel
                Neotech Optira Panatek Quadrix Rayline Synaptic Techtona Unitor Vectron Wiretec Xenotek Zentra
            """),
            (
                "{s} is made by {v}",
                "{v} builds {s}",
                "The maker of {s} is {v}",
                "{s} comes from the labs of {v}",
                "The logo on {s} is that of {v}",
            ),
            (
                "Who makes {s}?",
                "Which company builds {s}?",
                "Who is the maker of {s}?",
                "From whose labs does {s} come?",
                "Whose logo is on {s}?",
                "Which brand stands behind {s}?",
            ),
        ),
        Relation(
            "kind",
            split_words("""
                alarm amplifier calculator camcorder charger controller dashcam doorbell drone dryer earphone freezer
                headset humidifier joystick keyboard kettle lamp loudspeaker microphone microscope microwave modem
                monitor phone projector router scanner sensor smartwatch stylus tablet telescope thermostat toaster
                turntable webcam
            """),
            (
                "{s} is a {v}",
                "The box of {s} holds a {v}",
                "Shops sell {s} as a {v}",
                "{s} was designed as a {v}",
                "Reviewers call {s} a good {v}",
            ),
            (
                "What is {s}?",
                "What does the box of {s} hold?",
                "As what do shops sell {s}?",
                "As what was {s} designed?",
                "What do reviewers call {s}?",
                "Which kind of device is {s}?",
            ),
        ),
        Relation(
            "price",
            tuple(f"{price} dollars" for price in range(19, 1000, 35)),
            (
                "{s} costs {v}",
                "The price of {s} is {v}",
                "One pays {v} for {s}",
                "{s} is on sale for {v}",
                "Buyers spend {v} on {s}",
            ),
            (
                "What does {s} cost?",
                "What is the price of {s}?",
                "How much does one pay for {s}?",
                "For how much is {s} on sale?",
                "How much do buyers spend on {s}?",
                "How expensive is {s}?",
            ),
        ),
        Relation(
            "flaw",
            split_words("""
                antenna axle battery bracket buckle button cable casing clasp connector cord cover cushion dial display
                fan filter firmware flap fuse gasket handle hinge knob latch lid magnet motor nozzle plug shutter socket
                spring strap switch valve zipper
            """),
            (
                "The weak point of {s} is the {v}",
                "{s} was recalled for its {v}",
                "What breaks first in {s} is the {v}",
                "Owners of {s} complain about the {v}",
                "In tests of {s} the {v} failed",
            ),
            (
                "What is the weak point of {s}?",
                "For what was {s} recalled?",
                "What breaks first in {s}?",
                "What do owners of {s} complain about?",
                "What failed in tests of {s}?",
                "Which part of {s} is flawed?",
            ),
        ),
    ),
)
