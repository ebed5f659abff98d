"""The demo model's tokenizer: byte-level BPE trained on training text, in Hugging Face form with a chat template.

Every piece of text starts with a blank before it is cut (`add_prefix_space`) and decoding drops the blank again, so
that a word is the same tokens at the start of an answer as in the middle of a context: copying needs that.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from train.demo import mixture

BOS, EOS, PAD, USER, ASSISTANT, SYSTEM = "<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>", "<|system|>"
_PASSAGE = 400  # characters of running text, about as many as a row of training takes
SPECIAL = (BOS, EOS, PAD, USER, ASSISTANT, SYSTEM)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|>{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}{{ eos_token }}"
    "{% elif message['role'] == 'system' %}<|system|>{{ message['content'] }}"
    "{% else %}{{ raise_exception('unknown role ' + message['role']) }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def corpus(seed: int, pieces: int) -> Iterator[str]:
    """Training text: the turns and passages of so many pieces of the training mixture."""
    for index in range(pieces):
        key = f"tokenizer/{index}"
        piece = mixture.draw(seed, key, mixture.STAGES[1])
        if piece.example is None:
            yield piece.text[:_PASSAGE]
        else:
            for message in mixture.with_answer(piece.example, key):
                yield message["content"]


def train(seed: int, vocab_size: int, pieces: int = 40_000) -> Tokenizer:
    """A BPE tokenizer of `vocab_size` entries, special tokens included."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(seed, pieces), trainer)
    return tokenizer


def save(tokenizer: Tokenizer, directory: Path, max_length: int) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json`."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    named = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": True,
        "additional_special_tokens": [USER, ASSISTANT, SYSTEM],
        "chat_template": CHAT_TEMPLATE,
        **named,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (directory / "special_tokens_map.json").write_text(json.dumps(named, indent=2) + "\n")
