"""Clients that others wrote, against answers with thoughts and calls of tools."""

import importlib
import importlib.util
import json
import multiprocessing
import os
from typing import Any

import openai
import pytest

from serve.parsing.forms import AnswerForm
from tests.serve.conftest import StartServer
from tests.serve.scripted import ScriptedEngine

pytestmark = pytest.mark.filterwarnings("ignore")  # what clients deprecate is theirs

SAYS = (
    "<think>Oslo it is</think>I look.\n"
    '<tool_call>{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}</tool_call>'
    '<tool_call>{"name": "weather", "arguments": {"city": "Rome", "days": 3}}</tool_call>'
)
ARGUMENTS = [{"city": "Oslo", "days": 2}, {"city": "Rome", "days": 3}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
TOOLS: Any = [{"type": "function", "function": {"name": "weather", "description": "It knows.", "parameters": SCHEMA}}]
FORM = AnswerForm("think", "hermes")


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason="needs the clients extra")


def test_openai_streams_calls(start_server: StartServer) -> None:
    asked: Any = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "tools": TOOLS}
    with (
        start_server(ScriptedEngine(SAYS), form=FORM, max_model_len=1000) as server,
        openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0) as client,
        client.chat.completions.stream(**asked) as stream,
    ):
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        choice = stream.get_final_completion().choices[0]
    assert [json.loads(event.arguments) for event in done] == ARGUMENTS
    assert [json.loads(call.function.arguments) for call in choice.message.tool_calls or ()] == ARGUMENTS
    assert (choice.message.content, choice.finish_reason) == ("I look.", "tool_calls")
    assert (choice.message.model_extra or {})["reasoning_content"] == "Oslo it is"


@needs("langchain_openai")
def test_langchain_binds_tools(start_server: StartServer) -> None:
    langchain: Any = importlib.import_module("langchain_openai")
    messages: Any = importlib.import_module("langchain_core.messages")
    engine = ScriptedEngine(SAYS)
    with start_server(engine, form=FORM, max_model_len=1000) as server:
        chat = langchain.ChatOpenAI(model="fake", base_url=f"{server.base_url}/v1", api_key="none", max_retries=0)
        bound = chat.bind_tools(TOOLS)
        whole = bound.invoke("hi")
        assert [call["args"] for call in whole.tool_calls] == ARGUMENTS
        assert [call["args"] for call in _sum(bound.stream("hi")).tool_calls] == ARGUMENTS
        results = [messages.ToolMessage("sunny", tool_call_id=call["id"]) for call in whole.tool_calls]
        assert bound.invoke([messages.HumanMessage("hi"), whole, *results]).tool_calls
        assert engine.tokenizer is not None
        prompt = engine.tokenizer.decode(engine.requests[-1]["prompt"])
        assert prompt == "weather();user:hi;assistant:I look.;tool:sunny;tool:sunny;assistant:"


def _sum(chunks: Any) -> Any:
    first, *rest = chunks
    for chunk in rest:
        first += chunk
    return first


@needs("litellm")
def test_litellm_speaks_anthropics_api(start_server: StartServer) -> None:
    """In a process of its own, as it keeps sockets and an event loop to the end."""
    with start_server(ScriptedEngine(SAYS), form=FORM, max_model_len=1000, api_keys=["secret"]) as server:
        process = multiprocessing.get_context("spawn").Process(target=_use_litellm, args=(str(server.base_url),))
        process.start()
        process.join()
        assert process.exitcode == 0


def _use_litellm(url: str) -> None:
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it looks for one on the internet
    litellm: Any = importlib.import_module("litellm")
    ask: Any = {"model": "anthropic/fake", "api_base": url, "api_key": "secret", "max_retries": 0, "max_tokens": 400}
    ask |= {"messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}], "tools": TOOLS}
    choice = litellm.completion(**ask).choices[0]
    chunks = list(litellm.completion(**ask, stream=True))
    streamed = litellm.stream_chunk_builder(chunks, messages=ask["messages"]).choices[0]
    for message in (choice.message, streamed.message):
        assert [json.loads(call.function.arguments) for call in message.tool_calls] == ARGUMENTS
        assert (message.content, message.reasoning_content) == ("I look.", "Oslo it is")
    assert choice.finish_reason == streamed.finish_reason == "tool_calls"
    results = [{"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in choice.message.tool_calls]
    again = {**ask, "messages": [*ask["messages"], choice.message.model_dump(), *results]}
    assert litellm.completion(**again).choices[0].message.tool_calls
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**{**ask, "model": "anthropic/other"})
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(**{**ask, "api_key": "wrong"})
