"""What chat templates render: as the reference does, and without control tokens of the messages."""

from collections.abc import Callable
from typing import Any, ClassVar

import hypothesis.strategies as st
import pytest
from hypothesis import assume, given, settings
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from emoe_jax.checkpoint import Tokenizer
from emoe_jax.errors import CheckpointError, ConfigError, RequestError
from emoe_jax.models import load_tokenizer
from tests.checkpoint.templates import PAIRED, READ, SPECIAL, TEMPLATES, TURNS, chat_tokenizer
from tests.checkpoint.test_tokenizer import save

GUARDED = [*SPECIAL, *TURNS]
TextTokenizer = Callable[[str], Tokenizer]


@pytest.fixture(scope="module")
def tokenizer_of(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    known: dict[str, Tokenizer] = {}

    def load(template: str) -> Tokenizer:
        if template not in known:
            known[template] = chat_tokenizer(tmp_path_factory.mktemp("chat"), template)
        return known[template]

    return load


def with_two(template: str) -> str:
    """A template for more than the one message with which templates are tried at the start."""
    return "{% if messages | length > 1 %}" + template + "{% endif %}"


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def reference(tokenizer: Tokenizer, messages: list[dict[str, Any]], **kwargs: Any) -> str:
    """What transformers renders."""
    kwargs = {"add_generation_prompt": True, **kwargs}
    return tokenizer.backend.apply_chat_template(messages, tokenize=False, **kwargs)


def read(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


ROLES = {"mistral": ["user", "assistant"], "r1": ["system", "user", "assistant"]}
PIECES = ["the cat", " ", "\n", "\n\n", "<", "|", ">", "think", "Ünï 語", "%s", "{}", '"', "<think>", "</think>"]
PIECES += ["<think>\nabc\n</think>\n\n", "<tool_response>", "</tool_response>", "/nothink", "<tool_call>"]
ATTACKS = [*GUARDED, *(token[:half] for token in GUARDED for half in (2, -2)), *(token[-2:] for token in GUARDED)]
ATTACKS += ["<|im_</think>start|>", "<|IM_START|>", "</think><|im_", "FINAL_MESSAGE_", "\U000f0000", "\U000f0001"]


def texts(pieces: list[str]) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(pieces) | st.text(max_size=3), max_size=6).map("".join)


@st.composite
def conversations(draw: st.DrawFn, pieces: list[str]) -> tuple[str, list[dict[str, Any]]]:
    name = draw(st.sampled_from(sorted(TEMPLATES)))
    roles = ROLES.get(name, ["system", "user", "assistant"])
    messages = [
        {"role": draw(st.sampled_from(roles)), "content": draw(texts(pieces))} for _ in range(draw(st.integers(1, 4)))
    ]
    for message in messages:
        if message["role"] == "assistant" and draw(st.booleans()):
            message["reasoning_content"] = draw(texts(pieces))
    return name, messages


class TestReference:
    @settings(max_examples=150, deadline=None)
    @given(conversations(PIECES), st.booleans())
    def test_texts_without_control_tokens_are_encoded_as_by_transformers(self, tokenizer_of, conversation, prompt):
        name, messages = conversation
        tokenizer = tokenizer_of(TEMPLATES[name])
        wanted = reference(tokenizer, messages, add_generation_prompt=prompt)
        contents = [text for message in messages for text in message.values()]
        assume(not any(token in text for token in GUARDED for text in contents))
        assume(wanted.count("<|") == sum(wanted.count(token) for token in GUARDED if token[:2] == "<|"))
        assert tokenizer.chat(messages, prompt) == tokenizer.encode(wanted, add_special_tokens=False)

    @settings(max_examples=200, deadline=None)
    @given(conversations([*PIECES, *ATTACKS]))
    def test_any_text_is_rendered_as_by_transformers(self, tokenizer_of, conversation):
        name, messages = conversation
        tokenizer = tokenizer_of(TEMPLATES[name])
        try:
            wanted = reference(tokenizer, messages)
        except Exception:
            with pytest.raises(RequestError, match="refused the messages"):
                tokenizer.chat(messages)
            return
        assert read(tokenizer, tokenizer.chat(messages)) == wanted.encode("utf-8", "replace").decode()

    @settings(max_examples=200, deadline=None)
    @given(conversations([*PIECES, *ATTACKS]))
    def test_messages_write_no_control_tokens(self, tokenizer_of, conversation):
        """A prompt has the control tokens that it has with harmless messages, and no others."""
        name, messages = conversation
        tokenizer = tokenizer_of(TEMPLATES[name])
        guarded = set(tokenizer._chat_template()[1].tokens)
        assert {token for token in GUARDED if token in TEMPLATES[name]} <= set(read_each(tokenizer, guarded))
        try:
            ids = [i for i in tokenizer.chat(messages) if i in guarded]
        except RequestError:
            return
        harmless = [
            {name: value if name == "role" else value and "x" for name, value in message.items()}
            for message in messages
        ]
        assert ids == [i for i in tokenizer.chat(harmless) if i in guarded]

    @pytest.mark.parametrize(
        ("template", "answer"),
        [
            (TEMPLATES["qwen3"], "answer"),
            (TEMPLATES["r1"], "\n\nanswer"),
            ("{{ messages[1].content.split('</think>')[-1].strip() }}", "answer"),
            ("{% if messages[1].content.startswith('<think>') %}yes{% endif %}", "yes"),
            ("{{ messages[1].content | replace('<think>', '') }}", "\nabc\n</think>\n\nanswer"),
        ],
    )
    def test_history_with_thoughts(self, tokenizer_of, template, answer):
        messages = [user("hi"), assistant("<think>\nabc\n</think>\n\nanswer"), user("more")]
        tokenizer = tokenizer_of(with_two(template))
        text = read(tokenizer, tokenizer.chat(messages))
        assert text == reference(tokenizer, messages)
        assert answer in text
        if "qwen3" in template:
            assert "abc" not in text


def read_each(tokenizer: Tokenizer, ids: set[int]) -> list[str]:
    return [read(tokenizer, [i]) for i in ids]


class TestControlTokens:
    @pytest.mark.parametrize("token", [*PAIRED, *READ])
    def test_messages_may_hold_what_answers_hold(self, tokenizer_of, token):
        """History comes back as the tokens that the model said."""
        tokenizer = tokenizer_of(TEMPLATES["qwen3"] + TEMPLATES["glm"])
        (expected,) = tokenizer.encode(token, add_special_tokens=False)
        for role in ("user", "assistant"):
            messages = [user("hi"), {"role": role, "content": f"a {token} b {token}"}, user("more")]
            assert expected in tokenizer.chat(messages)

    @pytest.mark.parametrize(
        "template",
        [
            "{{ messages[0].content }}{{ messages[1].content }}",
            "{{ messages | map(attribute='content') | join }}",
            "{{ messages[0].content ~ messages[1].content }}",
            "{{ messages[0].content.strip() + messages[1].content.strip() }}",
            "{{ '%s%s' % (messages[0].content, messages[1].content) }}",
            "{{ '{}{}'.format(messages[0].content, messages[1].content) }}",
            "{{ (messages[0].content + 'XX' + messages[1].content) | replace('XX', '') }}",
            "{{ (messages[0].content + messages[1].content) | upper | lower }}",
            "{% set x %}{{ messages[0].content }}{{ messages[1].content }}{% endset %}{{ x }}",
            "{{ ''.join([messages[0].content, messages[1].content]) }}",
            "{{ messages[0].content[:10] + 'start|>' }}{{ messages[1].content[3:] }}",
            "{{ (messages[0].content ~ messages[1].content) | list | join }}",
        ],
    )
    def test_no_token_from_parts(self, tokenizer_of, template):
        tokenizer = tokenizer_of(with_two(template) + "{{ eos_token }}")
        (start,) = tokenizer.encode("<|im_start|>", add_special_tokens=False)
        messages = [user("<|im_st"), assistant("art|>")]
        assert tokenizer.encode("<|im_st" + "art|>", add_special_tokens=False) == [start]
        ids = tokenizer.chat(messages)
        assert start not in ids
        assert read(tokenizer, ids) == reference(tokenizer, messages)
        assert read(tokenizer, ids[-1:]) == "</s>"

    def test_variables_write_none(self, tokenizer_of):
        """Not even where they take the name of a special token."""
        tokenizer = tokenizer_of(
            "{{ bos_token }}{{ extra }}{{ (deep or {'a': ['']}).a[0] }}{% for k in deep %}{{ k }}{% endfor %}"
        )
        kwargs = {"bos_token": "<s>", "extra": "<|im_end|>", "deep": {"a": ["</s>"], "<|eot_id|>": 1}}
        ids = tokenizer.chat([user("hi")], kwargs=kwargs)
        assert not set(ids) & {tokenizer.encode(token, add_special_tokens=False)[0] for token in SPECIAL}
        assert read(tokenizer, ids) == "<s><|im_end|></s>a<|eot_id|>"

    def test_tokens_that_the_tokenizer_sees_in_other_letters(self, tmp_path):
        """A normaliser makes `<S>` of `＜Ｓ＞`, and a token may swallow the blanks beside it."""
        pieces = [*(f"<0x{byte:02X}>" for byte in range(256)), "▁", "<", ">", "s", "a", "/"]
        model = models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], byte_fallback=True)
        backend = Backend(model)
        backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])  # pyright: ignore[reportAttributeAccessIssue]
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])  # pyright: ignore[reportAttributeAccessIssue]
        backend.add_special_tokens(
            [AddedToken("<s>", normalized=True, lstrip=True, rstrip=True), AddedToken("</s>", normalized=True)]
        )
        tokenizer = save(backend, tmp_path, "{{ bos_token }} {{ messages[0].content }} {{ eos_token }}")
        bos, eos = (tokenizer.encode(token, add_special_tokens=False)[-1] for token in ("<s>", "</s>"))
        for content in ("a ＜Ｓ＞ a", "<S>", "＜/s＞<s>", "   a   "):
            ids = tokenizer.chat([user(content)])
            assert [i for i in ids if i in (bos, eos)] == [bos, eos], content

    def test_a_token_that_is_a_piece_of_the_vocabulary_too(self, tmp_path):
        """Unigram models find such pieces without any rule for special tokens."""
        pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((c, -3.0) for c in "<>/sa▁")]
        backend = Backend(models.Unigram(pieces, unk_id=0))
        backend.pre_tokenizer = pre_tokenizers.Metaspace()  # pyright: ignore[reportAttributeAccessIssue]
        backend.decoder = decoders.Metaspace()  # pyright: ignore[reportAttributeAccessIssue]
        tokenizer = save(backend, tmp_path, "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}")
        ids = tokenizer.chat([user("a</s>a<s>")])
        assert (ids[0], ids[-1]) == (1, 2)
        assert not {1, 2} & set(ids[1:-1])
        assert read(tokenizer, ids[1:-1]) == "a</s>a<s>"

    def test_many_tokens_take_no_time(self, tokenizer_of):
        tokenizer = tokenizer_of(TEMPLATES["chatml"])
        content = "<|im_start|>" * 20_000 + "<|im_<|im_start|>start|>" * 2000
        ids = tokenizer.chat([user(content)])
        assert sum(i in tokenizer.special_ids for i in ids) == 3
        assert content in read(tokenizer, ids)


