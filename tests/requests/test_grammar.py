"""Answers that have to match a schema, an expression, a choice or a grammar do, and nothing beside them changes."""

import builtins
import concurrent.futures
import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from emoe_jax import Engine, RequestError, SamplingParams, StructuredOutputsParams
from emoe_jax.models import load_tokenizer
from emoe_jax.requests import grammar as grammar_module
from emoe_jax.requests.grammar import EBNF_RULE, MAX_COMPILED, MAX_EBNF_CHARS, Grammars, _grammar
from emoe_jax.requests.guide import Grammar
from emoe_jax.requests.structured_params import MAX_GRAMMAR_CHARS
from tests.serve.checkpoint import write_tiny_checkpoint

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "kind": {"enum": ["cat", "dog", 7, None]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "kind", "tags"],
    "additionalProperties": False,
}
LARK = """
start: sum
sum: term ("+" term)+
term: NUMBER | "(" sum ")"
NUMBER: /[0-9]/
"""
EBNF = """
# as in vLLM's documentation
root ::= select
select ::= "SELECT " column " from " table
column ::= "col_1" | "col_2"
table ::= "table_" [1-9]
"""
PROMPT = "hello there"
PLAIN = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)


def matches_person(text: str) -> bool:
    person = json.loads(text)
    return (
        list(person) == ["name", "kind", "tags"]
        and isinstance(person["name"], str)
        and len(person["name"]) <= 5
        and person["kind"] in PERSON["properties"]["kind"]["enum"]
        and 1 <= len(person["tags"]) <= 3
        and all(isinstance(tag, bool) for tag in person["tags"])
    )


def guided(wanted: StructuredOutputsParams, **params: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 150, "temperature": 0, **params}, structured_outputs=wanted)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    directory = tmp_path_factory.mktemp("checkpoints") / "tiny"
    write_tiny_checkpoint(directory)
    options: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "policy": "static"}
    with Engine.load(directory, expert_memory="100%", **options) as engine:
        engine.warm_up()
        yield engine


@pytest.mark.parametrize("temperature", [0, 1.5])
@pytest.mark.parametrize("routing", ["resident", "exact"])
def test_json_matches_its_schema(engine: Engine, temperature: float, routing: Any) -> None:
    params = guided(StructuredOutputsParams(json=PERSON), temperature=temperature, n=4, seed=3, top_p=0.95, top_k=40)
    output = engine.generate(PROMPT, params, routing=routing)[0]
    assert [completion.finish_reason for completion in output.completions] == ["stop"] * 4
    assert all(matches_person(completion.text) for completion in output.completions)
    assert len({completion.text for completion in output.completions}) == (4 if temperature else 1)
    again = engine.generate(PROMPT, params, routing=routing)[0]
    assert [completion.text for completion in again.completions] == [item.text for item in output.completions]


@pytest.mark.parametrize(
    ("wanted", "expression"),
    [
        (StructuredOutputsParams(regex="[a-c]{2,4}-[0-9]{3}"), "[a-c]{2,4}-[0-9]{3}"),
        (StructuredOutputsParams(choice=("yes", 'a "quoted" no', "vielleicht: ü")), 'yes|a "quoted" no|vielleicht: ü'),
        (StructuredOutputsParams(json='{"enum": ["a", 1]}'), '"a"|1'),
        (StructuredOutputsParams(grammar=EBNF), "SELECT col_[12] from table_[1-9]"),
    ],
)
@pytest.mark.parametrize("temperature", [0, 2])
def test_expressions_and_choices(
    engine: Engine, wanted: StructuredOutputsParams, expression: str, temperature: float
) -> None:
    output = engine.generate(PROMPT, guided(wanted, temperature=temperature))[0]
    assert re.fullmatch(expression, output.text)
    assert output.completions[0].finish_reason == "stop"
    assert (
        "".join(delta.text for delta in engine.stream(PROMPT, guided(wanted)))
        == engine.generate(PROMPT, guided(wanted))[0].text
    )


