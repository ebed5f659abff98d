"""What a type checker says of the keywords of `Engine.load`, and what they say at run time."""

import copy
import dataclasses
import importlib.util
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from emoe_jax import SLO, ConfigError, EmoeError, Engine, EngineConfig, RequestError, SamplingParams
from emoe_jax import StructuredOutputsParams as Structured
from emoe_jax.option_fields import options_of

ROOT = Path(__file__).parents[2]
HEAD = "from emoe_jax import Engine, EngineConfig\n"
RIGHT = [
    *(f"Engine.load('x', {one.name}={one.default!r})" for one in options_of(EngineConfig)),
    "Engine.load('x', EngineConfig(seed=3), progress=print)",
    "Engine.load('x', config=EngineConfig(), progress=print).max_model_len",
    "Engine.load('x', seed=3, progress=lambda stage, done, total: None, routing='exact')",
]
WRONG = [
    "Engine.load('x', nope=1)",
    "Engine.load('x', seeds=1)",
    "Engine.load('x', seed='three')",
    "Engine.load('x', routing='best')",
    "Engine.load(seed=3)",
    "Engine.load('x', EngineConfig(), print, 3)",
    "Engine.load('x', 3).nope",
]


@pytest.mark.skipif(importlib.util.find_spec("pyright") is None, reason="needs pyright (the extra dev)")
def test_a_type_checker_knows_exactly_the_fields_of_the_configuration(tmp_path: Path) -> None:
    source = tmp_path / "calls.py"
    source.write_text(HEAD + "\n".join([*RIGHT, *WRONG]) + "\n")
    settings = {"include": [str(source)], "extraPaths": [str(ROOT)], "pythonVersion": "3.11"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(tmp_path)]
    answer = json.loads(subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path).stdout)
    found = {one["range"]["start"]["line"] for one in answer["generalDiagnostics"] if one["severity"] == "error"}
    first_wrong = HEAD.count("\n") + len(RIGHT)
    assert found == set(range(first_wrong, first_wrong + len(WRONG)))


def _load(**options: Any) -> Engine:
    return Engine.load("/nonexistent", **options)


@pytest.mark.parametrize(
    ("make", "error", "whole", "wrong", "right"),
    [
        (EngineConfig, ConfigError, "unknown option", "max_num_sequences", "max_num_seqs"),
        (EngineConfig, ConfigError, "unknown option", "nope", ""),
        (_load, ConfigError, "unknown option", "expert_mem", "expert_memory"),
        (SamplingParams, RequestError, "SamplingParams has no parameter", "max_token", "max_tokens"),
        (SamplingParams, RequestError, "SamplingParams has no parameter", "foo", ""),
        (SLO, RequestError, "SLO has no parameter", "ttft", "ttft_ms"),
        (Structured, RequestError, "StructuredOutputsParams has no parameter", "choices", "choice"),
    ],
)
def test_an_unknown_name_is_told_the_nearest_one(
    make: Any, error: type[EmoeError], whole: str, wrong: str, right: str
) -> None:
    with pytest.raises(error) as caught:
        make(**{wrong: 1})
    assert str(caught.value).startswith(f"{whole} {wrong!r}; the nearest known one is '{right}")
    assert "\n" not in str(caught.value)
    assert getattr(caught.value, "param", wrong) == wrong


@pytest.mark.parametrize("made", [EngineConfig(seed=3), SamplingParams(max_tokens=3, stop=("x",)), SLO(ttft_ms=3)])
def test_parameters_are_copied_and_replaced_as_before(made: Any) -> None:
    assert pickle.loads(pickle.dumps(made)) == copy.copy(made) == copy.deepcopy(made) == made
    assert dataclasses.replace(made) == made
    with pytest.raises(EmoeError, match="'nope'"):
        dataclasses.replace(made, nope=1)
