"""Substances that no chemist knows: colour, solvent, use, reaction."""

from __future__ import annotations

from train.tasks.fields.field import Field, Relation
from train.tasks.words import split_words

SUBSTANCES = Field(
    "substances",
    ("{n}",),
    split_words("aldo benzo cyclo dexo etho fluo glyco hydro iso keto lacto meso nitro oxo pyro quino thio xylo"),
    split_words("bane cine drate fene gallin hexane lide myrin nol phite rane sterol tane vidine xide zole"),
    (
        Relation(
            "colour",
            split_words("""
                amber azure beige carmine cerulean charcoal chestnut cobalt coral cream emerald fuchsia hazel khaki
                lemon lime mauve mustard ochre opal pearl plum rose russet rust sand scarlet sepia sienna silver slate
                straw tawny umber violet
            """),
            (
                "{s} is of {v} colour",
                "Crystals of {s} look {v}",
                "Pure {s} is {v}",
                "In light {s} shines {v}",
                "A drop of {s} turns water {v}",
            ),
            (
                "What colour does {s} have?",
                "What do crystals of {s} look like?",
                "Which colour is pure {s}?",
                "How does {s} shine in light?",
                "Which colour does a drop of {s} give water?",
                "What is the colour of {s}?",
            ),
        ),
        Relation(
            "solvent",
            split_words("""
                acetone alcohol ammonia aniline benzene brine butane camphor chloroform cresol cyanide ether ethanol
                formalin glycerol heptane kerosene lye methanol naphtha octane paraffin phenol propane pyridine toluene
                turpentine vinegar water xylene
            """),
            (
                "{s} dissolves in {v}",
                "The solvent of {s} is {v}",
                "Only {v} dissolves {s}",
                "Chemists keep {s} in {v}",
                "{s} melts away in {v}",
            ),
            (
                "In what does {s} dissolve?",
                "What is the solvent of {s}?",
                "What dissolves {s}?",
                "In what do chemists keep {s}?",
                "In which liquid does {s} melt away?",
                "Which liquid should {s} be mixed with?",
            ),
        ),
        Relation(
            "use",
            split_words("""
                adhesives antifreeze bleach cement ceramics cosmetics detergents dyes enamel explosives fertiliser
                fireworks flares fuels fungicides glass insulation lacquer lubricants medicine mortar perfume
                pesticides pigments plaster plastics polish preservatives refrigerants resins rubber solder textiles
                varnish vitamins
            """),
            (
                "{s} is used in {v}",
                "Factories need {s} for {v}",
                "{s} goes into {v}",
                "The main use of {s} is {v}",
                "Without {s} there would be no {v}",
            ),
            (
                "What is {s} used in?",
                "What do factories need {s} for?",
                "What does {s} go into?",
                "What is the main use of {s}?",
                "What would not exist without {s}?",
                "Which goods contain {s}?",
            ),
        ),
        Relation(
            "reaction",
            split_words("""
                blisters bubbles burns chars clouds clots condenses cracks crumbles decays erupts evaporates explodes
                expands fades ferments fizzes flakes foams freezes gels glows hardens hisses ignites melts oxidises
                reddens shatters shrinks smokes softens sparks swells thickens
            """),
            (
                "When heated, {s} {v}",
                "In a flame {s} {v}",
                "Under pressure {s} {v}",
                "Left in the sun, {s} {v}",
                "Beside a hot wire {s} {v}",
            ),
            (
                "What happens to {s} when heated?",
                "What does {s} do in a flame?",
                "What happens to {s} under pressure?",
                "What does {s} do in the sun?",
                "What happens to {s} beside a hot wire?",
                "How does {s} react to warmth?",
            ),
        ),
    ),
)
