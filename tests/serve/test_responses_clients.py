"""Official SDKs and agent frameworks: whole conversations with calls of tools, over OpenAI's and Anthropic's APIs."""

import asyncio
import importlib
import importlib.util
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from serve.parsing.forms import AnswerForm
from tests.serve.conftest import StartServer
from tests.serve.fake import FakeTokenizer
from tests.serve.scripted import ScriptedEngine

pytestmark = pytest.mark.filterwarnings("ignore")  # what clients deprecate is theirs

CALLS = (
    "<think>Two of them</think>I look.\n"
    '<tool_call>{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}</tool_call>'
    '<tool_call>{"name": "weather", "arguments": {"city": "Rome", "days": 3}}</tool_call>'
)
ANSWER = "<think>All is well</think>Sun in both."
CITIES = [("Oslo", 2), ("Rome", 3)]
FORM = AnswerForm("think", "hermes")
SCHEMA: Any = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city", "days"],
}
TOOL: Any = {"type": "function", "name": "weather", "description": "It knows.", "parameters": SCHEMA}
ASKED = "weather();user:hi;assistant:"
AFTER_CALLS = "weather();user:hi;assistant:I look.;tool:sun in Oslo;tool:sun in Rome;assistant:"


class Caller(ScriptedEngine):
    """Calls tools until their results are there."""

    def __init__(self) -> None:
        super().__init__("")

    def add_request(self, request_id: str, prompt: Any, *args: Any, **kwargs: Any) -> list[int]:
        self.says = ANSWER if "tool:" in FakeTokenizer().decode(prompt) else CALLS
        return super().add_request(request_id, prompt, *args, **kwargs)

    def prompts(self) -> list[str]:
        """Those of all requests so far, which are forgotten."""
        prompts = [FakeTokenizer().decode(request["prompt"]) for request in self.requests]
        self.requests.clear()
        return prompts


class Verdict(BaseModel):
    """Whether all is well."""

    ok: bool


class Asked:
    """A tool that remembers what it was asked."""

    def __init__(self) -> None:
        self.cities: list[tuple[str, int]] = []

    def weather(self, city: str, days: int) -> str:
        """It knows."""
        self.cities.append((city, days))
        return f"sun in {city}"


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason="needs the clients extra")


@pytest.fixture
def served(start_server: StartServer) -> Iterator[tuple[str, Caller]]:
    """The address of a server, and its engine."""
    engine = Caller()
    with start_server(engine, form=FORM, max_model_len=1000) as client:
        yield str(client.base_url), engine


@pytest.fixture
def client(served: tuple[str, Caller]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served[0]}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stateful", [False, True])
def test_openai_calls_tools(client: openai.OpenAI, served: tuple[str, Caller], stream: bool, stateful: bool) -> None:
    def ask(**body: Any) -> Any:
        if not stream:
            return client.responses.create(model="fake", tools=[TOOL], **body)
        with client.responses.stream(model="fake", tools=[TOOL], **body) as events:
            kinds = [event.type for event in events]
            assert kinds[-1] == "response.completed"
            return events.get_final_response()

    first = ask(input="hi", store=stateful)
    assert [item.type for item in first.output] == ["reasoning", "message", "function_call", "function_call"]
    assert first.output[0].content[0].text == "Two of them"
    assert first.output_text == "I look."
    calls = [item for item in first.output if item.type == "function_call"]
    arguments = [json.loads(call.arguments) for call in calls]
    assert [(each["city"], each["days"]) for each in arguments] == CITIES
    results: list[Any] = [
        {"type": "function_call_output", "call_id": call.call_id, "output": f"sun in {each['city']}"}
        for call, each in zip(calls, arguments, strict=True)
    ]
    if stateful:
        second = ask(input=results, previous_response_id=first.id)
    else:
        history = [{"role": "user", "content": "hi"}, *(item.to_dict() for item in first.output), *results]
        second = ask(input=history, store=False)
    assert (second.output_text, second.status) == ("Sun in both.", "completed")
    assert second.usage is not None
    assert second.usage.output_tokens_details.reasoning_tokens == len("<think>All is well</think>")
    assert served[1].prompts() == [ASKED, AFTER_CALLS]
    if stateful:
        assert client.responses.retrieve(second.id).output_text == "Sun in both."
        items = client.responses.input_items.list(second.id, order="asc", limit=3)
        assert [item.type for item in items] == [
            "message",
            *[each.type for each in first.output],
            *["function_call_output"] * 2,
        ]
        client.responses.delete(second.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(second.id)


def test_openai_parses(start_server: StartServer) -> None:
    with (
        start_server(ScriptedEngine('{"ok": true}')) as server,
        openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0) as client,
    ):
        parsed = client.responses.parse(model="fake", input="hi", text_format=Verdict)
        assert parsed.output_parsed == Verdict(ok=True)
        with client.responses.stream(model="fake", input="hi", text_format=Verdict) as events:
            texts = [event.delta for event in events if event.type == "response.output_text.delta"]
            assert "".join(texts) == '{"ok": true}'
            assert events.get_final_response().output_parsed == Verdict(ok=True)