def test_beside_others_without_compiling(engine: Engine) -> None:
    """The unconstrained request's tokens do not change, nor do a guided one's, penalties included."""
    requests = {
        "plain": PLAIN,
        "sampled": SamplingParams(max_tokens=40, seed=5, ignore_eos=True),
        "person": guided(StructuredOutputsParams(json=PERSON), temperature=1, seed=1, presence_penalty=0.5, logprobs=2),
        "cut": guided(StructuredOutputsParams(json=PERSON), max_tokens=7),
    }
    alone = {name: engine.generate(PROMPT, params)[0] for name, params in requests.items()}
    compilations: list[str] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if "backend_compile" in event:
            compilations.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for name, params in requests.items():
            engine.add_request(name, PROMPT, params)
        while engine.has_work():
            engine.step()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    together = {name: engine.pop(name) for name in requests}
    assert {name: output.token_ids for name, output in together.items()} == {
        name: output.token_ids for name, output in alone.items()
    }
    assert compilations == []
    assert matches_person(together["person"].text)
    assert together["cut"].text.startswith("{")
    assert together["cut"].completions[0].finish_reason == "length"


def test_a_grammar_that_no_expression_can_say(engine: Engine) -> None:
    """Brackets that match, however deep."""
    wanted = StructuredOutputsParams(grammar=LARK)
    output = engine.generate(PROMPT, guided(wanted, max_tokens=80, temperature=1.2, n=8, seed=1))[0]
    whole = [completion.text for completion in output.completions if completion.finish_reason == "stop"]
    assert whole
    assert any("(" in text for text in whole)
    for text in whole:
        assert re.fullmatch(r"[0-9+()]+", text)
        assert isinstance(eval(text), int)


def test_ignoring_the_end_adds_no_text(engine: Engine) -> None:
    output = engine.generate(PROMPT, guided(StructuredOutputsParams(choice=("yes",)), max_tokens=20, ignore_eos=True))
    assert (output[0].text, output[0].completions[0].finish_reason) == ("yes", "length")


def test_stop_strings_cut(engine: Engine) -> None:
    output = engine.generate(PROMPT, guided(StructuredOutputsParams(json=PERSON), stop=("kind",)))[0]
    assert output.text.endswith('"')
    assert "kind" not in output.text
    assert output.completions[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"json": {"type": "strin"}}, "strin"),
        ({"json": {"not": {"type": "string"}}}, '"not"'),
        ({"json": {"type": "string", "pattern": "("}}, "unclosed group"),
        ({"json": {"$ref": "https://example.com/x"}}, "example.com"),
        ({"json": {"enum": []}}, "empty"),
        ({"regex": "(?!a)b"}, "look-around"),
        ({"grammar": "start: b"}, 'unknown name: "b"'),
        ({"grammar": "start: start"}, "no text matches it"),
        ({"grammar": 'a: "b"'}, "start"),
        ({"grammar": ""}, "Empty grammar"),
        ({"grammar": 'a ::= "b"'}, "No 'root' rule"),
        ({"grammar": 'root ::= "b'}, "Unexpected end of input"),
        ({"grammar": "root ::= " + "(" * 4000}, "nested too deeply"),
        ({"grammar": 'root ::= "a"' + " " * MAX_EBNF_CHARS}, f"at most {MAX_EBNF_CHARS}"),
    ],
)
def test_what_cannot_be_kept_is_refused(engine: Engine, given: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError, match="structured_outputs cannot be used: ") as error:
        engine.add_request("a", PROMPT, guided(StructuredOutputsParams(**given)))
    message = str(error.value)
    assert reason in message
    assert "\n" not in message
    assert len(message) < 400
    assert not engine.has_work()


