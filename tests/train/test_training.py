"""Training: batches, the differentiable MoE layer, learning, resuming, and the checkpoint that comes out."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from transformers import AutoTokenizer

from emoe_jax.attention.uncached import attend
from emoe_jax.experts.weights import ExpertWeights
from emoe_jax.models.routing import Routing
from train.demo import batches, evaluate, export, objective, report, shape, trainer
from train.demo.attention import attend_packed, causal_within_documents
from train.demo.batches import Encoder, Recipe
from train.demo.mixture import GROUPS
from train.demo.moe import dropped, moe_buffers
from train.demo.trainer import Checkpoints, Hyperparameters
from train.progress import RunHistory, read_history
from train.tasks import texts

TINY = {
    "vocab_size": 600,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
PLAN = Hyperparameters(
    steps=12, rows=4, length=96, long_every=5, loss_positions=128, peak_rate=2e-2, warmup_steps=2, checkpoint_every=5
)

RECIPE = Recipe(seed=0, steps=100, loss_positions=256)


@pytest.fixture(scope="module")
def config():
    return shape.model_config(**TINY)


def test_batches_follow_from_the_step_alone(bpe, config):
    encoder = Encoder(bpe)
    first, again = (batches.make(encoder, config, RECIPE, 7, 4, 128) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
    assert not np.array_equal(first.tokens, batches.make(encoder, config, RECIPE, 8, 4, 128).tokens)
    assert not np.array_equal(first.tokens, batches.make(encoder, config, Recipe(1, 100, 256), 7, 4, 128).tokens)


def test_a_batch_teaches_next_tokens_within_documents(bpe, config):
    batch = batches.make(Encoder(bpe), config, RECIPE, 0, 4, 128)
    tokens, documents = batch.tokens.reshape(-1), batch.documents.reshape(-1)
    learned = batch.loss_at[batch.weights > 0]
    np.testing.assert_array_equal(tokens[learned + 1], batch.targets[batch.weights > 0])
    np.testing.assert_array_equal(documents[learned + 1], documents[learned])
    assert len(set(learned.tolist())) == len(learned)
    starts = (batch.documents > 0) & (batch.positions == 0)
    assert set(batch.tokens[starts]) == {0}


def test_rows_are_full_and_every_answer_is_learned(bpe, config):
    recipe = dataclasses.replace(RECIPE, loss_positions=8 * 128)
    batch = batches.make(Encoder(bpe), config, recipe, 50, 8, 128)
    assert np.mean(batch.documents == 0) < 0.06
    text = batch.groups.reshape(-1)[batch.loss_at] > GROUPS.index("facts")
    assert set(np.unique(batch.weights[text])) <= {np.float32(0.5), np.float32(0.3), 0}
    assert (batch.weights[text] == 0.5).sum() > 100


def test_a_batch_has_all_kinds_of_text_in_the_shares_of_the_stage(bpe, config):
    """The balancing loss is taken over a batch: what is not mixed there, cannot have experts of its own."""
    counts = np.zeros(len(GROUPS))
    recipe = dataclasses.replace(RECIPE, seed=5)
    for step in range(30, 34):
        batch = batches.make(Encoder(bpe), config, recipe, step, 16, 256)
        counts += np.bincount(batch.groups[batch.documents > 0], minlength=len(GROUPS))
    shares = dict(zip(GROUPS, counts / counts.sum(), strict=True))
    assert min(share for group, share in shares.items() if group != "conv") > 0.01  # of generated chats there are few
    assert 0.08 < shares["facts"] < 0.25
    assert 0.15 < sum(shares[kind] for kind in texts.KINDS) < 0.5


def test_expert_dropout_restricts_its_share_of_rows(bpe, config):
    for share in (0.0, 0.25, 1.0):
        recipe = dataclasses.replace(RECIPE, expert_dropout=share)
        slots = np.concatenate([batches.make(Encoder(bpe), config, recipe, s, 16, 64).slots for s in range(8)])
        restricted = (slots < config.num_experts).any(axis=1)
        assert abs(restricted.mean() - share) < 0.15
        assert slots.min() >= config.top_k


def test_a_joined_row_is_one_conversation(bpe, config):
    batch = batches.make(Encoder(bpe), config, RECIPE, 0, 1, 512, joined=True)
    used = batch.documents[0] > 0
    np.testing.assert_array_equal(batch.positions[0][used], np.arange(int(used.sum())))
    assert (batch.tokens[0][used] == 0).sum() == 1


def test_a_restricted_row_is_routed_to_the_number_of_experts_it_may_use(config):
    """Its experts are those that its tokens want, when luck is even; a row with all slots is routed as without."""
    parameters = objective.init(config, 0)
    E, L = config.num_experts, len(config.moe_layers)
    tokens = np.random.default_rng(1).integers(3, 600, (2, 24)).astype(np.int32)
    positions = np.broadcast_to(np.arange(24), (2, 24))
    documents = np.ones((2, 24), np.int32)
    documents[:, 20:] = 0
    slots = np.array([[2] * L, [E] * L])

    @jax.jit
    def routed(restriction):
        model = objective.decoder(config, parameters.dense)
        read, placed, of = jnp.asarray(tokens), jnp.asarray(positions), jnp.asarray(documents)
        return objective.packed_forward(
            model, parameters.experts, read, placed, of, lambda rows, *_: rows, restriction
        )[1]

    even = objective.Restriction(jnp.asarray(slots), jnp.zeros((2, L, E)))
    first, free = routed(even)[0], routed(None)[0]
    ids = np.asarray(first.ids).reshape(2, 24, -1)
    wanted = jax.nn.softmax(first.logits).reshape(2, 24, E)[0, :20].sum(0)
    assert set(ids[0, :20].flat) == set(np.argsort(-wanted)[:2].tolist())
    np.testing.assert_array_equal(ids[1], np.asarray(free.ids).reshape(2, 24, -1)[1])
    assert (ids[:, 20:] == E).all()
    lucky = even._replace(luck=even.luck.at[0, 0, :2].set(100.0))
    assert set(np.asarray(routed(lucky)[0].ids).reshape(2, 24, -1)[0, :20].flat) == {0, 1}


def test_concentration_is_lost_by_what_strays_from_a_tasks_experts():
    E = 8  # of which a task is drawn to 3
    logits = jnp.log(jnp.full((4, E), 1e-9).at[:2, :3].set(1 / 3).at[2, :4].set(0.25).at[3].set(1 / E))
    tasks = jnp.eye(3)[jnp.array([0, 0, 1, 2])].at[3].set(0)  # the last row does not count
    choices, weights = jnp.zeros((4, 2), int), jnp.zeros((4, 2))
    routing = Routing(logits, choices, weights, choices, weights, jnp.zeros((4, 2), bool), choices, weights)
    given = objective.concentration_loss(routing, tasks)
    np.testing.assert_allclose(given, 0.25 / 3, atol=1e-6)


def test_moe_buffers_equal_every_expert_on_every_row():
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (40, 8))
    weights, ids = jax.lax.top_k(jax.nn.softmax(jax.random.normal(keys[1], (40, 4))), 2)
    ids = ids.at[-3:].set(4)  # rows without an assignment
    experts = ExpertWeights(jax.random.normal(keys[2], (4, 12, 8)), jax.random.normal(keys[3], (4, 8, 6)))
    assert float(dropped(ids, 4)) == 0.0

    def dense(x, weights, experts):
        gate, up = jnp.split(jnp.einsum("rd,efd->ref", x, experts.w_in), 2, axis=-1)
        out = jnp.einsum("ref,edf->red", jax.nn.silu(gate) * up, experts.w_out)
        share = jnp.sum(jax.nn.one_hot(ids, 4) * weights[..., None], axis=1)
        return jnp.sum(jnp.einsum("red,re->rd", out, share) ** 2)

    def buffered(x, weights, experts):
        return jnp.sum(moe_buffers(x, ids, weights, experts) ** 2)

    wanted, wanted_gradients = jax.jit(jax.value_and_grad(dense, argnums=(0, 1, 2)))(x, weights, experts)
    given, given_gradients = jax.jit(jax.value_and_grad(buffered, argnums=(0, 1, 2)))(x, weights, experts)
    np.testing.assert_allclose(given, wanted, rtol=1e-5)
    for one, other in zip(jax.tree.leaves(given_gradients), jax.tree.leaves(wanted_gradients), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4 * float(jnp.abs(other).max()))


def test_packed_attention_is_attention():
    keys = jax.random.split(jax.random.key(1), 3)
    q, k, v = (jax.random.normal(key, (2, 9, heads, 4)) for key, heads in zip(keys, (4, 2, 2), strict=True))
    mask = causal_within_documents(jnp.array([[1, 1, 1, 2, 2, 2, 2, 0, 0], [1] * 9]))
    np.testing.assert_allclose(attend_packed(q, k, v, mask, 0.5), attend(q, k, v, mask, 0.5), atol=1e-5)


def test_documents_of_a_row_do_not_see_each_other(config):
    """Packed, a conversation has the hidden states that it has alone."""
    parameters = objective.init(config, 0)

    @jax.jit
    def hidden(tokens, positions, documents):
        def no_experts(rows, ids, weights, experts):  # buffers of experts are too small for so few rows
            return rows

        model = objective.decoder(config, parameters.dense)
        return objective.packed_forward(model, parameters.experts, tokens, positions, documents, no_experts)[0]

    tokens = np.random.default_rng(0).integers(3, 600, (1, 24)).astype(np.int32)
    positions = np.concatenate([np.arange(10), np.arange(14)])[None]
    documents = np.repeat([1, 2], [10, 14])[None]
    together = hidden(tokens, positions, documents)
    alone = hidden(tokens[:, 10:], positions[:, 10:], documents[:, 10:])
    np.testing.assert_allclose(together[:, 10:], alone, atol=1e-5)


def test_training_learns_and_a_killed_run_resumes_exactly(bpe, config, tmp_path):
    losses = {}

    def note(step, metrics):
        losses[step] = float(metrics.loss)

    whole = trainer.run(config, PLAN, bpe, None, note)
    assert np.mean([losses[step] for step in range(9, 13)]) < 0.9 * losses[1]
    checkpoints = Checkpoints(tmp_path)
    trainer.run(config, PLAN, bpe, checkpoints, note, stop_after=5)
    assert checkpoints.steps() == [5]
    resumed_losses = {}
    resumed = trainer.run(config, PLAN, bpe, checkpoints, lambda step, m: resumed_losses.update({step: float(m.loss)}))
    assert sorted(resumed_losses) == list(range(6, 13))
    assert checkpoints.steps() == [10, 12]
    assert resumed_losses[12] == losses[12]
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_checkpoint_holds_the_rounded_weights(bpe, config, tmp_path):
    parameters = objective.init(config, 0)
    export.write(tmp_path, shape.hf_config(**TINY), parameters, bpe)
    read_config, shipped, _ = export.read(tmp_path)
    assert read_config == config.replace(dtype="bfloat16")
    for one, other in zip(jax.tree.leaves(shipped), jax.tree.leaves(parameters), strict=True):
        np.testing.assert_array_equal(one, other.astype(jnp.bfloat16).astype(jnp.float32))
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template
    numbers = evaluate.evaluate(shipped, config, Encoder(bpe), seed=0, count=4, generated=1)
    assert set(numbers["tasks"]) == {"sum", "clsfy", "qa", "comp", "conv", "facts"}
    assert sum(part["examples"] for part in numbers["tasks"]["facts"]["by_field"].values()) == 4
    assert set(numbers["texts"]) == {"prose", "reference", "code", "french", "dialogue"}
    assert all(1 < row["perplexity"] < 600 * 2 for row in numbers["texts"].values())  # the vocabulary has 600 entries
    report.print_table(numbers, Console(record=True, file=io.StringIO()))
    assert 0 <= numbers["mean_js_divergence_bits"] <= 1


def test_exact_match_is_what_greedy_decoding_yields(bpe, config):
    """The untrained model's own greedy answer counts as right, and that answer without its last token as wrong."""
    from train.tasks.example import Example

    parameters = objective.init(config, 0)
    encoder = Encoder(bpe)
    prompt = Example("Who?", "", "qa")
    (answer,) = evaluate.generate(parameters, config, encoder, [prompt])
    ids = bpe.encode(answer).ids
    scores = evaluate.score(parameters, config, encoder, [Example("Who?", answer, "qa")])
    assert scores.tokens[0] == len(ids) + 1
    assert not scores.exact[0]  # the untrained model never ends its answer


def test_divergence():
    even, first = np.full((1, 2), 0.5), np.array([[1.0, 0.0]])
    assert evaluate.entropy_bits(even)[0] == 1.0
    assert evaluate.divergence_bits(first, first)[0] == 0.0
    assert evaluate.divergence_bits(first, np.array([[0.0, 1.0]]))[0] == 1.0


def test_history_drops_what_came_after_the_checkpoint(tmp_path):
    history = RunHistory(tmp_path / "history.jsonl", 0)
    for step in (1, 2, 3):
        history.add({"step": step, "loss": 2.0, "answer_accuracy": 0.5, "fact_accuracy": 0.1})
    history.close()
    with history.path.open("a") as file:
        file.write('{"step": 4, "lo')
    RunHistory(history.path, 2).close()
    assert [line["step"] for line in read_history(history.path)] == [1, 2]
    report.plot_loss(read_history(history.path), tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000
