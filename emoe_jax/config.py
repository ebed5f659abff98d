"""The frozen description of one MoE decoder, whatever its family.

The axes of all arrays of the project. An axis has one name and a name is one axis, in annotations and comments.

    B       sequences or prompts that are computed together
    T       new tokens of each sequence
    S       positions that are attended to: those of the KV cache, or of the rows themselves
    Q       rows that attend, where they are not the T new tokens
    R       rows: the B * T tokens of a batch, flattened
    A       assignments: the R * k pairs of a row and one of its experts
    V       vocabulary
    W       words of 32 bits, one bit for each token of the vocabulary
    D       width of a transformer
    N       query heads
    K       kv heads
    G       query heads of one kv head
    H       head dim, of keys and queries
    Hv      head dim of values: H, or in latent attention the part of a key that is a value, too
    L       layers
    M       MoE layers
    M1      MoE layers but one, M - 1
    E       experts
    k       experts that a router chooses for a token
    C       slots of a layer of the slab, or other experts of one layer that lie in one array
    F       hidden units of an expert
    Fi      numbers that go into an expert's nonlinearity: 2F, or 3F for `double_glu`
    I       inputs of a linear map
    O       outputs of a linear map
    P       prompts of a trace, or those that a predictor remembers
    d       numbers of a prompt's embedding
    r       directions on which vectors are projected, such as principal ones
    ME, Mk  M * E, M * k
    n       a number that means something in one function only
    lead    any number of axes in front of the others

Axes that are rarer have words as names:

    heads                N or K
    padded_A             assignments in blocks that never mix experts, with places that stay empty
    block_R, block_I, block_O
                         a part of R, I or O
    packed_I, packed_D, packed_F
                         bytes that hold I, D or F numbers of four bits
    scaled_O, scaled_I, scaled_Fi, scaled_D, scaled_F
                         runs of O, I, Fi, D or F that have a scale in common
    blocks               blocks of assignments
    page, pages          positions of a page, and pages of the KV cache
    pages_per_sequence   the width of a block table
    tables               block tables that are kept on the device
    splits               parts of a contraction, or of a context, that are computed side by side
    places               tokens that are kept on the device for the next step
    row_groups, tiles    decoding rows and tiles of the rows of prompts; the tiles alone
    words                32-bit words of a buffer
    all_words            those of a larger one that begins with it
    numbers              numbers of an expert's record
    ranks, further       experts of a token that a step tells and a trace holds: k or more, and those behind the k
    tokens               tokens of a trace or of a prompt, one after another
    prompt_tokens        tokens of prompts, one after another
    runs, own_runs       different runs of tokens, in all prompts or in each of them
    steps                steps of an engine
    requests             requests
    policies             residency policies
    others               prompts that P are compared with
    half_lives, latent_half_lives
                         half-lives of the decayed means: of wishes, and along `r` directions
    latent, latent_and_ME
                         latent_half_lives * r, and that plus ME
    features, features_and_target
                         features of a regression, and those with its target
    targets              what a regression predicts
    channels             what a predictor's network is told of each expert
    name_parts           words and other parts of the names of tasks
    hidden               hidden units of a small network
    earlier_ME           experts of the MoE layers before one
    answer               tokens of an answer
    answers, audits      answers that ended lately, and audited ones
    examples, resamples  examples of a task, and draws of as many of them
    loss_positions       positions of a training batch that have a loss
    groups               groups of experts
    tasks                tasks
    plans, residencies   of a replay: plans one after the other, and sets of experts side by side
    train, held_out      prompts to learn from, and others to judge by
"""

import dataclasses
import math
from typing import Any, Literal

from emoe_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: base, and the scaling rule of `rope_parameters` / `rope_scaling`."""

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    all_dim_factor: float = 1.0
    """YaRN's temperature of `mscale_all_dim`. Latent attention multiplies its scores by the square."""
    truncate: bool = True
    fraction: float = 1.0
    """Of a head, the part that is rotated, from its first number on."""
    interleaved: bool = False
    """Whether the two numbers that are rotated together are neighbours, as DeepSeek has them, and not half a head
    apart."""

    def rotated(self, head_dim: int) -> int:
        """How many numbers of a head are rotated."""
        return int(head_dim * self.fraction)


@dataclasses.dataclass(frozen=True)
class LatentConfig:
    """Latent attention (DeepSeek-V2): of each token a layer keeps one vector, of which the keys and values of all heads
    are made, and a rotated part of a key that all heads share."""

    kv_rank: int
    """Numbers of the vector."""
    rope_dim: int
    """Numbers of a head's keys that have a position."""
    nope_dim: int
    """Numbers of a head's keys that have none: a linear map of the vector."""
    value_dim: int
    """Numbers of a head's values: another linear map of it."""
    q_rank: int | None = None
    """Numbers of the vector that queries are made of; None where they are made of the hidden state."""
    norm_eps: float = 1e-6
    """Of the norms of both vectors."""

    @property
    def key_dim(self) -> int:
        """Numbers that a layer keeps of a token: the vector, and the part of a key that is shared."""
        return self.kv_rank + self.rope_dim


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """How a router's logits become choices and weights. `emoe_jax.models.routing.route` says what each part does."""

    score: Literal["softmax", "sigmoid"] = "softmax"
    """What makes scores of the logits: of all experts together, or of each alone."""
    norm_topk_prob: bool = True
    """Whether the weights of a token's experts are made to sum to 1 before they are scaled."""
    scale: float = 1.0
    """Multiplies all weights."""
    bias: bool = False
    """Whether the linear map that makes the logits has a bias."""
    choice_bias: bool = False
    """Whether experts are ranked by score plus a bias, which has no part in the weights (DeepSeek-V3)."""
    groups: int = 1
    """Groups of neighbouring experts; wishes are of the best `chosen_groups` of them."""
    chosen_groups: int = 1
    group_rank: Literal["best", "two_best"] = "two_best"
    """What groups are ordered by: their best expert (DeepSeek-V2), or the two best together (DeepSeek-V3)."""
    capacity_factor: float | None = None
    """Above None, OpenMoE's dropping of tokens over an expert's capacity."""
    min_capacity: int = 4


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that shapes the computation. Built by a family file from `config.json`; variants by `replace`."""

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    num_experts: int
    top_k: int
    expert_hidden: int
    moe_layers: tuple[int, ...]
    norm_eps: float = 1e-6
    latent: LatentConfig | None = None
    """Latent attention. It is computed as attention of all heads to one kv head of `latent.key_dim` numbers, the first
    `latent.kv_rank` of which are its value. `num_kv_heads` and `head_dim` say so."""
    rope: RopeConfig = RopeConfig()
    attention_scale: float = 1.0
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    """Multiplies what attention and feed-forward parts add to the residual stream."""
    logits_divisor: float = 1.0
    qkv_bias: bool = False
    output_bias: bool = False
    attention_sinks: bool = False
    """Whether each head has a logit that takes part in the softmax over the keys and has no value."""
    qk_norm: Literal["none", "head", "full"] = "none"
    clip_qkv: float | None = None
    sliding_windows: tuple[int | None, ...] = ()
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    ffn: Literal["glu", "double_glu", "clamped_glu"] = "glu"
    glu_alpha: float = 1.702
    glu_limit: float = 7.0
    """Of `clamped_glu`: what the sigmoid's argument is multiplied by, and where gate and up are cut off."""
    expert_bias: bool = False
    dense_hidden: int = 0
    shared_expert_hidden: int = 0
    extra_ffn: bool = False
    shared_expert_gate: bool = False
    router: RouterConfig = RouterConfig()
    trace_ranks: int | None = None
    """How many experts of a token and layer a step tells, the best first, for traces; None: the chosen ones."""
    tie_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    prepend_bos_id: int | None = None
    dtype: str = "float32"
    expert_format: str | None = None
    """What the checkpoint stores experts in, such as `int8`; None where that is `dtype`."""

    def __post_init__(self) -> None:
        if not self.moe_layers:
            raise ConfigError("the model has no MoE layer; this project serves Mixture-of-Experts models")
        if self.moe_layers[-1] >= self.num_layers:
            raise ConfigError(f"MoE layer {self.moe_layers[-1]} lies beyond the model's {self.num_layers} layers")
        if not 1 <= self.top_k <= self.num_experts:
            raise ConfigError(f"top-k of {self.top_k} does not fit {self.num_experts} experts")
        if not self.top_k <= self.ranks <= self.num_experts:
            raise ConfigError(
                f"trace_ranks is {self.ranks}; the routers choose {self.top_k} of {self.num_experts} experts, "
                f"so expected {self.top_k} to {self.num_experts}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"{self.num_heads} query heads are not a multiple of {self.num_kv_heads} kv heads")
        if self.latent is not None and (self.num_kv_heads, self.head_dim) != (1, self.latent.key_dim):
            raise ConfigError(
                f"{self.num_kv_heads} kv heads of {self.head_dim} numbers given; latent attention has 1 of "
                f"{self.latent.key_dim}"
            )
        name = "head_dim" if self.latent is None else "qk_rope_head_dim"
        rotated = self.rope.rotated(self.rope_dim)
        if rotated % 2 or not rotated:
            what = f"{name} is" if self.rope.fraction == 1 else f"the rotated part of {name} {self.rope_dim} is"
            raise ConfigError(f"{what} {rotated}; rotary positions need an even size")
        self._check_groups()
        if self.sliding_windows and len(self.sliding_windows) != self.num_layers:
            raise ConfigError(f"{len(self.sliding_windows)} sliding windows given for {self.num_layers} layers")

    @property
    def ranks(self) -> int:
        """Experts of a token and layer that a step tells: its wishes, and those that rank next."""
        return self.top_k if self.trace_ranks is None else self.trace_ranks

    @property
    def rope_dim(self) -> int:
        """Numbers of a head in which rotary positions are counted."""
        return self.head_dim if self.latent is None else self.latent.rope_dim

    @property
    def shared_value_dim(self) -> int | None:
        """The first so many numbers of a key are its value; None where values are kept beside keys."""
        return None if self.latent is None else self.latent.kv_rank

    @property
    def value_head_dim(self) -> int:
        """Numbers of a value as attention sums them up."""
        return self.shared_value_dim or self.head_dim

    @property
    def kept_numbers(self) -> int:
        """What a layer keeps of a token in the KV cache: keys and values, or one vector for both."""
        return self.num_kv_heads * self.head_dim * (2 if self.latent is None else 1)

    @property
    def ffn_in_factor(self) -> int:
        """Rows of an FFN's input projection per hidden unit: gate and up, or OpenMoE's double gate and up."""
        return 3 if self.ffn == "double_glu" else 2

    @property
    def expert_in_shape(self) -> tuple[int, int]:
        """Shape of one expert's input projection, `[out, in]`: `[2F, D]`, or `[3F, D]` for `double_glu`."""
        return (self.ffn_in_factor * self.expert_hidden, self.hidden_size)

    @property
    def expert_out_shape(self) -> tuple[int, int]:
        """Shape of one expert's output projection, `[out, in]`: `[D, F]`."""
        return (self.hidden_size, self.expert_hidden)

    @property
    def expert_params(self) -> int:
        """Weights of one expert in one layer, both projections with their biases; a count, not bytes."""
        biases = self.expert_in_shape[0] + self.expert_out_shape[0] if self.expert_bias else 0
        return math.prod(self.expert_in_shape) + math.prod(self.expert_out_shape) + biases

    def _check_groups(self) -> None:
        groups, chosen = self.router.groups, self.router.chosen_groups
        if self.num_experts % groups:
            raise ConfigError(f"{self.num_experts} experts are not a multiple of {groups} groups of experts")
        if not 1 <= chosen <= groups:
            raise ConfigError(f"{chosen} chosen groups of experts do not fit {groups} groups")
        size = self.num_experts // groups
        least = 2 if self.router.group_rank == "two_best" else 1
        if groups > 1 and (size < least or chosen * size < self.top_k):
            raise ConfigError(
                f"top-k of {self.top_k} does not fit {chosen} groups of {size} experts, at least {least} each"
            )

    def is_moe(self, layer: int) -> bool:
        """Whether the decoder layer of this index has experts; False for an index beyond the model."""
        return layer in self.moe_layers

    def sliding_window(self, layer: int) -> int | None:
        """How many tokens a query of this decoder layer sees, its own included; None is no limit."""
        return self.sliding_windows[layer] if self.sliding_windows else None

    def replace(self, **changes: Any) -> "ModelConfig":
        """A copy with these fields changed. Raises `ConfigError` where the new fields do not fit together."""
        return dataclasses.replace(self, **changes)