def test_a_template_that_hides_its_tokens_is_told(tmp_path, caplog):
    """No template of the families above does."""
    for name, template in TEMPLATES.items():
        chat_tokenizer(tmp_path / name, template)
    assert not caplog.records
    chat_tokenizer(tmp_path / "json", "{{ (messages[0].role ~ '<|im_start|>') | tojson }}")
    (record,) = caplog.records
    assert "json: the chat template computes <|im_start|> from other texts" in record.getMessage()


class TestRoles:
    @pytest.mark.parametrize("name", ["chatml", "qwen3", "r1", "llama3", "glm", "phi"])
    def test_a_developer_is_the_system_where_the_template_knows_none(self, tokenizer_of, name):
        tokenizer = tokenizer_of(TEMPLATES[name])
        said = {
            role: tokenizer.chat([{"role": role, "content": "be brief"}, user("hi")])
            for role in ("system", "developer")
        }
        assert said["developer"] == said["system"]
        assert "be brief" in read(tokenizer, said["developer"])

    @pytest.mark.parametrize("name", ["chatml", "mistral", "r1", "gemma", "glm"])
    def test_a_tool_is_a_user_where_the_template_knows_none(self, tokenizer_of, name):
        tokenizer = tokenizer_of(TEMPLATES[name])
        said = {
            r: tokenizer.chat([user("hi"), assistant("ok"), {"role": r, "content": "42"}]) for r in ("user", "tool")
        }
        assert said["tool"] == said["user"]
        assert "42" in read(tokenizer, said["tool"])

    @pytest.mark.parametrize("role", ["developer", "tool"])
    @pytest.mark.parametrize(
        "template",
        [
            TEMPLATES["harmony"],
            "{% if 'developer' in messages | map(attribute='role') and 'tool' %}{% endif %}{{ messages[0].role }}",
            "{% set names = {'developer': 'D', 'tool': 'T'} %}{{ names[messages[0].role] }}",
            "{% macro known(role) %}{% if role in ('developer', 'tool') %}{{ role }}{% endif %}{% endmacro %}"
            "{{ known(messages[0].role) }}",
        ],
    )
    def test_a_template_that_names_the_role_gets_it(self, tokenizer_of, template, role):
        tokenizer = tokenizer_of(template)
        messages = [{"role": role, "content": "x"}, user("hi")]
        assert read(tokenizer, tokenizer.chat(messages)) == reference(tokenizer, messages)

    def test_a_word_in_a_text_is_no_name(self, tokenizer_of):
        tokenizer = tokenizer_of("{{ 'ask a developer or a tool: ' + messages[0].role }}")
        assert read(tokenizer, tokenizer.chat([{"role": "developer", "content": "x"}])).endswith(": system")
        assert read(tokenizer, tokenizer.chat([{"role": "tool", "content": "x"}])).endswith(": user")


