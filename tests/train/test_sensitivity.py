"""`python -m train.sensitivity` on a tiny model in which layer 0 has equal experts, so that only layer 1 can suffer."""

import json
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emoe_jax import Engine
from emoe_jax.errors import ConfigError
from emoe_jax.experts.weights import ExpertWeights
from emoe_jax.models import config_from_hf, save_checkpoint
from emoe_jax.models.decoder import Decoder, init_experts
from emoe_jax.tasks import TaskProfile
from tests.serve import checkpoint as tiny
from train.sensitivity import __main__ as command
from train.sensitivity import profile
from train.sensitivity.embedding import embedding_model
from train.sensitivity.forward import RandomisedModel, TextInputs, draw_experts, page_room
from train.sensitivity.measure import Deviation, Follower, generate

CONFIG = tiny.CONFIG | {"num_hidden_layers": 2}
PROMPTS = [[5, 9, 40, 41, 7, 33], [12, 3, 88], [60, 61, 62, 63]]
CALM, FIRST, SECOND = (np.array(pattern) for pattern in ([False, False], [True, False], [False, True]))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sensitivity") / "tiny"
    tiny.write_tiny_checkpoint(path)
    config = config_from_hf(CONFIG)
    first, second = init_experts(config, jax.random.key(3))
    first = jax.tree.map(lambda stack: jnp.broadcast_to(stack[:1], stack.shape), first)
    second = ExpertWeights(second.w_in * 30, second.w_out * 30)
    save_checkpoint(path, CONFIG, nnx.state(Decoder(config, rngs=nnx.Rngs(2))), (first, second))
    return path


@pytest.fixture(scope="module")
def model(directory: Path) -> RandomisedModel:
    return RandomisedModel(directory, seed=0, batch=2)


def whole(model: RandomisedModel, text: list[int], sequence: int, random_layers: np.ndarray) -> np.ndarray:
    """Logits of every position of one text, in one call."""
    cache, tables = model.new_cache(1, page_room(len(text)))
    inputs = TextInputs(np.array([text]), np.zeros(1, np.int32), np.array([len(text)]), tables)
    at = np.arange(len(text))[None]
    return np.asarray(model.run(cache, inputs, at, np.array([sequence]), random_layers)[1])[0]


def test_without_random_layers_it_is_the_engines_model(model: RandomisedModel, directory: Path) -> None:
    with Engine.load(directory, expert_memory="100%", max_num_seqs=1) as engine:
        wanted = engine.logits(PROMPTS[0])
    np.testing.assert_allclose(whole(model, PROMPTS[0], 0, CALM), wanted, atol=1e-5)


@pytest.mark.parametrize("random_layers", [CALM, SECOND])
def test_a_token_meets_the_same_experts_in_every_call(model: RandomisedModel, random_layers: np.ndarray) -> None:
    """Answers made token by token, three prompts in batches of two, are those of whole texts at once."""
    answers = generate(model, PROMPTS, random_layers, max_tokens=5, batch=2)
    for number, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
        assert 0 < len(answer) <= 5
        best = whole(model, prompt + answer, number, random_layers).argmax(axis=-1)
        assert best[len(prompt) - 1 : -1].tolist() == answer


def test_deviations_are_of_the_layers_that_matter(model: RandomisedModel) -> None:
    answers = generate(model, PROMPTS, CALM, max_tokens=5, batch=2)
    calm, first, second = Follower(model, PROMPTS, answers, batch=2).deviations([CALM, FIRST, SECOND])
    for harmless in (calm, first):
        np.testing.assert_allclose(harmless.kl, 0, atol=1e-5)
        assert harmless.agreement.tolist() == [1, 1, 1]
    assert (second.kl > 1e-3).all()
    assert (second.nats != calm.nats).all()
    logits, random = (whole(model, PROMPTS[1] + answers[1], 1, pattern) for pattern in (CALM, SECOND))
    wanted, given = (jax.nn.log_softmax(x[len(PROMPTS[1]) - 1 :]) for x in (logits, random))
    np.testing.assert_allclose(second.kl[1], (np.exp(wanted) * (wanted - given)).sum(-1).mean(), rtol=1e-4)


def test_drawn_experts_are_different_and_uniform() -> None:
    config = config_from_hf(CONFIG)
    drawn = np.asarray(
        draw_experts(jax.random.key(0), jnp.arange(40), jnp.broadcast_to(jnp.arange(50), (40, 50)), config)
    )
    assert (drawn[..., 0] != drawn[..., 1]).all()
    counts = np.bincount(drawn.ravel(), minlength=8)
    assert abs(counts - 500).max() < 100
    alone = draw_experts(jax.random.key(0), jnp.array([7]), jnp.array([[3]]), config)
    np.testing.assert_array_equal(np.asarray(alone)[0, 0], drawn[7, 3])


