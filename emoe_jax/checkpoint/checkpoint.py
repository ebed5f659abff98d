"""A checkpoint on disk: its configuration, its weights by the decoder's names, its experts one at a time."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from emoe_jax.checkpoint.family import ExpertSource, Family, Part
from emoe_jax.checkpoint.files import open_weights
from emoe_jax.checkpoint.safetensors import WEIGHT_DTYPES, SafetensorsFile
from emoe_jax.checkpoint.stored_weights import StoredWeights
from emoe_jax.config import ModelConfig
from emoe_jax.errors import CheckpointError
from emoe_jax.experts.record_format import RecordFormat, quantised_matrix
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
        names = {self.family.canonical(name): name for name in files}
        by_canonical = {canonical: files[name] for canonical, name in names.items()}
        self.weights = StoredWeights(directory, by_canonical, names, config.expert_format)
        self._dense = self.family.dense_tensors(config)
        for parts in self._dense.values():
            for part in parts:
                self.weights.check_dense(part)
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

    def read_expert(self, moe_index: int, expert: int, record: np.ndarray, record_format: RecordFormat) -> None:
        """Fill one contiguous record with expert `expert` of the `moe_index`-th MoE layer, in a format.

        One copy where format and dtype are those of the file. Where they are not, host memory holds at most one of the
        expert's projections besides. Raises `CheckpointError` where the file was changed since it was opened, for
        weights or scales that are not finite, as a file may have been overwritten without a trace, and for a quantised
        format that is neither int8 nor that of the file.
        """
        source = self._sources[moe_index][expert]
        views = dict(zip((array.name for array in record_format.arrays), record_format.views(record), strict=True))
        for name, parts in zip(("in", "out"), source.projections, strict=True):
            row = scale_row = 0
            for part in parts:
                out = views[f"w_{name}"][row : row + part.rows]
                if record_format.is_quantised:
                    scales = views[f"{name}_scales"][scale_row:]
                    scale_row += self._read_quantised(part, out, scales, record_format.name)
                else:
                    self.weights.read_plain(part, out)
                row += part.rows
        for name, part in zip(("b_in", "b_out"), source.biases, strict=False):
            self.weights.read((part,), views[name])
            self.weights.check_finite(part, views[name])

    def _read_quantised(self, part: Part, numbers: np.ndarray, scales: np.ndarray, name: str) -> int:
        """Rows of an expert, and the first of these scales. Returns how many rows of scales these are."""
        _, ((count, *_), _) = quantised_matrix(name, part.matrix)
        if name == "int8":
            self.weights.read_int8(part, numbers, scales[:count])
        elif name == self.config.expert_format:
            self.weights.read_stored(part, numbers, scales[:count])
        else:
            stored = self.config.expert_format or self.config.dtype
            raise CheckpointError(
                f"{self.directory} has experts in {stored}, of which {name} is not made; expected int8 or a float dtype"
            )
        return count

    @property
    def expert_sources(self) -> Iterator[ExpertSource]:
        """Where the weights of each expert are, layer by layer."""
        return itertools.chain.from_iterable(self._sources)

    @property
    def other_tensors(self) -> Iterator[tuple[SafetensorsFile, str]]:
        """Files and names of all tensors that are not experts'."""
        experts = {part.name for source in self.expert_sources for part in self._stored(source)}
        return ((self.weights.files[key], name) for key, name in self.weights.names.items() if key not in experts)

    def load_dense(self, abstract: nnx.State, dtype: str | np.dtype, progress: Progress | None = None) -> nnx.State:
        """Everything but the experts on the default device, as the state of which `abstract` has the shapes.

        Arrays are of `dtype`, but for those that are marked `keeps_float32`.

        Reads one tensor at a time, so host memory holds at most the largest of them.
        """
        total, done = self.dense_bytes, 0
        flat = []
        for path, variable in nnx.to_flat_state(abstract):
            parts = self._dense[".".join(map(str, path))]
            keeps_float32 = variable.get_metadata().get("keeps_float32", False)
            host = np.empty(variable.shape, np.dtype(np.float32 if keeps_float32 else dtype))
            self.weights.read_dense(parts, host)
            flat.append((path, variable.replace(jax.block_until_ready(jax.device_put(host)))))
            done += sum(self._bytes(part) for part in parts)
            if progress is not None:
                progress(done, total)
        return nnx.from_flat_state(flat)

    def _stored_dtype(self) -> str:
        (embedding,) = self._dense["embedding"]
        file, name = self.weights.located(embedding)
        return WEIGHT_DTYPES[file.tensors[name].dtype].name

    def _bytes(self, part: Part) -> int:
        file, name = self.weights.located(part)
        stored = file.tensors[name].stop - file.tensors[name].start
        return stored * part.rows // part.whole.rows

    def _pick_source(self, layer: int, expert: int) -> ExpertSource:
        """The first layout of which all tensors exist, its shapes checked."""
        sources = self.family.expert_sources(self.config, layer, expert)
        for source in sources:
            numbers = [self.weights.expert_tensors(part)[0] for parts in source.projections for part in parts]
            if all(part in self.weights for part in (*numbers, *source.biases)):
                for part in source.w_in:
                    self.weights.check_expert(part, self.config.ffn_in_factor // len(source.w_in))
                self.weights.check_expert(source.w_out)
                for part in source.biases:
                    self.weights.check(part)
                return source
        weights = (part for parts in sources[0].projections for part in parts)
        missing = next((part for part in weights if self.weights.expert_tensors(part)[0] not in self.weights), None)
        if missing is None:
            bias = next(part for part in sources[0].biases if part not in self.weights)
            problem = f"{self.directory}: tensor {bias.name} is missing"
        else:
            problem = self.weights.missing(missing)
        raise CheckpointError(f"{problem} (expert {expert} of layer {layer})")

    def _stored(self, source: ExpertSource) -> tuple[Part, ...]:
        """All tensors of an expert, scales included."""
        weights = (part for parts in source.projections for part in parts)
        return (*(stored for part in weights for stored in self.weights.expert_tensors(part)), *source.biases)

    def _refuse_unknown(self) -> None:
        """A tensor that nothing reads means that the model on disk is not the one that would be computed."""
        dense = (part for parts in self._dense.values() for part in parts)
        used = {stored.name for part in dense for stored in self.weights.dense_tensors(part)}
        used |= {part.name for source in self.expert_sources for part in self._stored(source)}
        for canonical, name in self.weights.names.items():
            if canonical in used or name.endswith(_DERIVED_SUFFIXES) or self.family.ignored(self.config, name):
                continue
            if name == "lm_head.weight" and self.config.tie_embeddings:
                self._check_tied(self.weights.files[canonical], name)
                continue
            path = self.weights.files[canonical].path
            raise CheckpointError(f"{path}: tensor {name} is not part of {self.family.name}")

    def _check_tied(self, file: SafetensorsFile, head: str) -> None:
        embedding = "model.embed_tokens.weight"
        if not file.same_bytes(head, self.weights.files[embedding], embedding):
            raise CheckpointError(
                f"{file.path}: {head} differs from {embedding}, though config.json says tie_word_embeddings"
            )