def test_what_gets_too_costly_ends_with_an_error(engine: Engine) -> None:
    output = engine.generate(PROMPT, guided(StructuredOutputsParams(regex="(x{1000}){1000}")))[0]
    assert output.completions[0].finish_reason == "error"
    assert len(output.text) < 20


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({}, "nothing"),
        ({"json_object": False}, "nothing"),
        ({"json": {}, "regex": "a"}, "json and regex"),
        ({"json": "[]"}, "no JSON object"),
        ({"json": "{"}, "no JSON"),
        ({"json": {"a": {1, 2}}}, "no JSON"),
        ({"choice": ()}, "empty"),
        ({"choice": "yes"}, "no list"),
        ({"choice": ("",)}, "no list"),
        ({"regex": 5}, "no text"),
        ({"grammar": ["x"]}, "no text"),
        ({"json": {}, "grammar": "start: "}, "json and grammar"),
        ({"regex": "a" * (MAX_GRAMMAR_CHARS + 1)}, f"at most {MAX_GRAMMAR_CHARS}"),
        ({"json": {"enum": ["a" * 100 for _ in range(1000)]}}, f"at most {MAX_GRAMMAR_CHARS}"),
    ],
)
def test_absurd_parameters_are_refused(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError, match=reason) as error:
        StructuredOutputsParams(**given)
    assert error.value.param == "structured_outputs"


