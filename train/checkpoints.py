"""Orbax checkpoints of a training run: saved as it goes, restored after a kill."""

import shutil
from pathlib import Path
from typing import Any, TypeVar

import jax
from orbax.checkpoint import v1 as ocp

State = TypeVar("State")


class Checkpoints:
    """The newest checkpoints of a run in a directory, one folder per step. A state is any pytree with a `step`."""

    def __init__(self, directory: Path, keep: int = 2) -> None:
        self.directory = directory.absolute()
        self.keep = keep

    def steps(self) -> list[int]:
        """Steps that have a complete checkpoint, ascending: Orbax renames a folder into place when it is whole."""
        return sorted(int(path.name) for path in self.directory.glob("*") if path.name.isdigit())

    def save(self, state: Any) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        ocp.save(str(self.directory / str(int(state.step))), _named(state), overwrite=True)
        for step in self.steps()[: -self.keep]:
            shutil.rmtree(self.directory / str(step))

    def restore(self, fresh: State) -> State:
        """The newest checkpoint, or `fresh` itself where there is none."""
        steps = self.steps()
        if not steps:
            return fresh
        wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), fresh)
        loaded = ocp.load(str(self.directory / str(steps[-1])), _named(wanted))
        return jax.tree.unflatten(jax.tree.structure(fresh), [loaded[name] for name in _named(fresh)])


def _named(state: Any) -> dict[str, Any]:
    """The state's arrays under their paths, in the tree's order."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree.leaves_with_path(state)
    }
