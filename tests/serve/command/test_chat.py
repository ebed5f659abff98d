"""`emoe chat`: over a server with a fake engine, with lines from a pipe, and as it looks at a terminal."""

import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console
from rich.table import Table

from serve import emoe
from serve.command import background, chat
from serve.command.conversation import Answer, Asking, Conversation, Piece
from serve.command.screen import Plain, Terminal
from serve.command.served_state import residency_line
from serve.console import start_up_table
from serve.parsing.forms import AnswerForm
from tests.serve.conftest import running_server
from tests.serve.fake import FakeEngine, FakeTokenizer


class Served:
    """A server over a fake engine, and what was asked of it."""

    def __init__(self, client: httpx.Client, engine: FakeEngine):
        self.url = str(client.base_url)
        self.engine = engine

    def prompts(self) -> list[str]:
        return ["".join(map(chr, request["prompt"])) for request in self.engine.requests]


@pytest.fixture
def served() -> Iterator[Served]:
    engine = FakeEngine(FakeTokenizer())
    with running_server(engine, max_model_len=400) as client:
        yield Served(client, engine)


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """`typed(["Hi"], "URL", ...)`: exit status, stdout and stderr of a chat whose lines come from a pipe."""

    def run(given: Sequence[str], *arguments: str) -> tuple[int | str | None, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in given)))
        try:
            status: int | str | None = emoe.main(["chat", *arguments])
        except SystemExit as ended:
            status = ended.code
        out, err = capsys.readouterr()
        return status, out, err

    return run


def test_each_line_is_answered_and_accounted_for(served: Served, typed: Any) -> None:
    status, out, err = typed(["Hi", "", "Again"], served.url, "--max-tokens", "5")
    assert (status, err) == (0, "")
    first, account, *_ = out.splitlines()
    assert first == "abcde"
    assert account.startswith("[5 tokens · TTFT ")
    assert "· resident · substituted weight 12.50% · task conv · length]" in account
    assert served.prompts() == ["user:Hi;assistant:", "user:Hi;assistant:abcde;user:Again;assistant:"]


def test_commands_change_what_is_asked(served: Served, typed: Any) -> None:
    lines = [
        "/system Be brief",
        "/task qa",
        "/contract exact",
        "A",
        "/contract foo",
        "/reset",
        "/contract default",
        "B",
        "/quit",
        "C",
    ]
    status, out, _ = typed(lines, served.url, "--max-tokens", "2")
    assert status == 0
    assert served.prompts() == ["system:Be brief;user:A;assistant:", "system:Be brief;user:B;assistant:"]
    assert [(one["task"], one["routing"]) for one in served.engine.requests] == [("qa", "exact"), ("qa", None)]
    assert "contract: exact" in out
    assert "'foo' is no contract; there are" in out
    status, out, _ = typed(["/contrat exact", "/task"], served.url)
    assert (status, len(served.engine.requests)) == (0, 2)
    assert "'/contrat exact' is no command; there are /system TEXT" in out


def test_a_task_that_the_server_does_not_know_is_refused_at_once(typed: Any) -> None:
    engine = FakeEngine(FakeTokenizer())
    with running_server(engine, tasks=("qa", "sum")) as client:
        url = str(client.base_url)
        status, out, _ = typed(["/task sum", "/task nope", "Hi"], url, "--max-tokens", "1")
        assert (status, out.splitlines()[:2]) == (
            0,
            ["task: sum", "task is 'nope'; expected one of qa, sum, other, or auto"],
        )
        assert [request["task"] for request in engine.requests] == ["sum"]
        status, out, err = typed(["Hi"], url, "--task", "nope")
        assert (status, out) == (2, "")
        assert err == "error: --task is 'nope'; expected one of qa, sum, other\n"


def test_lines_are_wrapped_at_terminals_only(served: Served, typed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    status, out, err = typed(["x" * 500, "/help"], served.url, "--max-tokens", "1")
    refused, said = out.splitlines()
    assert (status, err) == (1, "")
    assert refused.startswith("error: ")
    assert min(len(refused), len(said)) > 60


def test_json_is_one_object_for_each_answer(served: Served, typed: Any) -> None:
    status, out, _ = typed(["Hi", "x" * 500, "/state"], served.url, "--max-tokens", "3", "--json")
    assert status == 1  # the second message is too long
    first, second = map(json.loads, out.splitlines())
    assert (first["content"], first["tokens"], first["finish_reason"]) == ("abc", 3, "length")
    assert first["emoe"]["substituted_weight"] == 0.125
    assert first["ttft_ms"] > 0
    assert "maximum context length" in second["error"]


def test_a_refused_message_leaves_the_conversation_as_it_was(served: Served, typed: Any) -> None:
    status, out, _ = typed(["x" * 500, "Hi"], served.url, "--max-tokens", "1")
    assert status == 1
    assert "error: " in out
    assert served.prompts() == ["user:Hi;assistant:"]


def test_thoughts_are_told_from_the_answer(typed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Thinking(FakeEngine):
        def _advance(self, running: Any, completion: Any, stream: Any) -> Any:
            place, text = len(completion.token_ids), "<think>so</think>yes"
            running.params = running.params
            delta = super()._advance(running, completion, stream)
            token = ord(text[place])
            completion.token_ids[-1] = token
            return delta.__class__(
                **{**vars(delta), "text": text[place], "token_ids": (token,)},
            )

    with running_server(Thinking(FakeTokenizer()), form=AnswerForm("think", "none")) as client:
        status, out, _ = typed(["Hi"], str(client.base_url), "--max-tokens", "20", "--json")
    answer = json.loads(out)
    assert (status, answer["reasoning"], answer["content"]) == (0, "so", "yes")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["http://127.0.0.1:9"], "no server answers at http://127.0.0.1:9"),
        (["{url}", "--", "--port", "1"], "flags after -- are for a server that is started"),
        (["{url}", "--routing", "fast"], "--routing is 'fast'; expected one of"),
        (["{url}", "more"], "unknown option 'more'"),
    ],
)
def test_a_mistake_is_one_line(served: Served, typed: Any, arguments: list[str], message: str) -> None:
    status, out, err = typed([], *(word.format(url=served.url) for word in arguments))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_a_key_is_asked_for(typed: Any) -> None:
    with running_server(FakeEngine(FakeTokenizer()), api_keys=["secret"]) as client:
        status, _, err = typed([], str(client.base_url))
        assert (status, "give its --api-key" in err) == (2, True)
        status, out, _ = typed(["Hi"], str(client.base_url), "--api-key", "secret", "--max-tokens", "2")
        assert (status, out.splitlines()[0]) == (0, "ab")


class TestInterruption:
    def test_ctrl_c_stops_an_answer_and_aborts_it(self, served: Served) -> None:
        class Impatient(Plain):
            def show(self, pieces: Any, line: Any) -> None:
                next(iter(pieces))
                raise KeyboardInterrupt

        served.engine.step_seconds = 0.02
        with httpx.Client(base_url=served.url) as http:
            conversation = Conversation(http, Asking(max_tokens=200))
            assert not chat.answer(conversation, Impatient(Console(file=io.StringIO())), "Hi")
            assert conversation.answer.finish_reason == "stopped"
            assert 0 < len(conversation.answer.content) < 200
            assert [message["role"] for message in conversation.messages] == ["user", "assistant"]

    def test_twice_leaves(self, served: Served) -> None:
        with httpx.Client(base_url=served.url) as http:
            conversation, screen = Conversation(http, Asking(max_tokens=1)), Plain(Console(file=io.StringIO()))
            assert chat.converse(conversation, screen, [None, "Hi", None, None, "never"]) == 130
            assert chat.converse(conversation, screen, [None, "/state", None]) == 0
        assert len(served.engine.requests) == 1


