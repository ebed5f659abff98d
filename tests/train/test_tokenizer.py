"""The tokenizer: round trips, and the training format equals the chat template."""

import pytest
from transformers import AutoTokenizer

from train.demo import tokenizer
from train.demo.batches import PROMPT_WEIGHT, Encoder
from train.tasks import examples


@pytest.fixture(scope="module")
def saved(bpe, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(bpe, directory, 1024)
    return AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize(
    "text", ["Who leads Velmora Power?", "naïve café – 東京 🙂", 'say: "5 % more", twice', "a\nb\n\nc"]
)
def test_round_trip(bpe, saved, text):
    assert bpe.decode(bpe.encode(text).ids) == text
    assert saved.decode(saved.encode(text, add_special_tokens=False)) == text


def test_a_word_is_the_same_tokens_everywhere(bpe):
    alone = bpe.encode("Lisbon").ids
    assert bpe.encode("She lives in Lisbon").ids[-len(alone) :] == alone


def test_special_tokens(saved):
    assert (saved.bos_token_id, saved.eos_token_id, saved.pad_token_id) == (0, 1, 2)
    assert len(saved) == 600


@pytest.mark.parametrize("task", ["qa", "conv"])
def test_training_format_is_the_chat_template(bpe, saved, task):
    encoder = Encoder(bpe)
    for example in examples(task, "train", 0, 10):
        system = {"role": "system", "content": "Be brief."}
        messages = [system, *example.messages, {"role": "assistant", "content": example.answer}]
        ids, weights = encoder.conversation(messages, task)
        assert ids == saved.apply_chat_template(messages, return_dict=False)
        assert len(weights) == len(ids)
        prompt = saved.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        assert ids[: len(prompt)] == prompt
        assert ids[len(prompt) :] == [*bpe.encode(example.answer).ids, saved.eos_token_id]
        assert all(weight > PROMPT_WEIGHT for weight in weights[len(prompt) :])