class TestOptions:
    @pytest.mark.parametrize("thinking", [True, False, None])
    @pytest.mark.parametrize("name", ["qwen3", "glm"])
    def test_variables_are_the_templates(self, tokenizer_of, name, thinking):
        tokenizer = tokenizer_of(TEMPLATES[name])
        kwargs = {} if thinking is None else {"enable_thinking": thinking}
        messages = [user("hi")]
        assert read(tokenizer, tokenizer.chat(messages, kwargs=kwargs)) == reference(tokenizer, messages, **kwargs)

    def test_a_variable_takes_the_place_of_the_generation_prompt(self, tokenizer_of):
        tokenizer = tokenizer_of(TEMPLATES["chatml"])
        shown = tokenizer.chat([user("hi")], kwargs={"add_generation_prompt": False})
        assert shown == tokenizer.chat([user("hi")], add_generation_prompt=False)

    @pytest.mark.parametrize("name", ["messages", "chat_template", "tokenize", "continue_final_message"])
    def test_some_variables_are_taken(self, tokenizer_of, name):
        with pytest.raises(RequestError, match=f"chat_template_kwargs cannot set {name}"):
            tokenizer_of(TEMPLATES["chatml"]).chat([user("hi")], kwargs={name: "x"})

    @pytest.mark.parametrize("name", ["self", "args", "caller", "loop"])
    def test_any_other_name_may_be_a_variable(self, tokenizer_of, name):
        tokenizer = tokenizer_of(TEMPLATES["chatml"])
        assert tokenizer.chat([user("hi")], kwargs={name: "x"}) == tokenizer.chat([user("hi")])

    def test_deep_variables_are_refused(self, tokenizer_of):
        deep: Any = "x"
        for _ in range(2000):
            deep = [deep]
        with pytest.raises(RequestError, match="nested more than 64 deep"):
            tokenizer_of(TEMPLATES["chatml"]).chat([user("hi")], kwargs={"deep": deep})

    @pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "r1", "mistral", "glm", "harmony", "qwen3"])
    @pytest.mark.parametrize("content", ["The answer", "The answer is ", "  The", "FINAL_MESSAGE_ x", "a </s> b"])
    def test_the_last_message_goes_on(self, tokenizer_of, name, content):
        tokenizer = tokenizer_of(TEMPLATES[name])
        messages = [user("hi"), assistant(content)]
        ids = tokenizer.chat(messages, add_generation_prompt=False, continue_final_message=True)
        wanted = reference(tokenizer, messages, add_generation_prompt=False, continue_final_message=True)
        assert read(tokenizer, ids) == wanted
        assert wanted.endswith((content.strip(), content))

    def test_a_last_message_that_the_template_changes_cannot_go_on(self, tokenizer_of):
        messages = [user("hi"), assistant("<think>a</think>b")]
        with pytest.raises(RequestError, match="does not show the last message as it is"):
            tokenizer_of(TEMPLATES["r1"]).chat(messages, add_generation_prompt=False, continue_final_message=True)

    def test_not_both(self, tokenizer_of):
        for kwargs in ({}, {"add_generation_prompt": True}):
            with pytest.raises(RequestError, match="cannot both be true"):
                tokenizer_of(TEMPLATES["chatml"]).chat(
                    [user("hi")], not kwargs, continue_final_message=True, kwargs=kwargs
                )