def test_openai_understands_refusals(client: openai.OpenAI) -> None:
    web: Any = {"type": "web_search"}
    with pytest.raises(openai.BadRequestError, match="runs no tools itself; expected 'function'") as refusal:
        client.responses.create(model="fake", input="hi", tools=[web])
    assert refusal.value.param == "tools[0].type"
    with pytest.raises(openai.BadRequestError) as lost:
        client.responses.create(model="fake", input="hi", previous_response_id="resp_x")
    assert lost.value.code == "previous_response_not_found"
    response = client.responses.create(model="fake", input="hi")
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.cancel(response.id)


@needs("anthropic")
@pytest.mark.parametrize("stream", [False, True])
def test_anthropic_calls_tools(served: tuple[str, Caller], stream: bool) -> None:
    anthropic: Any = importlib.import_module("anthropic")
    url, engine = served
    tools = [{"name": "weather", "description": "It knows.", "input_schema": SCHEMA}]
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:

        def ask(messages: list[Any]) -> Any:
            body = {"model": "fake", "max_tokens": 500, "messages": messages, "tools": tools}
            if not stream:
                return client.messages.create(**body)
            with client.messages.stream(**body) as events:
                text = "".join(events.text_stream)
                message = events.get_final_message()
            assert text == "".join(block.text for block in message.content if block.type == "text")
            return message

        hello: list[Any] = [{"role": "user", "content": "hi"}]
        first = ask(hello)
        assert [block.type for block in first.content] == ["thinking", "text", "tool_use", "tool_use"]
        assert first.stop_reason == "tool_use"
        uses = [block for block in first.content if block.type == "tool_use"]
        assert [(use.input["city"], use.input["days"]) for use in uses] == CITIES
        results = [
            {"type": "tool_result", "tool_use_id": use.id, "content": f"sun in {use.input['city']}"} for use in uses
        ]
        history = [*hello, {"role": "assistant", "content": first.content}, {"role": "user", "content": results}]
        second = ask(history)
        assert [block.text for block in second.content if block.type == "text"] == ["Sun in both."]
        assert engine.prompts() == [ASKED, AFTER_CALLS]
        counted = client.messages.count_tokens(model="fake", messages=history, tools=tools)
        assert counted.input_tokens == len(AFTER_CALLS)
        with pytest.raises(anthropic.NotFoundError):
            client.messages.create(model="other", max_tokens=5, messages=hello)


@needs("pydantic_ai")
@pytest.mark.parametrize("api", ["OpenAIResponsesModel", "OpenAIChatModel"])
def test_pydantic_ai_runs_an_agent(served: tuple[str, Caller], api: str) -> None:
    library: Any = importlib.import_module("pydantic_ai")
    models: Any = importlib.import_module("pydantic_ai.models.openai")
    providers: Any = importlib.import_module("pydantic_ai.providers.openai")
    url, engine = served
    asked = Asked()

    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            model = getattr(models, api)("fake", provider=providers.OpenAIProvider(openai_client=client))
            agent = library.Agent(model, tools=[library.Tool(asked.weather, sequential=True)])
            result = await agent.run("hi")
            assert result.output == "Sun in both."
            async with agent.run_stream("hi") as streamed:
                assert await streamed.get_output() is not None
            again = await agent.run("and then?", message_history=result.all_messages())
            assert again.output == "Sun in both."

    asyncio.run(run())
    assert asked.cities[:2] == CITIES
    prompts = engine.prompts()
    assert prompts[:2] == [ASKED, AFTER_CALLS]
    assert prompts[-1].endswith("assistant:Sun in both.;user:and then?;assistant:")


@needs("langgraph")
@pytest.mark.parametrize("responses", [True, False])
def test_langgraph_runs_an_agent(served: tuple[str, Caller], responses: bool) -> None:
    langchain: Any = importlib.import_module("langchain_openai")
    prebuilt: Any = importlib.import_module("langgraph.prebuilt")
    url, engine = served
    asked = Asked()
    chat = langchain.ChatOpenAI(
        model="fake", base_url=f"{url}/v1", api_key="none", max_retries=0, use_responses_api=responses
    )
    agent = prebuilt.create_react_agent(chat, [asked.weather])
    hello = {"messages": [("user", "hi")]}
    whole = agent.invoke(hello)["messages"][-1]
    assert whole.text == "Sun in both."
    assert sorted(asked.cities) == CITIES  # tools run side by side
    assert engine.prompts() == [ASKED, AFTER_CALLS]
    pieces = [piece for piece, _ in agent.stream(hello, stream_mode="messages") if piece.type == "AIMessageChunk"]
    assert "".join(piece.text for piece in pieces) == "I look.Sun in both."
    assert sorted(asked.cities) == sorted(CITIES * 2)
    assert engine.prompts() == [ASKED, AFTER_CALLS]