def test_what_is_missing_is_named(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = StructuredOutputsParams(json_object=True)
    with pytest.raises(RequestError, match="needs a tokenizer"):
        Grammars(None, 300, (1,)).compile(wanted)
    real_import = builtins.__import__

    def no_llguidance(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "llguidance":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_llguidance)
    grammars = Grammars(engine.tokenizer, 300, (1,))
    grammars.warm_up()
    with pytest.raises(RequestError, match=re.escape("pip install 'emoe-jax[guided]'")):
        grammars.compile(wanted)


def test_the_demo_tokenizer_is_understood() -> None:
    """It puts a blank before every text, which a grammar must not see."""

    tokenizer = load_tokenizer(Path(__file__).parents[2] / "checkpoints" / "demo")
    assert tokenizer is not None
    guide = Grammars(tokenizer, 4096, (1,)).guide(guided(StructuredOutputsParams(json={"enum": ["x1"]})))
    assert guide is not None
    text: list[int] = []
    while (token := next(token for token in range(4096) if guide.allowed[token // 32] >> (token % 32) & 1)) != 1:
        text.append(token)
        guide.update([token])
    assert tokenizer.decode(text) == '"x1"'


@pytest.mark.parametrize(
    ("schema", "is_refused"),
    [
        ({"type": "integer", "multipleOf": 99_991}, False),
        ({"type": "integer", "multipleOf": 86_400}, False),
        ({"type": "integer", "multipleOf": 100_000_000}, False),
        ({"type": "number", "multipleOf": 3.14159}, False),
        ({"type": "number", "multipleOf": 0.01}, False),
        ({"enum": ['"multipleOf": 100000007']}, False),
        ({"type": "integer", "multipleOf": 100_000_007}, True),
        ({"type": "number", "multipleOf": 1234567.1}, True),
        ({"allOf": [{"type": "integer", "multipleOf": 1009}, {"multipleOf": 1013}]}, True),
        ({"properties": {"a": {"type": "integer", "multipleOf": 7e20}}}, True),
    ],
)
def test_what_would_compile_for_minutes_is_refused(engine: Engine, schema: dict[str, Any], is_refused: bool) -> None:
    for wanted in (
        StructuredOutputsParams(json=schema),
        StructuredOutputsParams(grammar="start: %json " + json.dumps(schema).replace("multipleOf", "multipl\\u0065Of")),
    ):
        if is_refused:
            with pytest.raises(RequestError, match=r"its multipleOf needs \d+ states; at most 100000 are taken"):
                engine.grammars.compile(wanted)
        else:
            engine.grammars.compile(wanted)


@pytest.mark.parametrize("line", ["\n", " \n", "a\n", "a \n\n", "-" * 50 + "\n", "\r\n", "\t"])
def test_notations_are_told_apart_in_linear_time(line: str) -> None:
    """Nothing else runs while an expression is searched. Lines of blanks took a minute, a thousand times the bound."""
    text = line * (MAX_GRAMMAR_CHARS // len(line))

    def seconds() -> float:
        began = time.process_time()
        assert EBNF_RULE.search(text) is None
        return time.process_time() - began

    assert min(seconds() for _ in range(3)) < 0.05
    assert EBNF_RULE.search(line * 20 + "\n  a-b ::= c") is not None


def test_compiling_holds_up_neither_answers_nor_other_grammars(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one grammar is being compiled, known ones are found and new ones compiled on the engine's thread."""
    began, go_on = threading.Event(), threading.Event()

    def slow(wanted: StructuredOutputsParams) -> str:
        if wanted.regex == "slow+":
            began.set()
            assert go_on.wait(60)
        return _grammar(wanted)

    monkeypatch.setattr(grammar_module, "_grammar", slow)
    known = guided(StructuredOutputsParams(choice=("known",)))
    engine.generate(PROMPT, known)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        compiling = pool.submit(engine.grammars.compile, StructuredOutputsParams(regex="slow+"))
        try:
            assert began.wait(60)
            assert engine.generate(PROMPT, known)[0].text == "known"
            assert engine.generate(PROMPT, guided(StructuredOutputsParams(choice=("new",))))[0].text == "new"
            assert engine.generate(PROMPT, PLAIN)[0].token_ids
            assert not compiling.done()
        finally:
            go_on.set()
        assert compiling.result(60) is engine.grammars.compile(StructuredOutputsParams(regex="slow+"))


@pytest.mark.parametrize("others", [1, 3 * MAX_COMPILED])
def test_a_grammar_in_use_is_never_compiled_again(engine: Engine, monkeypatch: pytest.MonkeyPatch, others: int) -> None:
    compiled: list[StructuredOutputsParams] = []
    monkeypatch.setattr(grammar_module, "_grammar", lambda wanted: compiled.append(wanted) or _grammar(wanted))
    grammars = Grammars(engine.tokenizer, 300, (1,))
    wanted = StructuredOutputsParams(regex="[ab]+")
    kept = grammars.compile(wanted)
    for index in range(others):
        grammars.compile(StructuredOutputsParams(regex=f"x{index}"))
    assert grammars.compile(StructuredOutputsParams(regex="[ab]+")) is kept
    assert compiled.count(wanted) == 1
    del kept
    for index in range(MAX_COMPILED):
        grammars.compile(StructuredOutputsParams(regex=f"y{index}"))
    grammars.compile(wanted)
    assert compiled.count(wanted) == 2
    grammars.close()


@pytest.mark.parametrize("overlap", [True, False])
def test_a_costly_mask_holds_up_its_own_sequences_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, overlap: bool
) -> None:
    """While the masks of a grammar with two sequences wait, others are answered to their ends."""
    costly, light = (
        guided(StructuredOutputsParams(regex="[c-f]{12}"), n=2),
        guided(StructuredOutputsParams(json=PERSON)),
    )
    alone = [[c.token_ids for c in engine.generate(PROMPT, params)[0].completions] for params in (costly, light, PLAIN)]
    heavy = engine.grammars.compile(costly.structured_outputs or StructuredOutputsParams(regex=""))
    computing, go_on = threading.Semaphore(0), threading.Event()
    advance = Grammar.advance

    def slow(self: Grammar, *args: Any) -> Any:
        if self is heavy:
            computing.release()
            assert go_on.wait(60)
        return advance(self, *args)

    monkeypatch.setattr(Grammar, "advance", slow)
    monkeypatch.setattr(engine.loop, "overlap", overlap)
    engine.add_request("costly", PROMPT, costly)
    try:
        while not all(completion.token_ids for completion in engine.output("costly").completions):
            engine.step()
        assert computing.acquire(timeout=60)
        engine.add_request("light", PROMPT, light)
        engine.add_request("plain", PROMPT, PLAIN)
        while not (engine.output("light").finished and engine.output("plain").finished):
            assert engine.step() is not None
        assert [len(completion.token_ids) for completion in engine.output("costly").completions] == [1, 1]
    finally:
        go_on.set()
    while engine.has_work():
        engine.step()
    together = [[c.token_ids for c in engine.pop(name).completions] for name in ("costly", "light", "plain")]
    assert together == alone


def test_a_schema_of_megabytes_is_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json, "loads", None)
    with pytest.raises(RequestError, match=f"at most {MAX_GRAMMAR_CHARS}"):
        StructuredOutputsParams(json="[" * 2_000_000)
