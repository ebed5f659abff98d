"""`oneOf` of branches that exclude each other is `anyOf`; other schemas with it are refused."""

import json
from typing import Annotated, Any, Literal, Union

import pytest
from pydantic import BaseModel, Field

from emoe_jax.errors import RequestError
from emoe_jax.models import load_tokenizer
from emoe_jax.requests.grammar import Grammars
from emoe_jax.requests.one_of import without_one_of
from emoe_jax.requests.structured_params import StructuredOutputsParams


class Cat(BaseModel):
    kind: Literal["cat"] = "cat"
    lives: int


class Dog(BaseModel):
    kind: Literal["dog", "hound"] = "dog"
    name: str


class One(BaseModel):
    version: Literal[1]
    a: int


class Two(BaseModel):
    version: Literal[2]
    a: int


class Leaf(BaseModel):
    type: Literal["leaf"]
    value: int


class Branch(BaseModel):
    type: Literal["branch"]
    parts: list["Tree"]


Tree = Annotated[Union[Leaf, Branch], Field(discriminator="type")]  # noqa: UP007  forward reference
Branch.model_rebuild()


class Pet(BaseModel):
    pet: Cat | Dog = Field(discriminator="kind")


class Versions(BaseModel):
    all: list[Annotated[One | Two, Field(discriminator="version")]]


class Forest(BaseModel):
    tree: Tree


def of(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


def required(**constants: Any) -> dict[str, Any]:
    """Of an object, but it does not say so."""
    return {"properties": {name: {"const": value} for name, value in constants.items()}, "required": list(constants)}


def partly(k: int, a: str) -> dict[str, Any]:
    return {"properties": {"k": {"const": k}, "a": {"type": a}}}


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    tokenizer = load_tokenizer("checkpoints/demo")
    assert tokenizer is not None
    return Grammars(tokenizer, 4096, tokenizer.eos_token_ids)


CASES = [
    (Pet.model_json_schema(), {"pet": {"kind": "hound", "name": "x"}}, {"pet": {"kind": "cat", "name": "x"}}),
    (Pet.model_json_schema(), {"pet": {"kind": "cat", "lives": 9}}, {"pet": {"lives": 9}}),
    (Versions.model_json_schema(), {"all": [{"version": 2, "a": 1}]}, {"all": [{"version": 3, "a": 1}]}),
    (
        Forest.model_json_schema(),
        {"tree": {"type": "branch", "parts": [{"type": "leaf", "value": 1}, {"type": "branch", "parts": []}]}},
        {"tree": {"type": "leaf", "parts": []}},
    ),
    ({"oneOf": [{"type": "string"}, {"type": "integer"}, {"type": "null"}]}, 5, 5.5),
    ({"oneOf": [{"enum": [1, "a"]}, {"enum": [2, True]}]}, True, 3),
    ({"oneOf": [of(k={"const": None}), of(k={"type": "array", "items": {"type": "integer"}})]}, {"k": [1]}, {"k": 1}),
    (  # what holds for all branches stands beside them
        {"type": "object", "required": ["k"], "oneOf": [partly(k=1, a="integer"), partly(k=2, a="string")]},
        {"k": 2, "a": "x"},
        {"k": 2, "a": 1},
    ),
    (
        {"type": "object", "oneOf": [{"$ref": "#/$defs/A"}, of(k={"const": 2})], "$defs": {"A": required(k=1)}},
        {"k": 1},
        {"k": 3},
    ),
    (
        {"oneOf": [{"type": "object", "anyOf": [required(k=1), required(k=2)]}, of(k={"const": 3})]},
        {"k": 2},
        {"k": 4},
    ),
    (
        {"properties": {"oneOf": {"type": "integer"}}, "required": ["oneOf"], "type": "object"},
        {"oneOf": 1},
        {"oneOf": "x"},
    ),
]


@pytest.mark.parametrize(("schema", "good", "bad"), CASES)
def test_branches_that_exclude_each_other(grammars: Grammars, schema: Any, good: Any, bad: Any) -> None:
    grammars.compile(StructuredOutputsParams(json=schema))
    assert follows(grammars, schema, good)
    assert not follows(grammars, schema, bad)


def follows(grammars: Grammars, schema: Any, value: Any) -> bool:
    """Whether the value is a whole answer to the schema."""
    from llguidance import LLMatcher

    text = LLMatcher.grammar_from_json_schema(without_one_of(json.dumps(schema)))
    matcher = LLMatcher(grammars.vocabulary, text, log_level=0)
    tokens = grammars.vocabulary.tokenize_str(json.dumps(value))
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@pytest.mark.parametrize(
    "schema",
    [
        {"oneOf": [{"type": "number"}, {"type": "integer"}]},
        {"oneOf": [of(a={"type": "string"}), of(b={"type": "string"})]},
        {"oneOf": [{**of(k={"const": 1}), "required": []}, of(k={"const": 2})]},
        {"oneOf": [{"enum": [1, 2]}, {"enum": [2.0, 3]}]},
        {"oneOf": [required(k=1), required(k=2)]},  # any number is both
        {"type": "object", "oneOf": [partly(1, "string"), partly(2, "string")]},  # so is an object without k
        {"type": ["object", "null"], "required": ["k"], "oneOf": [partly(1, "string"), partly(2, "string")]},
        {"oneOf": [{"type": "string"}, {"pattern": "a"}]},
        {"type": "array", "items": {"oneOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/A"}]}, "$defs": {"A": of(a={})}},
        {"oneOf": [{"$ref": "#/$defs/L"}, {"type": "string"}], "$defs": {"L": {"$ref": "#/$defs/L"}}},
    ],
)
def test_branches_that_may_both_match_are_refused(grammars: Grammars, schema: Any) -> None:
    with pytest.raises(RequestError, match="branches 0 and 1 of a oneOf may both match; use anyOf, or") as error:
        grammars.compile(StructuredOutputsParams(json=schema))
    assert "\n" not in str(error.value)


def test_too_many_branches_are_refused(grammars: Grammars) -> None:
    with pytest.raises(RequestError, match="has 300 branches; at most 256"):
        grammars.compile(StructuredOutputsParams(json={"oneOf": [{"const": i} for i in range(300)]}))


def test_values_are_no_schemas() -> None:
    schema = {"const": {"oneOf": [1, 1]}, "default": {"oneOf": []}, "enum": [{"oneOf": [2]}]}
    assert json.loads(without_one_of(json.dumps(schema))) == schema