def test_the_command_finds_the_insensitive_layer(directory: Path, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    TaskProfile(2, 8, 2).with_task("riddle", keywords={"riddle": 1.0}).save(path)
    texts = [("riddle", "what am I?"), ("poem", "rain"), ("riddle", "who goes there?"), ("riddle", "not taken")]
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"task": task, "prompt": text}) + "\n" for task, text in texts)
    )
    argv = ["--model", str(directory), "--prompts", str(tmp_path / "prompts.jsonl"), "--prompts-per-task", "2"]
    argv += ["--max-tokens", "4", "--batch", "4", "--exact", "riddle", "--profile", str(path)]
    argv += ["--json", str(tmp_path / "numbers.json"), "--plots", str(tmp_path / "plots")]
    assert command.main([*argv, "--by", "divergence"]) == 0
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    riddle, poem = numbers["tasks"]["riddle"], numbers["tasks"]["poem"]
    assert (riddle["prompts"], riddle["judged_by"], poem["judged_by"]) == (2, "exact_match", "rouge_l")
    assert [row["layers"] for row in riddle["progressive"]] == [1, 2]
    assert riddle["progressive"][0]["similarity"] == riddle["progressive"][0]["rouge_l"] == 1
    assert riddle["insensitive_layers"] == poem["insensitive_layers"] == 1
    saved = TaskProfile.load(path)
    assert dict(saved.tasks["riddle"].keywords) == {"riddle": 1.0}
    harm = np.array([saved.sensitivity(task) for task in ("riddle", "poem")])
    assert harm.max() == 1
    assert (harm[:, 0] < 1e-3).all()
    assert {file.name for file in (tmp_path / "plots").iterdir()} == {"similarity.png", "divergence.png"}
    assert command.main(argv) == 0
    assert TaskProfile.load(path).tasks["poem"].sensitivity == (0, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "{}/none"], "none"),
        (["--profile", "{}/none/profile.json"], "none does not exist"),
        (["--profile", "{}/other.json"], "the task profile is of a model with 3 MoE layers"),
        (["--prompts", "{}/no.jsonl"], "no.jsonl: No such file"),
        (["--max-tokens", "255"], "with --max-tokens 255 it must have 1 to 1"),
    ],
)
def test_mistakes_are_one_line(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    TaskProfile(3, 8, 2).save(tmp_path / "other.json")
    argv = ["--model", str(directory), "--tasks", "clsfy", "--prompts-per-task", "1", "--max-tokens", "2"]
    assert command.main(argv + [argument.replace("{}", str(tmp_path)) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_depths_are_spread_up_to_all_layers() -> None:
    progressive, single = profile.patterns(32, 4)
    assert [int(pattern.sum()) for pattern in progressive] == [8, 16, 24, 32]
    assert all(pattern[: pattern.sum()].all() for pattern in progressive)
    assert [np.flatnonzero(pattern).tolist() for pattern in single] == [[layer] for layer in range(32)]
    assert [int(pattern.sum()) for pattern in profile.patterns(3, 8)[0]] == [1, 2, 3]


def test_layers_are_insensitive_up_to_the_first_fall_below_the_threshold() -> None:
    rows = [{"layers": layers, "similarity": s} for layers, s in ((2, 0.95), (4, 0.86), (6, 0.7), (8, 0.9))]
    assert profile.insensitive_layers(rows, 0.85) == 4
    assert profile.insensitive_layers(rows, 0.96) == 0
    assert profile.insensitive_layers(rows, 0.5) == 8
    assert profile.by_threshold(4, 6).tolist() == [0, 0, 0, 0, 1, 1]


def test_harm_is_of_layers_within_a_task_and_shrunk_by_what_is_not_known() -> None:
    kl = np.array([[0.5, 0.0], [2.0, -1e-9], [0.01, 0.03]])
    harm = profile.by_divergence(kl, np.zeros_like(kl))
    np.testing.assert_allclose(harm, [[1, 0], [1, 0], [0.25, 0.75]], atol=1e-6)
    noisy = profile.by_divergence(kl, np.array([[0, 0], [0, 0], [0.01, 0.01]]))
    np.testing.assert_allclose(noisy[:2], harm[:2] / harm[:2].max(), atol=0.35)
    assert noisy[2, 0] > harm[2, 0]
    assert noisy[2, 1] < harm[2, 1]
    unknown = profile.by_divergence(kl, 10 * kl.mean(1, keepdims=True) * np.ones_like(kl))
    np.testing.assert_allclose(unknown, np.broadcast_to(unknown[0], unknown.shape))


def test_the_error_of_a_mean_over_prompts() -> None:
    rng = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(400):
        kl = rng.exponential(2.0, 16)
        deviation = Deviation(kl, kl, kl)
        numbers = profile.deviation_numbers(deviation, np.full(16, 3), range(16))
        means.append(numbers["kl"])
        errors.append(numbers["kl_error"])
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.1)


def test_similarity_of_answers() -> None:
    resident = profile.Outputs([[1, 2], [3], []], ["the red fox", "yes", ""])
    other = profile.Outputs([[1, 9], [3], []], ["the fox", "yes", ""])
    assert profile.similarities(resident, other, [1, 2]) == {"exact_match": 1, "rouge_l": 1}
    assert profile.similarities(resident, other, [0, 1]) == {"exact_match": 0.5, "rouge_l": pytest.approx(0.9)}


def test_similarity_by_an_embedding_model(monkeypatch: pytest.MonkeyPatch) -> None:
    class SentenceTransformer:
        def __init__(self, name: str, trust_remote_code: bool, model_kwargs: dict) -> None:
            assert model_kwargs == {"use_safetensors": True}
            assert not trust_remote_code
            if name != "lengths":
                raise OSError("no\nsuch model")

        def encode(self, texts: list[str], normalize_embeddings: bool, show_progress_bar: bool) -> np.ndarray:
            assert normalize_embeddings
            assert not show_progress_bar
            return np.array([[1.0, 0.0] if len(text) > 8 else [0.6, 0.8] for text in texts])

    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ConfigError, match="pip install sentence-transformers"):
        embedding_model("lengths")
    monkeypatch.setitem(
        sys.modules, "sentence_transformers", types.SimpleNamespace(SentenceTransformer=SentenceTransformer)
    )
    with pytest.raises(ConfigError, match="'other' cannot be loaded: no such model"):
        embedding_model("other")
    resident = profile.Outputs([[1, 2], [3]], ["the red fox", "yes"])
    other = profile.Outputs([[1, 9], [3]], ["the fox", "yes"])
    found = profile.similarities(resident, other, [0, 1], embedding_model("lengths"))
    assert found["cosine"] == pytest.approx(0.8)
