"""Answers of models with tools, and what they say: one case a row, (name, form, text, content, calls)."""

from typing import Any

from serve.parsing.forms import AnswerForm

HERMES, XML = AnswerForm("none", "hermes"), AnswerForm("none", "qwen-xml")
MISTRAL, HARMONY = AnswerForm("none", "mistral"), AnswerForm("harmony", "harmony")
BOTH = AnswerForm("think", "hermes")
GLM, DEEPSEEK = AnswerForm("think", "glm"), AnswerForm("none", "deepseek")

Case = tuple[str, AnswerForm, str, str, list[tuple[str, Any]]]


def call(arguments: str, name: str = "weather") -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def function(*parameters: str, name: str = "weather") -> str:
    return "\n".join((f"<tool_call>\n<function={name}>", *parameters, "</function>\n</tool_call>"))


def parameter(name: str, value: str) -> str:
    return f"<parameter={name}>\n{value}\n</parameter>"


def glm(*pairs: tuple[str, str], name: str = "weather") -> str:
    lines = [f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>" for key, value in pairs]
    return "\n".join((f"<tool_call>{name}", *lines, "</tool_call>"))


def one_deepseek(arguments: str, name: str = "weather") -> str:
    fenced = f"{name}\n```json\n{arguments}\n```"
    return f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{fenced}<｜tool▁call▁end｜>"


def bare_deepseek(arguments: str, name: str = "weather") -> str:
    """As V3.1 writes it."""
    return f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>"


def deepseek(*calls: str) -> str:
    joined = "\n".join(calls)
    return f"<｜tool▁calls▁begin｜>{joined}<｜tool▁calls▁end｜>"


def commentary(arguments: str, name: str = "weather", end: str = "<|call|>") -> str:
    return f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{arguments}{end}"


def cut(text: str) -> str:
    """The text up to the middle of the city's name."""
    return text[: text.index("Os") + 2]


OSLO = [("weather", {"city": "Oslo"})]
CITY = '{"city": "Oslo"}'
NOW = ("now", {})
NUMBERED = '<tool_call>{"name": 7, "arguments": {}}</tool_call>'
MORE_KEYS = '{"id": "a}", "n": [1, "]"], "name": "weather", "t": true, "arguments": {"city": "Oslo"}}'
IN_LIST = '{"name": "weather", "arguments": {"city": "Oslo"}}'
LOOK = "I look.<|end|><|start|>assistant"
TYPED = [("city", "7"), ("days", "7"), ("celsius", "True"), ("at", '{"x": [1]}'), ("zip", "null")]

CASES: list[Case] = [
    # JSON between tags
    ("one", HERMES, call(CITY), "", OSLO),
    ("in one line", HERMES, '<tool_call>{"name":"weather","arguments":{"city":"Oslo"}}</tool_call>', "", OSLO),
    ("behind text", HERMES, f"I look.\n{call(CITY)}", "I look.", OSLO),
    ("between texts", HERMES, f"I look.\n{call(CITY)} Done.", "I look. Done.", OSLO),
    ("before text", HERMES, f"{call(CITY)}\nDone.", "\nDone.", OSLO),
    ("parallel", HERMES, f"{call(CITY)}\n{call('{}', 'now')}\n{call(CITY)}", "", [*OSLO, NOW, *OSLO]),
    ("two in one tag", HERMES, f'<tool_call>{{"name": "now"}}\n{call(CITY)[12:]}', "", [NOW, *OSLO]),
    (
        "nested",
        HERMES,
        call('{"at": {"x": [1, {"y": "}"}], "z": {}}}'),
        "",
        [("weather", {"at": {"x": [1, {"y": "}"}], "z": {}}})],
    ),
    ("unicode", HERMES, call('{"city": "Tromsø 東京 😀"}'), "", [("weather", {"city": "Tromsø 東京 😀"})]),
    ("escapes", HERMES, call(r'{"city": "a\"b\\c\u00e9\n"}'), "", [("weather", {"city": 'a"b\\cé\n'})]),
    (
        "a tag in a string",
        HERMES,
        call('{"city": "</tool_call><tool_call>"}'),
        "",
        [("weather", {"city": "</tool_call><tool_call>"})],
    ),
    ("arguments first", HERMES, f'<tool_call>{{"arguments": {CITY}, "name": "weather"}}</tool_call>', "", OSLO),
    ("parameters", HERMES, f'<tool_call>{{"name": "weather", "parameters": {CITY}}}</tool_call>', "", OSLO),
    ("more keys", HERMES, f"<tool_call>{MORE_KEYS}</tool_call>", "", OSLO),
    ("arguments as a string", HERMES, call('"{\\"city\\": \\"Oslo\\"}"'), "", OSLO),
    ("no arguments", HERMES, '<tool_call>{"name": "now"}</tool_call>', "", [NOW]),
    ("null arguments", HERMES, call("null", "now"), "", [NOW]),
    ("a name with marks", HERMES, call('{"query": "x"}', "search-web.v2"), "", [("search-web.v2", {"query": "x"})]),
    ("no closing tag", HERMES, call(CITY).removesuffix("\n</tool_call>"), "", OSLO),
    ("no last brace", HERMES, f'<tool_call>{{"name": "weather", "arguments": {CITY}</tool_call>!', "!", OSLO),
    ("behind thoughts", BOTH, f"<think>{call(CITY)}</think>\n{call('{}', 'now')}", "", [NOW]),
    # JSON that is no call, or none that fits
    ("no JSON", HERMES, "<tool_call>now()</tool_call>", "<tool_call>now()</tool_call>", []),
    ("another tool", HERMES, call("{}", "rm"), call("{}", "rm"), []),
    ("no name", HERMES, call(CITY).replace("name", "nam"), call(CITY).replace("name", "nam"), []),
    ("a name that is no string", HERMES, NUMBERED, NUMBERED, []),
    ("a list of arguments", HERMES, call("[1]"), call("[1]"), []),
    ("single quotes", HERMES, call("{'city': 'Oslo'}"), call("{'city': 'Oslo'}"), []),
    (
        "cut before its arguments",
        HERMES,
        '<tool_call>{"name": "weather", "argu',
        '<tool_call>{"name": "weather", "argu',
        [],
    ),
    ("a tag alone", HERMES, "a <tool_call> b", "a <tool_call> b", []),
    ("a tag that is cut", HERMES, "a <tool_ca", "a <tool_ca", []),
    ("a call behind a broken one", HERMES, f"<tool_call>{{{call(CITY)}", "<tool_call>{", OSLO),
    ("arguments that are cut", HERMES, cut(call(CITY)), "", [("weather", '{"city": "Os')]),
    ("arguments that are wrong", HERMES, call('{"city": Oslo,}'), "", [("weather", '{"city": Oslo,}')]),
    ("words behind the object", HERMES, f"<tool_call>{IN_LIST} oops</tool_call>", " oops</tool_call>", OSLO),
    # Qwen3-Coder's tags
    ("xml", XML, function(parameter("city", "Oslo")), "", OSLO),
    (
        "xml of all types",
        XML,
        function(*(parameter(*each) for each in TYPED)),
        "",
        [("weather", {"city": "7", "days": 7, "celsius": True, "at": {"x": [1]}, "zip": None})],
    ),
    (
        "xml of the wrong type",
        XML,
        function(parameter("days", "many"), parameter("zip", "0123")),
        "",
        [("weather", {"days": "many", "zip": "0123"})],
    ),
    (
        "xml of several lines",
        XML,
        function(parameter("city", 'a\n\n"b" <c> é\\\n')),
        "",
        [("weather", {"city": 'a\n\n"b" <c> é\\\n'})],
    ),
    ("xml in parallel", XML, f"a {function(name='now')}\n{function(parameter('city', 'Oslo'))}", "a", [NOW, *OSLO]),
    (
        "xml with words between its tags",
        XML,
        function(parameter("city", "Oslo"), "oops", parameter("days", "7")),
        "oops",
        [("weather", {"city": "Oslo", "days": 7})],
    ),
    ("xml without a tag around", XML, function(parameter("city", "Oslo"))[12:], "", OSLO),
    ("xml that is JSON", XML, call(CITY), "", OSLO),
    ("xml of another tool", XML, function(name="rm"), function(name="rm"), []),
    ("xml that is cut", XML, cut(function(parameter("city", "Oslo"))), "", [("weather", '{"city": "Os')]),
    # GLM's tags
    ("glm", GLM, glm(("city", "Oslo")), "", OSLO),
    ("glm behind thoughts", GLM, f"<think>so</think>\nI look.\n{glm(('city', 'Oslo'))}", "I look.", OSLO),
    ("glm in parallel", GLM, f"{glm(name='now')}\n{glm(('city', 'Oslo'))}", "", [NOW, *OSLO]),
    ("glm in one line", GLM, glm(("city", "Oslo")).replace("\n", ""), "", OSLO),
    ("glm without arguments", GLM, "<tool_call>now</tool_call>", "", [NOW]),
    (
        "glm of all types",
        GLM,
        glm(*TYPED),
        "",
        [("weather", {"city": "7", "days": 7, "celsius": True, "at": {"x": [1]}, "zip": None})],
    ),
    (
        "glm of several lines",
        GLM,
        glm(("city", '\na\n"b" <c> é 東京 \\\n')),
        "",
        [("weather", {"city": '\na\n"b" <c> é 東京 \\\n'})],
    ),
    ("glm with a tag in a text", GLM, glm(("city", "</tool_call>")), "", [("weather", {"city": "</tool_call>"})]),
    ("glm of the wrong type", GLM, glm(("days", "many")), "", [("weather", {"days": "many"})]),
    (
        "glm with words between its tags",
        GLM,
        glm(("city", "Oslo"), ("days", "7")).replace("\n<arg_key>days", "oops<arg_key>zip</arg_key><arg_key>days"),
        "oops<arg_key>zip</arg_key>",
        [("weather", {"city": "Oslo", "days": 7})],
    ),
    ("glm that is JSON", GLM, call(CITY), "", OSLO),
    ("glm of another tool", GLM, glm(("city", "Oslo"), name="rm"), glm(("city", "Oslo"), name="rm"), []),
    ("glm that has no tag", GLM, "<tool_call>weather please", "<tool_call>weather please", []),
    ("glm that is cut", GLM, cut(glm(("city", "Oslo"))), "", [("weather", '{"city": "Os')]),
    ("glm that is cut in a key", GLM, "<tool_call>weather\n<arg_key>ci", "", [("weather", "")]),
    # DeepSeek
    ("deepseek", DEEPSEEK, deepseek(one_deepseek(CITY)), "", OSLO),
    ("deepseek of V3.1", DEEPSEEK, deepseek(bare_deepseek(CITY)), "", OSLO),
    (
        "deepseek in parallel",
        DEEPSEEK,
        f"I look.\n{deepseek(one_deepseek(CITY), bare_deepseek('{}', 'now'), one_deepseek(CITY))} Done.",
        "I look. Done.",
        [*OSLO, NOW, *OSLO],
    ),
    (
        "deepseek nested",
        DEEPSEEK,
        deepseek(one_deepseek('{"at": {"x": [1, "}`"]}, "city": "東京 \\u00e9"}')),
        "",
        [("weather", {"at": {"x": [1, "}`"]}, "city": "東京 é"})],
    ),
    ("deepseek without a tag around", DEEPSEEK, bare_deepseek(CITY), "", OSLO),
    ("deepseek without an end", DEEPSEEK, deepseek(one_deepseek(CITY)).partition("<｜tool▁call▁end｜>")[0], "", OSLO),
    ("deepseek of another tool", DEEPSEEK, bare_deepseek("{}", "rm"), bare_deepseek("{}", "rm"), []),
    ("deepseek without JSON", DEEPSEEK, bare_deepseek("Oslo"), bare_deepseek("Oslo"), []),
    ("deepseek that is cut", DEEPSEEK, cut(deepseek(one_deepseek(CITY))), "", [("weather", '{"city": "Os')]),
    # Mistral
    ("mistral", MISTRAL, f"[TOOL_CALLS] [{IN_LIST}]", "", OSLO),
    (
        "mistral in parallel",
        MISTRAL,
        f'x[TOOL_CALLS][{IN_LIST}, {{"name": "now", "arguments": {{}}}}]',
        "x",
        [*OSLO, NOW],
    ),
    (
        "mistral by name",
        MISTRAL,
        f"[TOOL_CALLS]weather[ARGS]{CITY}[TOOL_CALLS]now[CALL_ID]a1b2c3d4e[ARGS]{{}}",
        "",
        [*OSLO, NOW],
    ),
    ("mistral by name without a mark", MISTRAL, '[TOOL_CALLS]weather{"city": "]}"}', "", [("weather", {"city": "]}"})]),
    ("mistral that is no call", MISTRAL, "[TOOL_CALLS][]", "[TOOL_CALLS][]", []),
    ("mistral of another tool", MISTRAL, "[TOOL_CALLS]rm[ARGS]{}", "[TOOL_CALLS]rm[ARGS]{}", []),
    ("mistral that is cut", MISTRAL, f'[TOOL_CALLS][{IN_LIST}, {{"name": "no', ', {"name": "no', OSLO),
    # harmony
    ("harmony", HARMONY, commentary(CITY), "", OSLO),
    ("harmony behind thoughts", HARMONY, f"<|channel|>analysis<|message|>{LOOK}{commentary(CITY)}", "", OSLO),
    (
        "harmony behind a preamble",
        HARMONY,
        f"<|channel|>commentary<|message|>{LOOK}{commentary(CITY, end='')}",
        "I look.",
        OSLO,
    ),
    (
        "harmony with its recipient first",
        HARMONY,
        f" to=functions.weather<|channel|>commentary json<|message|>{CITY}<|call|>",
        "",
        OSLO,
    ),
    (
        "harmony in parallel",
        HARMONY,
        f"{commentary(CITY)}<|start|>assistant{commentary('{}', 'now')}",
        "",
        [*OSLO, NOW],
    ),
    ("harmony of another tool", HARMONY, commentary("{}", "rm"), "{}", []),
    ("harmony without JSON", HARMONY, commentary("Oslo"), "Oslo", []),
    ("harmony that is cut", HARMONY, commentary('{"city": "Os', end=""), "", [("weather", '{"city": "Os')]),
]
