"""What a predictor is for and how large it is: one frozen description, stored beside its weights."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from emoe_jax.errors import EmoeError

FORMAT = 2
"""Of a predictor's directory. Another one is refused."""
VARIANTS = ("all-layer", "layer-by-layer")
ARCHITECTURES = ("xlnet", "gpt2", "bert")


class PredictorError(EmoeError):
    """A predictor directory is missing, damaged, or of another model than the one it is used with."""


@dataclasses.dataclass(frozen=True)
class PredictorConfig:
    """`variant` is eMoE-A (all layers from the prompts before, eMoE eq. 1) or eMoE-L (each layer also from the routing
    of those before it, once that is known).

    `arch` is how layers see each other: two-way with relative positions and a permutation objective (xlnet), only
    earlier layers (gpt2), or two-way with masked layers (bert). `members` networks of the same form are averaged;
    with 0 closed forms predict alone.
    """

    num_layers: int
    num_experts: int
    top_k: int
    embedding_dim: int = 0  # 0: prompts come without an embedding
    variant: str = "layer-by-layer"
    arch: str = "xlnet"
    width: int = 32
    heads: int = 4
    blocks: int = 2
    members: int = 3
    token_runs: int = 1 << 17  # of each length whose routing is kept, at most
    first_tokens: int = 16  # how many answer tokens the with-answer prediction was trained on
    tokens: bool = False  # whether prompts' tokens are read
    prior_widths: tuple[float, float] | None = None  # of the priors' kernels; chosen anew where they are not known

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise PredictorError(f"variant is {self.variant!r}; it must be one of {', '.join(VARIANTS)}")
        if self.arch not in ARCHITECTURES:
            raise PredictorError(f"arch is {self.arch!r}; it must be one of {', '.join(ARCHITECTURES)}")
        for name in ("num_layers", "num_experts", "top_k", "width", "heads", "blocks", "token_runs", "first_tokens"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise PredictorError(f"{name} is {getattr(self, name)!r}; it must be a positive integer")
        if type(self.members) is not int or self.members < 0:
            raise PredictorError(f"members is {self.members!r}; it must be 0 or more")
        if type(self.tokens) is not bool:
            raise PredictorError(f"tokens is {self.tokens!r}; it must be true or false")
        if type(self.embedding_dim) is not int or self.embedding_dim < 0:
            raise PredictorError(f"embedding_dim is {self.embedding_dim!r}; it must be 0 or more")
        widths = self.prior_widths
        if widths is not None and not (
            isinstance(widths, tuple) and len(widths) == 2 and all(map(_is_positive, widths))
        ):
            raise PredictorError(f"prior_widths are {widths!r}; they must be two positive numbers")
        if self.top_k > self.num_experts:
            raise PredictorError(f"top_k is {self.top_k} of {self.num_experts} experts")
        if self.width % self.heads:
            raise PredictorError(f"width {self.width} is no multiple of the {self.heads} heads")

    def describe(self) -> str:
        """The model's shape for messages: `16 MoE layers of 64 experts, top-8`."""
        return f"{self.num_layers} MoE layers of {self.num_experts} experts, top-{self.top_k}"

    def check_model(self, num_layers: int, num_experts: int, top_k: int, what: str) -> None:
        """Raise `PredictorError` where `what` (a model, a trace) is not of this predictor's shape."""
        if (num_layers, num_experts, top_k) != (self.num_layers, self.num_experts, self.top_k):
            raise PredictorError(
                f"the predictor was trained for {self.describe()}; "
                f"{what} has {num_layers} MoE layers of {num_experts} experts, top-{top_k}"
            )

    def check_embedding(self, dim: int, what: str) -> None:
        """Raise `PredictorError` where `what` has prompt embeddings of another size. A `dim` of 0, none, is fine."""
        if dim not in (0, self.embedding_dim):
            raise PredictorError(
                f"the predictor was trained on prompt embeddings of {self.embedding_dim} numbers; {what} has {dim}"
            )

    def to_json(self) -> dict[str, Any]:
        """What `load` reads: the fields, and the number of the format."""
        return {"format": FORMAT, **dataclasses.asdict(self)}

    @staticmethod
    def load(path: Path) -> PredictorConfig:
        """Raises `PredictorError` where the file is missing or is not one."""
        try:
            values = json.loads(path.read_text())
        except FileNotFoundError:
            raise PredictorError(f"{path.parent} holds no predictor ({path.name} is missing)") from None
        except (OSError, ValueError) as error:
            raise PredictorError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
        if isinstance(values, dict) and values.pop("format", 1) != FORMAT:
            raise PredictorError(
                f"{path} describes a predictor of another format than {FORMAT}; "
                "`python -m train.predictor --traces FILE --out DIR` makes one of this format"
            )
        names = {field.name for field in dataclasses.fields(PredictorConfig)}
        if not isinstance(values, dict) or {*values, "prior_widths", "tokens", "token_runs"} != names:
            raise PredictorError(f"{path} is not the description of a predictor")
        if isinstance(values.get("prior_widths"), list):
            values["prior_widths"] = tuple(values["prior_widths"])
        return PredictorConfig(**values)


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf
