"""The strict reader of `config.json` that all family files use. It refuses keys that no family file reads."""

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from emoe_jax.checkpoint.quantisation import KEY as QUANTISATION
from emoe_jax.checkpoint.quantisation import stored_expert_format
from emoe_jax.config import RopeConfig
from emoe_jax.errors import ConfigError
from emoe_jax.models.hf_keys import IRRELEVANT, NEUTRAL, is_bookkeeping, is_neutral

log = logging.getLogger("emoe_jax")

_ACTIVATIONS: dict[str, Literal["silu", "gelu", "gelu_tanh", "relu"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}

_DTYPES = ("float32", "float16", "bfloat16")

# Options of each scaling rule; a rule's required ones are marked True.
_ROPE_OPTIONS: dict[str, dict[str, bool]] = {
    "default": {},
    "linear": {"factor": True},
    "llama3": {
        "factor": True,
        "low_freq_factor": True,
        "high_freq_factor": True,
        "original_max_position_embeddings": False,
    },
    "yarn": {
        "factor": False,
        "original_max_position_embeddings": False,
        "beta_fast": False,
        "beta_slow": False,
        "attention_factor": False,
        "mscale": False,
        "mscale_all_dim": False,
        "truncate": False,
    },
}


class HfConfig:
    """Reads a `config.json` key by key and, in `finish`, refuses the keys that were not read."""

    def __init__(
        self,
        family: str,
        raw: Mapping[str, Any],
        aliases: Mapping[str, str] | None = None,
        formats: Sequence[str] = (),
    ):
        """`aliases` maps an older name of a key to the name under which it is read. `formats` are the quantised ones
        that checkpoints of the family are published in."""
        self._family = family
        self._raw: dict[str, Any] = {}
        self._read: set[str] = set()
        for key, value in raw.items():
            name = (aliases or {}).get(key, key)
            if name in self._raw and self._raw[name] != value:
                raise ConfigError(f"config.json: {key} = {value!r} contradicts {name} = {self._raw[name]!r}")
            self._raw[name] = value
        self.expert_format = stored_expert_format(self._raw.pop(QUANTISATION, None), family, formats)
        """What experts are stored in where they are quantised."""

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

    def count(self, key: str, default: int) -> int:
        """An integer that is not negative; `default` when absent or null."""
        value = self.get(key, int, default)
        if value < 0:
            raise ConfigError(f"config.json: {key} is {value}; expected 0 or more")
        return value

    def optional_size(self, key: str, default: int | None = None) -> int | None:
        """A positive integer; `default` when absent, None when null."""
        if key in self._raw and self._raw[key] is None:
            self._read.add(key)
            return None
        return default if key not in self._raw else self.size(key)

    def number(self, key: str, default: float) -> float:
        """A finite number as a float; `default` when absent or null. Raises `ConfigError` otherwise."""
        return _finite(key, self.get(key, (int, float), default))

    def positive(self, key: str, default: float) -> float:
        """A finite number above 0; `default` when absent or null. Raises `ConfigError` otherwise."""
        value = self.number(key, default)
        if value <= 0:
            raise ConfigError(f"config.json: {key} is {value}; expected a positive number")
        return value

    def must_be(self, key: str, *allowed: Any) -> None:
        """Refuse any value but those allowed (null and absence are allowed)."""
        self._read.add(key)
        value = self._raw.get(key)
        if value is not None and value not in allowed:
            wanted = " or ".join(repr(a) for a in allowed) or "null"
            raise ConfigError(f"config.json: {key} = {value!r} is not supported by {self._family}; supported: {wanted}")

    def ignore(self, *keys: str) -> None:
        """Keys of this family that cannot change a forward."""
        self._read.update(keys)

    def activation(self, default: str = "silu") -> Literal["silu", "gelu", "gelu_tanh", "relu"]:
        """`hidden_act` under this project's name for it. Raises `ConfigError` for one that is not supported."""
        name = self.get("hidden_act", str, default)
        if name not in _ACTIVATIONS:
            known = ", ".join(sorted(_ACTIVATIONS))
            raise ConfigError(f"config.json: hidden_act = {name!r} is not supported; supported: {known}")
        return _ACTIVATIONS[name]

    def kv_heads(self, heads: int, default: int | None = None) -> int:
        """`num_key_value_heads`: null means one per query head, absence the family's default."""
        return self.optional_size("num_key_value_heads", default) or heads

    def top_k(self, num_experts: int, default: int, key: str = "num_experts_per_tok") -> int:
        """Experts per token, at most all of them."""
        value = self.size(key, default)
        if value > num_experts:
            raise ConfigError(f"config.json: {key} is {value}; a layer has {num_experts} experts")
        return value

    def token_ids(self, key: str, default: int | None = None) -> tuple[int, ...]:
        """Token ids of `key`: none when null, `default` when absent."""
        if key not in self._raw and default is not None:
            return (default,)
        value = self.get(key, (int, list))
        ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
        if not all(type(i) is int for i in ids):
            raise ConfigError(f"config.json: {key} is {value!r}; expected token ids")
        return ids

    def token_id(self, key: str, default: int | None = None) -> int | None:
        """The first token id of `key`; None when null, `default` when absent. Raises `ConfigError` for other values."""
        ids = self.token_ids(key, default)
        return ids[0] if ids else None

    def indices(self, key: str, stop: int) -> tuple[int, ...]:
        """A list of layer indices below `stop`, empty when absent."""
        value = self.get(key, list, [])
        if not all(type(i) is int and 0 <= i < stop for i in value):
            raise ConfigError(f"config.json: {key} is {value!r}; expected layer indices below {stop}")
        return tuple(value)

    @property
    def dtype(self) -> str:
        """`dtype`, or the older `torch_dtype`, without `torch.`; float32 where neither is set.

        Raises `ConfigError` for a dtype that is not supported.
        """
        value = self._raw.get("dtype") or self._raw.get("torch_dtype") or "float32"
        name = str(value).removeprefix("torch.")
        if name not in _DTYPES:
            raise ConfigError(f"config.json: dtype = {value!r} is not supported; supported: {', '.join(_DTYPES)}")
        return name

    def decoder(
        self,
        norm_eps: float,
        max_position: int,
        theta: float = 10000.0,
        rotated_part: float | None = None,
        head_dim: int | None = None,
    ) -> dict[str, Any]:
        """The fields of `ModelConfig` that all Llama-like families spell alike; arguments are a family's defaults.

        Without `head_dim` each head has its part of the width. `rotated_part` is the default of `partial_rotary_factor`
        in families that rotate a part of each head.
        """
        heads, hidden = self.size("num_attention_heads"), self.size("hidden_size")
        max_position = self.size("max_position_embeddings", max_position)
        head_dim = self.optional_size("head_dim", head_dim) or max(1, hidden // heads)
        rope = self.rope(max_position, theta, rotated_part)
        return {
            "family": self._family,
            "vocab_size": self.size("vocab_size"),
            "hidden_size": hidden,
            "num_layers": self.size("num_hidden_layers"),
            "num_heads": heads,
            "head_dim": head_dim,
            "max_position": _context_length(rope, max_position),
            "norm_eps": self.positive("rms_norm_eps", norm_eps),
            "rope": rope,
            "attention_scale": head_dim**-0.5,
            "activation": self.activation(),
            "tie_embeddings": self.get("tie_word_embeddings", bool, False),
            "dtype": self.dtype,
            "expert_format": self.expert_format,
        }

    def rope(self, max_position: int, default_theta: float = 10000.0, rotated_part: float | None = None) -> RopeConfig:
        """`rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (before; takes precedence)."""
        theta = self.positive("rope_theta", default_theta)
        parameters, scaling = self.get("rope_parameters", dict), self.get("rope_scaling", dict)
        raw = {key: value for key, value in (scaling or parameters or {}).items() if value is not None}
        theta = _finite("rope theta", raw.pop("rope_theta", theta))
        kind = raw.pop("rope_type", raw.get("type", "default"))
        raw.pop("type", None)
        if rotated_part is not None:
            rotated_part = self.positive("partial_rotary_factor", rotated_part)
        fraction = _finite("partial_rotary_factor", raw.pop("partial_rotary_factor", rotated_part or 1.0))
        if fraction != 1 and (rotated_part is None or not 0 < fraction < 1):
            supported = "1.0" if rotated_part is None else "more than 0, at most 1.0"
            raise ConfigError(
                f"config.json: partial_rotary_factor {fraction} is not supported by {self._family}; "
                f"supported: {supported}"
            )
        if kind not in ("default", "linear", "llama3", "yarn"):
            known = ", ".join(_ROPE_OPTIONS)
            raise ConfigError(f"config.json: rope scaling {kind!r} is not supported; supported: {known}")
        return dataclasses.replace(_rope(kind, theta, raw, max_position), fraction=fraction)

    def window(self, key: str = "sliding_window") -> int | None:
        """A window that every layer has, unless `use_sliding_window` switches off the value that is kept."""
        window = self.optional_size(key)
        return window if self.get("use_sliding_window", bool, True) else None

    def layer_kinds(self, layers: int, usual: Sequence[str]) -> Sequence[str]:
        """Of each layer `full_attention` or `sliding_attention`: as `layer_types` says, or as is `usual`."""
        kinds = self.get("layer_types", list, usual)
        if len(kinds) != layers or any(kind not in ("full_attention", "sliding_attention") for kind in kinds):
            raise ConfigError(
                f"config.json: layer_types is {kinds!r}; expected full_attention or sliding_attention "
                f"for {layers} layers"
            )
        return kinds

    def same_attention(self, layers: int, window: int | None) -> None:
        """Refuse `layer_types` that do not say of every layer what holds for all in this family."""
        kinds = self.get("layer_types", list)
        expected = "full_attention" if window is None else "sliding_attention"
        if kinds is not None and kinds != [expected] * layers:
            raise ConfigError(
                f"config.json: layer_types is {kinds!r}; {self._family} supports {expected} in all of {layers} layers"
            )

    def finish(self) -> None:
        """Raise `ConfigError` for any key that was not read and may change a forward. Warn of keys that cannot."""
        for key in NEUTRAL.keys() - self._read:
            self.must_be(key, NEUTRAL[key])
        unread = {key: value for key, value in self._raw.items() if key not in self._read and value is not None}
        unread = {key: value for key, value in unread.items() if key not in IRRELEVANT and not is_neutral(key, value)}
        unknown = sorted(key for key in unread if not is_bookkeeping(key))
        if unknown:
            raise ConfigError(
                f"config.json: option {unknown[0]!r} is not supported by {self._family}"
                + (f" (nor {', '.join(unknown[1:])})" if unknown[1:] else "")
            )
        if unread:
            log.warning("config.json: ignored, as it says nothing of what is computed: %s", ", ".join(sorted(unread)))


def _finite(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"config.json: {key} is {value!r}; expected a finite number")
    return float(value)


def _rope(
    kind: Literal["default", "linear", "llama3", "yarn"], theta: float, raw: dict[str, Any], max_position: int
) -> RopeConfig:
    """Check a scaling rule's own options; every option that is not understood is refused."""
    options = _ROPE_OPTIONS[kind]
    for key in sorted(set(raw) - set(options)):
        raise ConfigError(f"config.json: rope option {key!r} is not supported for {kind!r} scaling")
    for key, required in options.items():
        if required and key not in raw:
            raise ConfigError(f"config.json: rope option {key!r} is missing; {kind!r} scaling needs it")
    truncate = raw.pop("truncate", True)
    if not isinstance(truncate, bool):
        raise ConfigError(f"config.json: rope option 'truncate' is {truncate!r}; expected bool")
    numbers = {key: _finite(f"rope option {key!r}", value) for key, value in raw.items()}
    if any(value <= 0 for value in (theta, *numbers.values())):
        raise ConfigError(f"config.json: rope theta {theta} and options {raw} must be positive")
    original = numbers.get("original_max_position_embeddings", max_position)
    factor = numbers.get("factor", max_position / original)
    if factor < 1.0:
        raise ConfigError(f"config.json: rope factor is {factor}; expected at least 1")
    attention_factor = all_dim_factor = 1.0
    if kind == "yarn":
        attention_factor = numbers.get("attention_factor", _yarn_attention_factor(factor, numbers))
        if "mscale_all_dim" in numbers:
            all_dim_factor = _yarn_term(factor, numbers["mscale_all_dim"])
    return RopeConfig(
        theta=theta,
        kind=kind,
        factor=factor,
        original_max_position=int(original),
        low_freq_factor=numbers.get("low_freq_factor", 1.0),
        high_freq_factor=numbers.get("high_freq_factor", 4.0),
        beta_fast=numbers.get("beta_fast", 32.0),
        beta_slow=numbers.get("beta_slow", 1.0),
        attention_factor=attention_factor,
        all_dim_factor=all_dim_factor,
        truncate=truncate,
    )


def _context_length(rope: RopeConfig, max_position: int) -> int:
    """Tokens that a model is made for, of `max_position_embeddings` and its scaling rule, as vLLM derives it.

    YaRN stretches the original length, whatever `max_position_embeddings` is; linear scaling stretches
    `max_position_embeddings`. In checkpoints of the other rules `max_position_embeddings` is the stretched length.
    """
    original = {"yarn": rope.original_max_position, "linear": max_position}.get(rope.kind)
    if original is None:
        return max_position
    length = int(round(original * rope.factor, 6))  # a factor may be a quotient that was rounded
    if length >= 2**31:
        raise ConfigError(f"config.json: rope factor {rope.factor} makes a context of {length} tokens of {original}")
    return length


def _yarn_attention_factor(factor: float, options: Mapping[str, float]) -> float:
    """YaRN's temperature: `0.1 ln(factor) + 1`, or the ratio of two such terms with `mscale` factors."""
    if "mscale" in options and "mscale_all_dim" in options:
        return _yarn_term(factor, options["mscale"]) / _yarn_term(factor, options["mscale_all_dim"])
    return _yarn_term(factor, 1.0)


def _yarn_term(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
