"""What a family file provides, and the strict reader of `config.json` that all of them use."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from emoe_jax.config import ModelConfig, RopeConfig
from emoe_jax.errors import ConfigError

# Keys that describe training, provenance or defaults of other tools and cannot change what a forward computes.
_IRRELEVANT = frozenset(
    {
        "_attn_implementation_autoset",
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "auto_map",
        "chunk_size_feed_forward",
        "dtype",
        "id2label",
        "initializer_range",
        "is_encoder_decoder",
        "label2id",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "problem_type",
        "return_dict",
        "router_aux_loss_coef",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)

_ACTIVATIONS: dict[str, Literal["silu", "gelu", "gelu_tanh", "relu"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


@dataclasses.dataclass(frozen=True)
class Part:
    """A run of rows of one of our arrays as a checkpoint stores it.

    `shape` is that of the tensor on disk; `index` selects one expert of a fused `[E, ...]` tensor, and `transposed`
    means that what is selected is stored `[in, out]`.
    """

    name: str
    shape: tuple[int, ...]
    index: int | None = None
    transposed: bool = False

    @property
    def rows(self) -> int:
        """Rows that this part fills of the array it belongs to."""
        selected = self.shape if self.index is None else self.shape[1:]
        return selected[-1] if self.transposed else selected[0]


@dataclasses.dataclass(frozen=True)
class ExpertSource:
    """One on-disk layout of one expert: `w_in` is its parts concatenated along rows."""

    w_in: tuple[Part, ...]
    w_out: Part

    @property
    def parts(self) -> tuple[Part, ...]:
        return (*self.w_in, self.w_out)


DenseTensors = dict[str, tuple[Part, ...]]
"""Parameter path of `Decoder` (`layers.0.self_attention.qkv.weight`) -> the parts whose rows in sequence it is."""


@dataclasses.dataclass(frozen=True)
class Family:
    """Everything that differs between architectures.

    `dense_tensors(config)` covers all weights but the experts. `expert_sources(config, layer, expert)` lists the
    layouts that are understood, one tensor per expert or fused; `layer` is the decoder's layer index. `aliases` maps
    the ending of a tensor name that some checkpoints use to the ending that `dense_tensors` uses.
    """

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    config: Callable[[Mapping[str, Any]], ModelConfig]
    dense_tensors: Callable[[ModelConfig], DenseTensors]
    expert_sources: Callable[[ModelConfig, int, int], tuple[ExpertSource, ...]]
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def canonical(self, name: str) -> str:
        """The name under which `dense_tensors` knows the checkpoint tensor `name`."""
        for ending, replacement in self.aliases.items():
            if name.endswith(ending):
                return name.removesuffix(ending) + replacement
        return name


class HfConfig:
    """Reads a `config.json` key by key and, in `finish`, refuses what nobody read."""

    def __init__(self, family: str, raw: Mapping[str, Any]):
        self._family = family
        self._raw = raw
        self._read: set[str] = set()

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """The value of `key`, or `default` when absent or null. Raises `ConfigError` on another type."""
        self._read.add(key)
        value = self._raw.get(key)
        if value is None:
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join(k.__name__ for k in kinds)
            raise ConfigError(f"config.json: {key} is {value!r}; expected {names}")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer; required when there is no default."""
        value = self.get(key, int, default)
        if value is None:
            raise ConfigError(f"config.json: {key} is missing; {self._family} needs it")
        if not 0 < value < 2**31:
            raise ConfigError(f"config.json: {key} is {value}; expected a positive size")
        return value

    def number(self, key: str, default: float) -> float:
        value = float(self.get(key, (int, float), default))
        if not math.isfinite(value):
            raise ConfigError(f"config.json: {key} is {value}; expected a finite number")
        return value

    def must_be(self, key: str, *allowed: Any) -> None:
        """Refuse any value but those allowed (null and absence are allowed)."""
        self._read.add(key)
        value = self._raw.get(key)
        if value is not None and value not in allowed:
            wanted = " or ".join(repr(a) for a in allowed)
            raise ConfigError(f"config.json: {key} = {value!r} is not supported by {self._family}; supported: {wanted}")

    def ignore(self, *keys: str) -> None:
        """Keys of this family that cannot change a forward."""
        self._read.update(keys)

    def activation(self, default: str = "silu") -> Literal["silu", "gelu", "gelu_tanh", "relu"]:
        name = self.get("hidden_act", str, default)
        if name not in _ACTIVATIONS:
            known = ", ".join(sorted(_ACTIVATIONS))
            raise ConfigError(f"config.json: hidden_act = {name!r} is not supported; supported: {known}")
        return _ACTIVATIONS[name]

    def token_ids(self, key: str, default: int | None = None) -> tuple[int, ...]:
        value = self.get(key, (int, list), default)
        if value is None:
            return ()
        return tuple(value) if isinstance(value, list) else (value,)

    def token_id(self, key: str) -> int | None:
        ids = self.token_ids(key)
        return ids[0] if ids else None

    @property
    def dtype(self) -> str:
        return str(self._raw.get("dtype") or self._raw.get("torch_dtype") or "float32").removeprefix("torch.")

    def rope(self, max_position: int, default_theta: float = 10000.0) -> RopeConfig:
        """`rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (before)."""
        theta = self.number("rope_theta", default_theta)
        raw = self.get("rope_parameters", dict) or self.get("rope_scaling", dict) or {}
        self.ignore("rope_parameters", "rope_scaling")
        raw = {k: v for k, v in raw.items() if v is not None}
        theta = float(raw.pop("rope_theta", theta))
        kind = raw.pop("rope_type", raw.pop("type", "default"))
        raw.pop("type", None)
        if kind not in ("default", "linear", "llama3", "yarn"):
            raise ConfigError(
                f"config.json: rope scaling {kind!r} is not supported; supported: default, linear, llama3, yarn"
            )
        return _rope(kind, theta, raw, max_position)

    def finish(self) -> None:
        """Raise `ConfigError` for any key that was neither read nor known to be irrelevant."""
        unknown = sorted(
            key
            for key, value in self._raw.items()
            if key not in self._read and key not in _IRRELEVANT and value is not None
        )
        if unknown:
            raise ConfigError(
                f"config.json: option {unknown[0]!r} is not supported by {self._family}"
                + (f" (nor {', '.join(unknown[1:])})" if unknown[1:] else "")
            )


