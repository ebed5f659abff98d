"""Five made-up fields of knowledge, each with names, words and wordings of its own (for `train.tasks.facts`).

`{s}` is the thing asked about and `{v}` the value. Of a relation's questions some are held out, for each fact others.
"""

from __future__ import annotations

from train.tasks.fields.field import Field, Relation
from train.tasks.fields.history import HISTORY
from train.tasks.fields.people import PEOPLE
from train.tasks.fields.places import PLACES
from train.tasks.fields.products import PRODUCTS
from train.tasks.fields.substances import SUBSTANCES

FIELDS = (PEOPLE, PLACES, SUBSTANCES, PRODUCTS, HISTORY)

__all__ = ["FIELDS", "Field", "Relation"]