class TestTerminal:
    def test_whole_lines_stay_and_the_live_line_goes(self) -> None:
        written = io.StringIO()
        screen = Terminal(Console(file=written, force_terminal=True, width=60))

        def pieces() -> Iterator[Piece]:
            yield from (Piece("reasoning", "hm"), Piece("content", "one\ntw"))
            time.sleep(0.5)  # the line below is drawn a few times a second
            yield Piece("content", "o\x1b[31m \a!")

        screen.show(pieces(), lambda: "40% of the experts resident")
        screen.end(Answer(content="", tokens=3, finish_reason="stop"), "at the end")
        text = written.getvalue()
        assert "40% of the experts resident" in text
        assert "\x1b[31m" not in text  # what a model writes does not steer the terminal
        assert "\x1b[2;3mhm" in text
        assert [part in text for part in ("one", "two[31m !", "3 tokens", "at the end")] == [True] * 4

    def test_what_came_of_an_answer_that_is_stopped_stays(self) -> None:
        written = io.StringIO()

        def pieces() -> Iterator[Piece]:
            yield Piece("content", "one\nhalf")
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            Terminal(Console(file=written, force_terminal=True)).show(pieces(), lambda: "")
        assert written.getvalue().endswith("half\n")

    def test_the_live_line_says_what_is_resident(self) -> None:
        residency = {"share": 0.4, "coverage": 0.93, "wishes": [[1]], "loads": {"loads": 1200}, "loading": [[0, 1]]}
        line = residency_line({"residency": residency, "scheduler": {"running": 2, "waiting": 1}})
        assert line == (
            "40% of the experts resident · coverage 93.0% · 1 loading · 1,200 loads so far · 2 running, 1 waiting"
        )
        assert residency_line(None) == residency_line({"residency": {}}) == ""


def served_table() -> Table:
    memory = {"weights": 1, "slab": 2, "kv_cache": 3, "workspace": 4, "host": 0, "device": 10}
    return start_up_table(
        model="tiny", family="mixtral", routing="exact", device="cpu", memory=memory, resident=[2], num_experts=4,
        expert_format="float32", dtype="float32", has_tokenizer=True, has_chat_template=True, tasks=None, url="http://x",
    )  # fmt: skip


class TestBackground:
    def test_a_server_is_started_for_a_model_and_ends_with_the_chat(
        self, typed: Any, served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The process prints what a server prints; the answers are of another one."""
        given, popen = tmp_path / "given", subprocess.Popen
        code = f"import sys, time; print('loading'); print('Serving on {served.url}', flush=True); time.sleep(60)"
        processes = []

        def start(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
            given.write_text(json.dumps(command[3:]))
            processes.append(popen([sys.executable, "-c", code], **options))
            return processes[-1]

        monkeypatch.setattr(background.subprocess, "Popen", start)
        monkeypatch.setattr(chat, "URL", "http://127.0.0.1:9")
        status, out, err = typed(["Hi"], "some/model", "--max-tokens", "2", "--", "--expert-memory", "40%")
        assert (status, out.splitlines()[0]) == (0, "ab")
        assert "starting a server for some/model" in err
        words = json.loads(given.read_text())
        assert words[:2] == ["--model", "some/model"]
        assert words[-2:] == ["--expert-memory", "40%"]
        assert [process.poll() is not None for process in processes] == [True]

    def test_rows_of_the_servers_table_are_not_reported(self) -> None:
        written = io.StringIO()
        Console(file=written, width=200).print(served_table())
        rows = [line.strip() for line in written.getvalue().splitlines()]
        assert [line for line in rows if not background.is_of_a_table(line)] == ["eMoE-JAX"]
        assert not background.is_of_a_table("loading: weights 25% (0.5 s)")

    def test_a_server_that_does_not_start_is_one_line(
        self, typed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        popen, code = subprocess.Popen, "import sys; sys.exit('error: no such model')"
        monkeypatch.setattr(
            background.subprocess, "Popen", lambda command, **options: popen([sys.executable, "-c", code], **options)
        )
        monkeypatch.setattr(chat, "URL", "http://127.0.0.1:9")
        status, out, err = typed(["Hi"], str(tmp_path))
        assert (status, out) == (2, "")
        assert err.splitlines()[-1] == "error: the server did not start: no such model"

    def test_one_that_serves_the_model_is_used(
        self, typed: Any, served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(chat, "URL", served.url)
        status, out, err = typed(["Hi"], str(tmp_path / "fake"), "--max-tokens", "2")
        assert (status, out.splitlines()[0]) == (0, "ab")
        assert "a server runs at" in err