def _rope(kind: Any, theta: float, raw: dict[str, Any], max_position: int) -> RopeConfig:
    """Check a scaling rule's own options; every option that is not understood is refused."""
    options = {
        "default": set(),
        "linear": {"factor"},
        "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
        "yarn": {
            "factor",
            "original_max_position_embeddings",
            "beta_fast",
            "beta_slow",
            "attention_factor",
            "mscale",
            "mscale_all_dim",
            "truncate",
        },
    }[kind]
    unknown = sorted(set(raw) - options)
    if unknown:
        raise ConfigError(f"config.json: rope option {unknown[0]!r} is not supported for {kind!r} scaling")
    factor = float(raw.get("factor", 1.0))
    if factor < 1.0:
        raise ConfigError(f"config.json: rope factor is {factor}; expected at least 1")
    original = int(raw.get("original_max_position_embeddings", max_position))
    attention_factor = 1.0
    if kind == "yarn":
        attention_factor = raw.get("attention_factor", _yarn_attention_factor(factor, raw))
    return RopeConfig(
        theta=theta,
        kind=kind,
        factor=factor,
        original_max_position=original,
        low_freq_factor=float(raw.get("low_freq_factor", 1.0)),
        high_freq_factor=float(raw.get("high_freq_factor", 4.0)),
        beta_fast=float(raw.get("beta_fast", 32.0)),
        beta_slow=float(raw.get("beta_slow", 1.0)),
        attention_factor=float(attention_factor),
        truncate=bool(raw.get("truncate", True)),
    )


