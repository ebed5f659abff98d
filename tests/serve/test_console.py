"""The table that a server prints when it starts."""

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from emoe_jax.engine_config import StepSize
from serve.console import loading_progress, start_up_table
from serve.parsing.forms import AnswerForm

GIB = 2**30


def test_a_long_stage_speaks_every_ten_seconds_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    output = io.StringIO()
    with loading_progress(Console(file=output, width=120)) as report:
        for done, seconds in enumerate([1.0, 2.0, 10.9, 11.0, 20.9, 22.0, 23.0]):
            now = seconds
            report("compile", done, 12)
    lines = output.getvalue().splitlines()
    assert lines == [
        f"loading: compile {share}" for share in ("0% (1.0 s)", "25% (11.0 s)", "42% (22.0 s)", "50% (23.0 s)")
    ]


@pytest.mark.parametrize(("host", "shown"), [(0, False), (90 * GIB, True)])
def test_host_memory_is_named_where_there_is_any(host: int, shown: bool) -> None:
    table = start_up_table(
        model="[tiny]",
        family="mixtral",
        routing="resident",
        device="cpu",
        memory={"device": 16 * GIB, "weights": GIB, "slab": 2 * GIB, "kv_cache": GIB, "workspace": GIB, "host": host},
        resident=[3, 4],
        num_experts=8,
        expert_format="mxfp4",
        dtype="bfloat16",
        has_tokenizer=True,
        has_chat_template=True,
        tasks=None,
        url="http://127.0.0.1:8000",
        step=StepSize(16, 512),
    )
    output = io.StringIO()
    Console(file=output, width=120).print(table)
    text = output.getvalue()
    assert ("host RAM for experts off the device" in text) == shown
    assert "CPU, 16 GiB of host RAM" in text
    assert "[tiny] (mixtral)" in text
    assert "up to 16 sequences and 512 tokens" in text
    assert re.search(r"experts kept in +│ mxfp4, all else in bfloat16", text)
    assert "3 to 4 of 8 in each of 2 layers (44%)" in text


@pytest.mark.parametrize(
    ("found", "shown"),
    [
        ({}, "predictor +│ none, so residency follows what routers choose"),
        ({"predictor": "/m/[x]/predictor"}, r"predictor +│ /m/\[x\]/predictor"),
        (
            {"shows_tools": False},
            "tools +│ the chat template does not show them: tools are refused, but for forced calls",
        ),
        ({"kernels": "default"}, "MoE kernels +│ default tile sizes; `emoe bench kernels` chooses those"),
        ({"kernels": Path("/c/h100.json")}, "MoE kernels +│ tile sizes measured on this device: /c/h100.json"),
    ],
)
def test_what_was_learned_for_this_model_and_device_is_named(found: dict[str, Any], shown: str) -> None:
    table = start_up_table(
        model="m",
        family="mixtral",
        routing="resident",
        device="cpu",
        memory={"device": GIB, "weights": GIB, "slab": GIB, "kv_cache": GIB, "workspace": GIB, "host": 0},
        resident=[3],
        num_experts=8,
        expert_format="float32",
        dtype="float32",
        has_tokenizer=True,
        has_chat_template=True,
        tasks=None,
        url="http://127.0.0.1:8000",
        **found,
    )
    output = io.StringIO()
    Console(file=output, width=160).print(table)
    assert re.search(shown, output.getvalue())
    assert ("MoE kernels" in output.getvalue()) == ("kernels" in found)


def test_pool_and_form_of_answers_are_named_where_there_are_any() -> None:
    given = {"device": 72 * GIB, "weights": GIB, "slab": GIB, "kv_cache": GIB, "workspace": GIB, "host": 0}
    for share, form, shown in ((0.9, AnswerForm("think", "hermes"), True), (None, AnswerForm(), False)):
        table = start_up_table(
            model="m",
            family="mixtral",
            routing="resident",
            device="NVIDIA H100",
            memory=given,
            resident=[3],
            num_experts=8,
            expert_format="float32",
            dtype="float32",
            has_tokenizer=True,
            has_chat_template=True,
            tasks=None,
            url="http://127.0.0.1:8000",
            pool_share=share,
            form=form,
        )
        output = io.StringIO()
        Console(file=output, width=120).print(table)
        assert ("90% of the card (XLA_CLIENT_MEM_FRACTION)" in output.getvalue()) == shown
        assert ("thoughts are told by: think; calls of tools by: hermes" in output.getvalue()) == shown
