"""Tokenizers of several kinds: special tokens, chat templates, and exact incremental decoding."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from emoe_jax.errors import CheckpointError, RequestError
from emoe_jax.models import load_tokenizer
from tests.golden.tiny import OPENMOE

TEXTS = ["the cat sat on the mat, naïvely", "3 € for 2 cats 😀 or 日本語", "  two blanks\n\nand lines"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] != 'user' %}{{ raise_exception('no ' + m['role']) }}{% endif %}"
    "{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}{{ eos_token }}{% endif %}"
)


def byte_level(directory, strip=False, chat_template: str | None = TEMPLATE):
    """Byte-level BPE, as of GPT-2, Qwen and OLMoE; optionally dropping a leading blank, as the demo's does."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=strip)  # pyright: ignore[reportAttributeAccessIssue]
    stripping = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    backend.decoder = stripping if strip else decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])  # pyright: ignore[reportAttributeAccessIssue]
    return save(backend, directory, chat_template)


def byte_fallback(directory):
    """Words with a blank mark and single bytes for the rest, as of Llama and Mixtral."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += ["▁the", "▁cat", "▁sat", "cats", "t", "h", "e", "c", "a", "s", ","]
    backend = Backend(
        models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], byte_fallback=True, unk_token="<unk>")
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return save(backend, directory, None)


def save(backend, directory, chat_template):
    backend.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    if chat_template is not None:
        config["chat_template"] = chat_template
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(directory)
    assert tokenizer is not None
    return tokenizer


KINDS = {"byte_level": byte_level, "stripping": lambda d: byte_level(d, strip=True), "byte_fallback": byte_fallback}


@pytest.fixture(params=KINDS)
def tokenizer(request, tmp_path):
    return KINDS[request.param](tmp_path)


def stream_all(tokenizer, ids):
    stream = tokenizer.stream()
    pieces = [stream.add(i) for i in ids]
    return pieces, stream.flush()


class TestStream:
    @pytest.mark.parametrize("text", TEXTS)
    def test_text_comes_back_in_pieces(self, tokenizer, text):
        ids = tokenizer.encode(text)
        pieces, rest = stream_all(tokenizer, ids)
        assert "".join(pieces) + rest == tokenizer.decode(ids)
        assert tokenizer.decode(ids).strip() == text.strip()
        assert "\ufffd" not in "".join(pieces)
        assert sum(map(bool, pieces)) > 3

    def test_any_tokens_concatenate_to_their_decoding(self, tokenizer):
        rng = np.random.default_rng(0)
        for _ in range(100):
            ids = rng.integers(0, 275, rng.integers(1, 40)).tolist()
            pieces, rest = stream_all(tokenizer, ids)
            assert "".join(pieces) + rest == tokenizer.decode(ids)

    def test_half_a_character_waits(self, tmp_path):
        tokenizer = byte_level(tmp_path)
        ids = tokenizer.encode("語", add_special_tokens=False)
        assert len(ids) > 1
        pieces, rest = stream_all(tokenizer, ids)
        assert [*pieces, rest] == [""] * (len(ids) - 1) + ["語", ""]
        assert stream_all(tokenizer, ids[:-1])[1] == "\ufffd"


def test_special_tokens(tmp_path):
    tokenizer = byte_level(tmp_path)
    with_bos = tokenizer.encode("the cat")
    assert with_bos[0] == 0
    assert tokenizer.encode("the cat", add_special_tokens=False) == with_bos[1:]
    assert tokenizer.decode(with_bos) == "the cat"
    assert tokenizer.decode(with_bos, skip_special_tokens=False) == "<s>the cat"
    assert tokenizer.eos_token_ids == (1,)


def test_special_tokens_have_a_text_where_they_are_shown(tokenizer):
    begin, end = tokenizer.special_id("<s>"), tokenizer.special_id("</s>")
    assert {begin, end} == {tokenizer.backend.bos_token_id, tokenizer.backend.eos_token_id}
    assert tokenizer.special_id("the") is tokenizer.special_id("<|channel|>") is None
    words = [tokenizer.encode(text, add_special_tokens=False) for text in ("the cat", "語 cats", "a")]
    ids = [*words[0], begin, *words[1], end, *words[2][:-1], words[1][0], begin]
    stream = tokenizer.stream((), [begin])
    pieces = [stream.add(i) for i in ids]
    assert pieces[len(words[0])].endswith("<s>")
    text = "".join(pieces) + stream.flush()
    assert text.count("<s>") == 2
    assert "</s>" not in text
    assert text.startswith("the cat<s>語 cats")
    assert stream_all(tokenizer, ids)[0].count("<s>") == 0


def test_ids_beyond_the_vocabulary_have_no_text(tokenizer):
    """Embedding tables are padded to round sizes, so a model can produce such ids."""
    assert tokenizer.decode([5000]) == ""
    assert tokenizer.token_text(5000) == ""


def test_token_text_keeps_the_blank(tokenizer):
    ids = tokenizer.encode("a the cat", add_special_tokens=False)
    assert "".join(map(tokenizer.token_text, ids)).endswith(" the cat")
    assert tokenizer.token_text(tokenizer.eos_token_ids[0]) == "</s>"


class TestChat:
    def test_template(self, tmp_path):
        tokenizer = byte_level(tmp_path)
        messages = [{"role": "user", "content": "the cat"}]
        text = tokenizer.encode("the cat", add_special_tokens=False)
        assert tokenizer.chat(messages) == [0, *text, 1]
        assert tokenizer.chat(messages, add_generation_prompt=False) == [0, *text]

    def test_refusal(self, tmp_path):
        tokenizer = byte_level(tmp_path)
        with pytest.raises(RequestError, match="chat template refused the messages: no system") as error:
            tokenizer.chat([{"role": "system", "content": "x"}])
        assert error.value.param == "messages"

    BROKEN = (
        ("{{ messages[0].missing.more }}", "has no attribute"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% if %}", "Expected an expression"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    )

    @pytest.mark.parametrize(("template", "reason"), BROKEN)
    def test_a_broken_template_is_the_checkpoints_fault(self, template, reason, tmp_path):
        with pytest.raises(CheckpointError, match=f"tokenizer_config.json: .*chat template failed .*{reason}") as error:
            byte_level(tmp_path, chat_template=template)
        assert "\n" not in str(error.value)

    def test_a_template_that_breaks_on_some_messages(self, tmp_path):
        tokenizer = byte_level(tmp_path, chat_template="{{ 1 / (2 - messages | length) }}")
        with pytest.raises(CheckpointError, match="chat template failed on the messages: division by zero"):
            tokenizer.chat([{"role": "user", "content": "x"}] * 2)

    @pytest.mark.parametrize("kind", KINDS)
    def test_messages_hold_no_special_tokens(self, kind, tmp_path):
        KINDS[kind](tmp_path)
        settings = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"chat_template": TEMPLATE}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        tokenizer = load_tokenizer(tmp_path)
        assert tokenizer is not None
        bos, eos = tokenizer.encode("<s></s>", add_special_tokens=False)[-2:]
        ids = tokenizer.chat([{"role": "user", "content": "the </s> cat <s>"}])
        assert [i for i in ids if i in (bos, eos)] == [bos, eos]
        assert (ids[0], ids[-1]) == (bos, eos)
        assert tokenizer.decode(ids[1:-1], skip_special_tokens=False).strip() == "the </s> cat <s>"

    def test_no_template(self, tmp_path):
        tokenizer = byte_level(tmp_path, chat_template=None)
        assert not tokenizer.has_chat_template
        with pytest.raises(RequestError, match="no chat template"):
            tokenizer.chat([{"role": "user", "content": "x"}])


class TestLoading:
    def test_no_files(self, tmp_path):
        assert load_tokenizer(tmp_path) is None

    @pytest.mark.parametrize(
        ("name", "content", "named"),
        [
            ("tokenizer.json", "{}", "tokenizer.json"),
            ("tokenizer.json", "nonsense", "tokenizer.json"),
            ("tokenizer_config.json", "[", "tokenizer_config.json"),
        ],
    )
    def test_a_broken_file_is_named(self, tmp_path, name, content, named):
        byte_level(tmp_path)
        (tmp_path / name).write_text(content)
        with pytest.raises(CheckpointError, match=f"/{named} cannot be loaded: ") as error:
            load_tokenizer(tmp_path)
        assert "\n" not in str(error.value)

    def test_code_is_not_run(self, tmp_path):
        """OpenMoE's tokenizer class lives in a file of the checkpoint; T5's own does the same."""
        pieces = [
            ("<pad>", 0.0),
            ("</s>", 0.0),
            ("<unk>", 0.0),
            *((f"▁{w}", -2.0) for w in ("the", "cat")),
            ("▁", -3.0),
        ]
        backend = Backend(models.Unigram(pieces, unk_id=2))
        backend.pre_tokenizer = pre_tokenizers.Metaspace()  # pyright: ignore[reportAttributeAccessIssue]
        backend.decoder = decoders.Metaspace()  # pyright: ignore[reportAttributeAccessIssue]
        backend.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps(
                {
                    "tokenizer_class": "OpenMoeTokenizer",
                    "auto_map": {"AutoTokenizer": ["tokenization_openmoe.OpenMoeTokenizer", None]},
                    "pad_token": "<pad>",
                    "eos_token": "</s>",
                    "unk_token": "<unk>",
                }
            )
        )
        (tmp_path / "tokenization_openmoe.py").write_text("raise SystemExit('ran')")
        (tmp_path / "config.json").write_text(json.dumps(OPENMOE))
        tokenizer = load_tokenizer(tmp_path)
        assert tokenizer is not None
        the, cat = tokenizer.encode("the cat", add_special_tokens=False)
        assert tokenizer.encode("the cat") == [0, the, cat]
        assert tokenizer.decode([0, the, cat, 1]) == "the cat"


def test_a_continuation_keeps_its_blank(tokenizer):
    """Prompt and answer joined read as if they had been one text, wherever the cut is between words."""
    ids = tokenizer.encode("the cat sat on the mat", add_special_tokens=False)
    whole = tokenizer.decode(ids)
    for cut in range(1, len(ids)):
        if not whole.startswith(tokenizer.decode(ids[:cut])):
            continue
        stream = tokenizer.stream(ids[:cut])
        text = "".join(map(stream.add, ids[cut:])) + stream.flush()
        assert tokenizer.decode(ids[:cut]) + text == whole


class TestBytes:
    @pytest.mark.parametrize("text", [*TEXTS, "é", "a\ufffdb", "語語 語", " \u00a0x"])
    def test_they_join_to_the_text(self, tokenizer, text):
        ids = tokenizer.encode(text, add_special_tokens=False)
        joined = tokenizer.token_bytes(ids[0], opening=True) + b"".join(map(tokenizer.token_bytes, ids[1:]))
        assert joined.decode() == tokenizer.decode(ids)

    @pytest.mark.parametrize("kind", ["byte_level", "stripping"])
    def test_of_every_byte_of_a_byte_level_vocabulary(self, kind, tmp_path):
        tokenizer = KINDS[kind](tmp_path)
        vocabulary = tokenizer.backend.get_vocab()
        backend = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        for byte in range(128):  # those that are characters of their own tell the letters of all
            ((letter, _),) = backend.pre_tokenize_str(chr(byte))
            assert tokenizer.token_bytes(vocabulary[letter]) == bytes([byte])
        seen = {tokenizer.token_bytes(vocabulary[letter]) for letter in pre_tokenizers.ByteLevel.alphabet()}
        assert seen == {bytes([byte]) for byte in range(256)}

    def test_of_byte_tokens_beside_words(self, tmp_path):
        tokenizer = byte_fallback(tmp_path)
        vocabulary = tokenizer.backend.get_vocab()
        assert [tokenizer.token_bytes(vocabulary[f"<0x{byte:02X}>"]) for byte in range(256)] == [
            bytes([byte]) for byte in range(256)
        ]
        assert tokenizer.token_bytes(vocabulary["▁cat"]) == b" cat"
        assert tokenizer.token_bytes(vocabulary["▁cat"], opening=True) == b"cat"

    def test_silent_tokens_have_none(self, tokenizer):
        assert tokenizer.token_bytes(tokenizer.eos_token_ids[0]) == b""
        assert tokenizer.token_bytes(5000) == b""

    def test_any_tokens_join_to_what_a_stream_says(self, tokenizer):
        """As far as it is text: bytes that are no character become U+FFFD, and nobody agrees on how many."""
        rng = np.random.default_rng(1)
        for _ in range(100):
            ids = rng.integers(0, 275, rng.integers(1, 12)).tolist()
            for prompt in ([], ids[:1], tokenizer.encode("the cat")):
                stream = tokenizer.stream(prompt)
                said = "".join(map(stream.add, ids)) + stream.flush()
                joined, opening = b"", tokenizer.begins_text(prompt)
                for i in ids:
                    own = tokenizer.token_bytes(i, opening)
                    joined, opening = joined + own, opening and not own
                if "\ufffd" not in said:
                    assert joined.decode() == said
