"""A checkpoint on disk: its configuration, its weights by the decoder's names, its experts one at a time."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, Int8

from emoe_jax.checkpoint.family import ExpertSource, Family, Part
from emoe_jax.checkpoint.files import open_weights
from emoe_jax.checkpoint.safetensors import WEIGHT_DTYPES, SafetensorsFile, are_finite
from emoe_jax.config import ModelConfig
from emoe_jax.errors import CheckpointError
from emoe_jax.experts.quantise import dequantise_into, quantise_into
from emoe_jax.experts.record_format import RecordFormat
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

    def read_expert(self, moe_index: int, expert: int, record: np.ndarray, layout: RecordFormat) -> None:
        """Fill one contiguous record with expert `expert` of the `moe_index`-th MoE layer, in the format `layout`.

        One copy where format and dtype are those of the file. Where they are not, host memory holds at most one of the
        expert's projections besides. Raises `CheckpointError` where the file was changed since it was opened, and for
        weights or scales that are not finite: a file may have been overwritten without a trace.
        """
        source = self._sources[moe_index][expert]
        views = layout.views(record)
        projections = views[:2]
        scales, biases = (views[2:4], views[4:]) if layout.is_quantised else ((None, None), views[2:])
        for parts, out, of_rows in zip(source.projections, projections, scales, strict=True):
            row = 0
            for part in parts:
                rows = slice(row, row + part.rows)
                if of_rows is not None:
                    self.read_quantised(part, out[rows], of_rows[rows])
                else:
                    self._read_plain(part, out[rows])
                row += part.rows
        for part, out in zip(source.biases, biases, strict=True):
            self._read((part,), out)
            self._check_finite(part, out)

    def read_quantised(self, part: Part, numbers: Int8[np.ndarray, "O I"], scales: Float[np.ndarray, " O"]) -> None:
        """Rows of an expert in int8, as they are stored, or made of the weights that are. Raises as `read_expert`."""
        if self.config.expert_format is None:
            weights = np.empty(numbers.shape, np.float32)
            self._read_plain(part, weights)
            quantise_into(weights, numbers, scales)
            return
        self._read((part,), numbers)
        self._read((part.scales,), scales)
        if not are_finite(scales) or np.any(scales < 0):
            file, name = self.located(part.scales)
            raise CheckpointError(
                f"{file.path}: tensor {name} has scales that are negative or not finite; expected finite numbers "
                "from 0 up"
            )

    def _read_plain(self, part: Part, out: Float[np.ndarray, "O I"]) -> None:
        if self.config.expert_format is None:
            self._read((part,), out)
        else:
            numbers, scales = np.empty(out.shape, np.int8), np.empty(len(out), np.float32)
            self.read_quantised(part, numbers, scales)
            dequantise_into(numbers, scales, out)
        self._check_finite(part, out)

    def _check_finite(self, part: Part, numbers: Float[np.ndarray, "O I"]) -> None:
        if not are_finite(numbers):
            file, name = self.located(part)
            raise CheckpointError(f"{file.path}: {name} has values that are not finite")

    def located(self, part: Part) -> tuple[SafetensorsFile, str]:
        """The file that has a part's tensor, and the tensor's name there."""
        return self._files[part.name], self._names[part.name]

    @property
    def expert_sources(self) -> Iterator[ExpertSource]:
        """Where the weights of each expert are, layer by layer."""
        return itertools.chain.from_iterable(self._sources)

    @property
    def other_tensors(self) -> Iterator[tuple[SafetensorsFile, str]]:
        """Files and names of all tensors that are not experts'."""
        experts = {part.name for source in self.expert_sources for part in self._stored(source)}
        return ((self._files[key], name) for key, name in self._names.items() if key not in experts)

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
            if len(part.selected) == 1:  # the bias of an expert is a matrix of one input
                target = target.reshape(-1)
            file, name = self._files[part.name], self._names[part.name]
            file.read_into(name, target, part.index, part.transposed, part.turns)
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
                if self.config.expert_format is None:
                    self._check(source.parts)
                else:
                    self._check(source.parts, "I8")
                    self._check(tuple(part.scales for part in source.parts), "F32")
                return source
        missing = next(part.name for part in sources[0].parts if part.name not in self._files)
        raise CheckpointError(f"{self.directory}: tensor {missing} is missing (expert {expert} of layer {layer})")

    def _stored(self, source: ExpertSource) -> tuple[Part, ...]:
        """All tensors of an expert, scales included."""
        scales = () if self.config.expert_format is None else tuple(part.scales for part in source.parts)
        return (*source.parts, *scales)

    def _check(self, parts: tuple[Part, ...], dtype: str | None = None) -> None:
        """That the tensors are there, of the right shape, and of `dtype`; without it, of any that weights may have."""
        for part in parts:
            if part.name not in self._files:
                expected = (
                    "" if dtype is None else f"; config.json says {self.config.expert_format} experts, with scales"
                )
                raise CheckpointError(f"{self.directory}: tensor {part.name} is missing{expected}")
            file, name = self.located(part)
            info = file.tensors[name]
            if info.shape != part.shape:
                raise CheckpointError(f"{file.path}: tensor {name} has shape {info.shape}; expected {part.shape}")
            if dtype is not None and info.dtype != dtype:
                says = f"config.json says {self.config.expert_format} experts"
                raise CheckpointError(f"{file.path}: tensor {name} is {info.dtype}; expected {dtype}, as {says}")
            if dtype is None and info.dtype not in WEIGHT_DTYPES:
                known = ", ".join(WEIGHT_DTYPES)
                raise CheckpointError(f"{file.path}: tensor {name} is {info.dtype}; weights must be one of {known}")

    def _refuse_unknown(self) -> None:
        """A tensor that nothing reads means that the model on disk is not the one that would be computed."""
        used = {part.name for parts in self._dense.values() for part in parts}
        used |= {part.name for source in self.expert_sources for part in self._stored(source)}
        for canonical, name in self._names.items():
            if canonical in used or name.endswith(_DERIVED_SUFFIXES) or self.family.ignored(self.config, name):
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