class TestChoice:
    SEVERAL: ClassVar = [
        {"name": "rag", "template": "rag {{ messages[0].content }}"},
        {"name": "tool_use", "template": "tools"},
    ]

    def test_a_list_without_default_stops_only_chat(self, tmp_path):
        tokenizer = chat_tokenizer(tmp_path, self.SEVERAL)
        assert tokenizer.encode("hi")
        assert not tokenizer.has_chat_template
        with pytest.raises(
            RequestError, match=r"several chat templates \(rag, tool_use\) and none of them is its default"
        ):
            tokenizer.chat([user("hi")])

    def test_a_list_with_a_default(self, tmp_path):
        tokenizer = chat_tokenizer(tmp_path, [*self.SEVERAL, {"name": "default", "template": "plain"}])
        assert tokenizer.has_chat_template
        assert read(tokenizer, tokenizer.chat([user("hi")])) == "plain"

    def test_one_of_the_list_or_a_file(self, tmp_path):
        chat_tokenizer(tmp_path, self.SEVERAL)
        (tmp_path / "mine.jinja").write_text("mine {{ messages[0].content }}{{ eos_token }}")
        for choice, shown in (("rag", "rag hi"), (tmp_path / "mine.jinja", "mine hi</s>")):
            tokenizer = load_tokenizer(tmp_path, choice)
            assert tokenizer is not None
            assert read(tokenizer, tokenizer.chat([user("hi")])) == shown

    @pytest.mark.parametrize(
        ("choice", "reason"),
        [
            (
                "missing.jinja",
                "cannot be read: No such file or directory, nor one of this model's templates: rag, tool_use",
            ),
            ("broken.jinja", "broken.jinja: the model's chat template failed"),
            ("binary.jinja", "not a UTF-8 text file"),
        ],
    )
    def test_a_bad_choice_is_told(self, tmp_path, choice, reason):
        chat_tokenizer(tmp_path, self.SEVERAL)
        (tmp_path / "broken.jinja").write_text("{% if %}")
        (tmp_path / "binary.jinja").write_bytes(b"\xff\xfe")
        with pytest.raises((ConfigError, CheckpointError), match=reason) as error:
            load_tokenizer(tmp_path, tmp_path / choice)
        assert "\n" not in str(error.value)

    def test_a_choice_without_a_tokenizer(self, tmp_path):
        with pytest.raises(ConfigError, match="has no tokenizer"):
            load_tokenizer(tmp_path, "rag")
