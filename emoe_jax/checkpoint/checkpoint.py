"""A checkpoint on disk: its configuration, its weights by the decoder's names, its experts one at a time."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from emoe_jax.checkpoint.family import ExpertSource, Family, Part
from emoe_jax.checkpoint.files import open_weights
from emoe_jax.checkpoint.safetensors import WEIGHT_DTYPES, SafetensorsFile, are_finite
from emoe_jax.config import ModelConfig
from emoe_jax.errors import CheckpointError
from emoe_jax.experts.weights import ExpertLayout
from emoe_jax.progress import Progress

# Tensors that some tools save although they follow from the configuration.
_DERIVED_SUFFIXES = (".rotary_emb.inv_freq",)


class Checkpoint:
    """Opened and checked: every tensor that the model needs is there with the right shape, and nothing else is.

    Only headers have been read. `read_expert` may be called from several threads.
    """

    def __init__(self, directory: Path, family: Family, config: ModelConfig, raw_config: dict[str, Any]):
        """`config` follows from `raw_config`, the directory's `config.json`. Raises `CheckpointError` where a tensor is
        missing, of another shape, or not part of the family."""
        self.directory = directory
        self.family = family
        self.raw_config = raw_config
        files = open_weights(directory)
        self._names = {self.family.canonical(name): name for name in files}
        self._files = {canonical: files[name] for canonical, name in self._names.items()}
        self._dense = self.family.dense_tensors(config)
        for parts in self._dense.values():
            self._check(parts)
        if not (raw_config.get("dtype") or raw_config.get("torch_dtype")):
            config = config.replace(dtype=self._stored_dtype())
        self.config = config
        self._sources = [
            [self._pick_source(layer, expert) for expert in range(config.num_experts)] for layer in config.moe_layers
        ]
        self._refuse_unknown()

    @property
    def dense_bytes(self) -> int:
        """Bytes on disk of everything but the experts."""
        return sum(self._bytes(part) for parts in self._dense.values() for part in parts)

    def read_expert(self, moe_index: int, expert: int, record: np.ndarray, layout: ExpertLayout) -> None:
        """Fill one contiguous record (`ExpertLayout`) with expert `expert` of the `moe_index`-th MoE layer.

        One copy where the dtypes match. Raises `CheckpointError` where the file was changed since it was opened, and
        for weights that are not finite: a file may have been overwritten without a trace.
        """
        source = self._sources[moe_index][expert]
        for parts, out in zip(((*source.w_in,), (source.w_out,)), layout.views(record), strict=True):
            self._read(parts, out)
            if not are_finite(out):
                names = ", ".join(self._names[part.name] for part in parts)
                raise CheckpointError(f"{self._files[parts[0].name].path}: {names} has values that are not finite")

    def load_dense(self, abstract: nnx.State, dtype: str | np.dtype, progress: Progress | None = None) -> nnx.State:
        """Everything but the experts on the default device, as the state of which `abstract` has the shapes.

        Reads one tensor at a time, so host memory holds at most the largest of them.
        """
        total, done = self.dense_bytes, 0
        flat = []
        for path, variable in nnx.to_flat_state(abstract):
            parts = self._dense[".".join(map(str, path))]
            host = np.empty(variable.shape, np.dtype(dtype))
            self._read(parts, host)
            flat.append((path, variable.replace(jax.block_until_ready(jax.device_put(host)))))
            done += sum(self._bytes(part) for part in parts)
            if progress is not None:
                progress(done, total)
        return nnx.from_flat_state(flat)

    def _read(self, parts: tuple[Part, ...], out: np.ndarray) -> None:
        row = 0
        for part in parts:
            target = out[row : row + part.rows]
            self._files[part.name].read_into(self._names[part.name], target, part.index, part.transposed)
            row += part.rows

    def _stored_dtype(self) -> str:
        (embedding,) = self._dense["embedding"]
        info = self._files[embedding.name].tensors[self._names[embedding.name]]
        return WEIGHT_DTYPES[info.dtype].name

    def _bytes(self, part: Part) -> int:
        info = self._files[part.name].tensors[self._names[part.name]]
        return info.stop - info.start

    def _pick_source(self, layer: int, expert: int) -> ExpertSource:
        """The first layout of which all tensors exist, its shapes checked."""
        sources = self.family.expert_sources(self.config, layer, expert)
        for source in sources:
            if all(part.name in self._files for part in source.parts):
                self._check(source.parts)
                return source
        missing = next(part.name for part in sources[0].parts if part.name not in self._files)
        raise CheckpointError(f"{self.directory}: tensor {missing} is missing (expert {expert} of layer {layer})")

    def _check(self, parts: tuple[Part, ...]) -> None:
        for part in parts:
            if part.name not in self._files:
                raise CheckpointError(f"{self.directory}: tensor {part.name} is missing")
            file, name = self._files[part.name], self._names[part.name]
            info = file.tensors[name]
            if info.shape != part.shape:
                raise CheckpointError(f"{file.path}: tensor {name} has shape {info.shape}; expected {part.shape}")
            if info.dtype not in WEIGHT_DTYPES:
                known = ", ".join(WEIGHT_DTYPES)
                raise CheckpointError(f"{file.path}: tensor {name} is {info.dtype}; weights must be one of {known}")

    def _refuse_unknown(self) -> None:
        """A tensor that nothing reads means that the model on disk is not the one that would be computed."""
        used = {part.name for parts in self._dense.values() for part in parts}
        used |= {part.name for layer in self._sources for source in layer for part in source.parts}
        for canonical, name in self._names.items():
            if canonical in used or name.endswith(_DERIVED_SUFFIXES):
                continue
            if name == "lm_head.weight" and self.config.tie_embeddings:
                self._check_tied(self._files[canonical], name)
                continue
            raise CheckpointError(f"{self._files[canonical].path}: tensor {name} is not part of {self.family.name}")

    def _check_tied(self, file: SafetensorsFile, head: str) -> None:
        embedding = "model.embed_tokens.weight"
        if not file.same_bytes(head, self._files[embedding], embedding):
            raise CheckpointError(
                f"{file.path}: {head} differs from {embedding}, though config.json says tie_word_embeddings"
            )
