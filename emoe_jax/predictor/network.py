"""The networks of a predictor as arrays: several members stacked, run together, averaged, stored as safetensors."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from jaxtyping import Array, Float

from emoe_jax.predictor.config import PredictorConfig, PredictorError
from emoe_jax.predictor.model import Dropout, Inputs, Known, RoutingTransformer


class Sizes(NamedTuple):
    """What a network's shape depends on besides the configuration: the kernel's vocabulary and embedding rank."""

    name_features: int
    coordinates: int


Weights = dict[str, Array]  # parameters by path, each with a leading axis of members


@functools.cache
def _form(config: PredictorConfig, sizes: Sizes) -> tuple[nnx.GraphDef, dict[str, Array], Any]:
    """The module without its numbers: graph, parameters by name, their tree."""
    graph, state = nnx.split(nnx.eval_shape(lambda: RoutingTransformer(config, *sizes, rngs=nnx.Rngs(0))))
    return graph, _named(state), jax.tree.structure(state)


def _named(state: nnx.State) -> dict[str, Array]:
    leaves = jax.tree.leaves_with_path(state)
    return {
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): leaf for path, leaf in leaves
    }


def init(config: PredictorConfig, sizes: Sizes, seed: int) -> Weights:
    """Fresh weights of all members, drawn by NumPy: compiling the module's own initialisers takes longer than a run
    of the tests. Heads start at zero, so that the prior is what an untrained predictor says.
    """
    rng = np.random.default_rng(seed)

    def fresh(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name.startswith("head"):
            return np.zeros((config.members, *shape))
        if name.endswith("kernel"):
            return rng.normal(0, shape[-2] ** -0.5, (config.members, *shape))
        if name == "channels.bias":  # tells layers apart
            return rng.normal(0, 0.3, (config.members, *shape))
        if name.endswith("scale"):
            return np.ones((config.members, *shape))
        deviation = 0.02 if name.endswith("distance") else 0.0
        return rng.normal(0, 1, (config.members, *shape)) * deviation

    return {name: jnp.asarray(fresh(name, of.shape), jnp.float32) for name, of in _form(config, sizes)[1].items()}


def member_logits(
    weights: Weights,
    config: PredictorConfig,
    sizes: Sizes,
    inputs: Inputs,
    known: Known | None = None,
    drop: Dropout | None = None,
) -> Float[Array, "B M E"]:
    """Logits of one member, whose `weights` have no leading axis."""
    graph, names, tree = _form(config, sizes)
    return nnx.merge(graph, jax.tree.unflatten(tree, [weights[name] for name in names]))(inputs, known, drop)


@functools.partial(jax.jit, static_argnames=("config", "sizes"))
def distribution(
    weights: Weights, config: PredictorConfig, sizes: Sizes, inputs: Inputs, known: Known | None = None
) -> Float[Array, "B M E"]:
    """The members' mean distribution over experts."""
    logits = jax.vmap(lambda member: member_logits(member, config, sizes, inputs, known))(weights)
    return jax.nn.softmax(logits, axis=-1).mean(0)


def count(weights: Weights) -> int:
    """Numbers in all arrays, over all members."""
    return sum(leaf.size for leaf in weights.values())


def save(weights: Weights, path: Path) -> None:
    """Write the arrays to one safetensors file, replacing what is there. They are copied to the host first."""
    safetensors.numpy.save_file({name: jax.device_get(leaf) for name, leaf in weights.items()}, path)


def load(path: Path, config: PredictorConfig, sizes: Sizes) -> Weights:
    """Raises `PredictorError` where the file is missing, damaged or of another form."""
    try:
        arrays = safetensors.numpy.load_file(path)
    except FileNotFoundError:
        raise PredictorError(f"{path.parent} holds no whole predictor ({path.name} is missing)") from None
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise PredictorError(f"{path} is damaged: {' '.join(str(error).split())}") from None
    for name, wanted in _form(config, sizes)[1].items():
        shape = (config.members, *wanted.shape)
        if name not in arrays or arrays[name].shape != shape or arrays[name].dtype != wanted.dtype:
            found = list(arrays[name].shape) if name in arrays else "missing"
            raise PredictorError(f"{path} does not fit config.json: {name} is {found}, it should be {list(shape)}")
    return {name: jnp.asarray(arrays[name]) for name in _form(config, sizes)[1]}