def _yarn_attention_factor(factor: float, raw: dict[str, Any]) -> float:
    """YaRN's temperature: `0.1 ln(factor) + 1`, or the ratio of two such terms with `mscale` factors."""

    def term(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    mscale, mscale_all = raw.get("mscale"), raw.get("mscale_all_dim")
    return term(mscale) / term(mscale_all) if mscale and mscale_all else term(1.0)


def attention_tensors(config: ModelConfig, layer: int) -> DenseTensors:
    """The attention names and norms that Llama-like checkpoints share."""
    D, H = config.hidden_size, config.head_dim
    widths = {"q": config.num_heads * H, "k": config.num_kv_heads * H, "v": config.num_kv_heads * H}
    hub, ours = f"model.layers.{layer}", f"layers.{layer}"
    tensors: DenseTensors = {
        f"{ours}.input_norm.weight": (Part(f"{hub}.input_layernorm.weight", (D,)),),
        f"{ours}.ffn_norm.weight": (Part(f"{hub}.post_attention_layernorm.weight", (D,)),),
        f"{ours}.self_attention.qkv.weight": tuple(
            Part(f"{hub}.self_attn.{p}_proj.weight", (width, D)) for p, width in widths.items()
        ),
        f"{ours}.self_attention.out.weight": (Part(f"{hub}.self_attn.o_proj.weight", (D, widths["q"])),),
    }
    if config.qkv_bias:
        tensors[f"{ours}.self_attention.qkv.bias"] = tuple(
            Part(f"{hub}.self_attn.{p}_proj.bias", (width,)) for p, width in widths.items()
        )
    if config.output_bias:
        tensors[f"{ours}.self_attention.out.bias"] = (Part(f"{hub}.self_attn.o_proj.bias", (D,)),)
    if config.qk_norm != "none":
        for p in "qk":
            size = H if config.qk_norm == "head" else widths[p]
            tensors[f"{ours}.self_attention.{p}_norm.weight"] = (Part(f"{hub}.self_attn.{p}_norm.weight", (size,)),)
    return tensors


def ffn_tensors(config: ModelConfig, ours: str, hub: str, hidden: int) -> DenseTensors:
    """A dense FFN under the names `gate_proj`, `up_proj`, `down_proj`; the gate is twice as wide in a double GLU."""
    D, gate_rows = config.hidden_size, (config.ffn_in_factor - 1) * hidden
    return {
        f"{ours}.w_in.weight": (
            Part(f"{hub}.gate_proj.weight", (gate_rows, D)),
            Part(f"{hub}.up_proj.weight", (hidden, D)),
        ),
        f"{ours}.w_out.weight": (Part(f"{hub}.down_proj.weight", (D, hidden)),),
    }


def outer_tensors(config: ModelConfig) -> DenseTensors:
    """Embedding, final norm and head."""
    V, D = config.vocab_size, config.hidden_size
    tensors: DenseTensors = {
        "embedding": (Part("model.embed_tokens.weight", (V, D)),),
        "norm.weight": (Part("model.norm.weight", (D,)),),
    }
    if not config.tie_embeddings:
        tensors["head"] = (Part("lm_head.weight", (V, D)),)
    return tensors


def per_expert_source(config: ModelConfig, hub: str, names: tuple[str, str, str]) -> ExpertSource:
    """One tensor per projection of the expert at `hub`; `names` are its gate, up and down projections."""
    D, F = config.hidden_size, config.expert_hidden
    gate, up, down = (f"{hub}.{name}.weight" for name in names)
    return ExpertSource((Part(gate, ((config.ffn_in_factor - 1) * F, D)), Part(up, (F, D))), Part(down, (D, F)))


def fused_source(config: ModelConfig, hub: str, expert: int) -> ExpertSource:
    """The stacks `gate_up_proj` and `down_proj` that transformers 5 keeps in memory and can save."""
    E = config.num_experts
    return ExpertSource(
        (Part(f"{hub}.gate_up_proj", (E, *config.expert_in_shape), expert),),
        Part(f"{hub}.down_proj", (E, *config.expert_out_shape), expert),
    )
