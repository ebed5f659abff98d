"""The weights of a checkpoint's files by name: checked, read as they are stored, or made floats."""

from pathlib import Path
from typing import NoReturn

import numpy as np
from jaxtyping import Float, Int8, Num

from emoe_jax.checkpoint.family import Part
from emoe_jax.checkpoint.safetensors import STORED_DTYPES, WEIGHT_DTYPES, SafetensorsFile, are_finite
from emoe_jax.checkpoint.stored_format import stored_tensors
from emoe_jax.errors import CheckpointError
from emoe_jax.experts.blocks import (
    FP8_BLOCK,
    MXFP4_BLOCK,
    MXFP4_NAN,
    dequantise_fp8_into,
    dequantise_mxfp4_into,
    has_fp8_nan,
)
from emoe_jax.experts.quantise import dequantise_into, quantise_into
from emoe_jax.experts.record_format import quantised_matrix

_DEQUANTISE = {"int8": dequantise_into, "fp8": dequantise_fp8_into, "mxfp4": dequantise_mxfp4_into}


class StoredWeights:
    """Parts of our arrays as the files have them. Its methods may be called from several threads."""

    def __init__(
        self, directory: Path, files: dict[str, SafetensorsFile], names: dict[str, str], expert_format: str | None
    ):
        """`files` and `names` are by the canonical name of a tensor: the file that has it, and its name there."""
        self.directory = directory
        self.files = files
        self.names = names
        self.expert_format = expert_format

    def __contains__(self, part: Part) -> bool:
        return part.name in self.files

    def located(self, part: Part) -> tuple[SafetensorsFile, str]:
        """The file that has a part's tensor, and the tensor's name there."""
        return self.files[part.name], self.names[part.name]

    def expert_tensors(self, part: Part) -> tuple[Part, ...]:
        """What the checkpoint has for a weight of an expert: its numbers, and their scales."""
        return tuple(tensor.part for tensor in stored_tensors(part, self.expert_format))

    def file_dtype(self, part: Part) -> str:
        """The dtype of a tensor as its file spells it."""
        file, name = self.located(part)
        return file.tensors[name].dtype

    def dense_tensors(self, part: Part) -> tuple[Part, ...]:
        """What the checkpoint has for a weight that is not an expert's: floats, or FP8 with scales like its experts."""
        may_be_fp8 = self.expert_format == "fp8" and len(part.shape) == 2 and part in self
        return self.expert_tensors(part) if may_be_fp8 and self.file_dtype(part) == "F8_E4M3" else (part,)

    def check(self, part: Part) -> None:
        """That a float tensor is there, of the right shape. Raises `CheckpointError`."""
        self._check(part, tuple(WEIGHT_DTYPES))

    def check_dense(self, part: Part) -> None:
        """That the tensors of a weight that is not an expert's are there, of the right shapes and dtypes."""
        if self.dense_tensors(part) == (part,):
            self.check(part)
        else:
            self.check_expert(part)

    def read_dense(self, parts: tuple[Part, ...], out: Float[np.ndarray, "..."]) -> None:
        """Fill `out` with the rows of these parts, one after the other. FP8 becomes floats: one part at a time."""
        row = 0
        for part in parts:
            target = out[row : row + part.rows]
            if part.band is not None:
                stored = np.empty(part.whole.matrix, out.dtype)
                self.read_dense((part.whole,), stored)
                target[:] = part.band.of(stored).reshape(target.shape)
            elif self.dense_tensors(part) == (part,):
                self.read((part,), target)
            else:
                self.read_plain(part, target)
            row += part.rows

    def check_expert(self, part: Part, parts: int = 1) -> None:
        """That the tensors of a weight of an expert are there, of the right shapes and dtypes.

        The weight may be `parts` matrices, such as a gate above its up projection: blocks must not be of both.
        """
        self._check_blocks(part, parts)
        numbers, *scales = stored_tensors(part, self.expert_format)
        self._check(numbers.part, numbers.dtypes)
        for tensor in scales:
            if tensor.part not in self:
                file, name = self.located(numbers.part)
                raise CheckpointError(
                    f"{file.path}: tensor {tensor.part.name} is missing; {self._says}, so {name} has scales"
                )
            self._check(tensor.part, tensor.dtypes)

    def missing(self, part: Part) -> str:
        """What is wrong where a tensor of a weight of an expert is not there, with what is there instead."""
        numbers, *_ = self.expert_tensors(part)
        packed = Part(f"{part.name}_blocks", part.shape)
        if part in self and numbers not in self:
            file, name = self.located(part)
            found = file.tensors[name].dtype
            return f"{file.path}: tensor {name} is {found}; expected {numbers.name} in its place, as {self._says}"
        if packed in self and self.expert_format != "mxfp4":
            file, name = self.located(packed)
            return (
                f"{file.path}: tensor {name} has experts in MXFP4; expected config.json to say so, with "
                '"quantization_config": {"quant_method": "mxfp4"}'
            )
        return f"{self.directory}: tensor {numbers.name} is missing"

    @property
    def _says(self) -> str:
        return f"config.json says {self.expert_format} {'weights' if self.expert_format == 'fp8' else 'experts'}"

    def _check_blocks(self, part: Part, parts: int) -> None:
        """That no block of scales is of two matrices, or ends outside of one."""
        file, name = self.located(self.expert_tensors(part)[0])
        rows, columns = part.matrix
        if self.expert_format == "fp8" and parts > 1 and rows // parts % FP8_BLOCK:
            raise CheckpointError(
                f"{file.path}: tensor {name} has a gate of {rows // parts} rows; expected a multiple of {FP8_BLOCK}, "
                "or one tensor for each projection"
            )
        if self.expert_format == "mxfp4" and columns % MXFP4_BLOCK:
            raise CheckpointError(
                f"{file.path}: tensor {name} has rows of {columns} numbers, as config.json says; expected a multiple "
                f"of {MXFP4_BLOCK}, in blocks of which MXFP4 has scales"
            )

    def read(self, parts: tuple[Part, ...], out: Num[np.ndarray, "..."]) -> None:
        """Fill `out` with the rows of these parts, one after the other, converted to its dtype."""
        row = 0
        for part in parts:
            target = out[row : row + part.rows]
            if not part.transposed:  # the bias of an expert is a matrix of one input, and blocks of bytes have an axis
                target = target.reshape(part.selected)
            file, name = self.located(part)
            if target.dtype == np.uint8:
                target = target.view(file.dtype(name))  # the bits, whatever they are of
            file.read_into(name, target, part.index, part.transposed, part.turns)
            row += part.rows

    def read_stored(self, part: Part, numbers: Num[np.ndarray, "O I"], scales: Num[np.ndarray, "..."]) -> None:
        """Rows of an expert as they are stored, where experts are quantised.

        Raises `CheckpointError` for scales that are none, as a file may have been overwritten without a trace.
        """
        stored, stored_scales = self.expert_tensors(part)
        self.read((stored,), numbers)
        self.read((stored_scales,), scales)
        if self.file_dtype(stored) == "F8_E4M3" and has_fp8_nan(numbers):
            self._refuse_values(stored)
        file, name = self.located(stored_scales)
        if scales.dtype == np.uint8:
            if np.any(scales == MXFP4_NAN):
                raise CheckpointError(
                    f"{file.path}: tensor {name} has scales of {MXFP4_NAN}, which is not a number; expected 0 to "
                    f"{MXFP4_NAN - 1}"
                )
        elif not are_finite(scales) or np.any(scales < 0):
            raise CheckpointError(
                f"{file.path}: tensor {name} has scales that are negative or not finite; expected finite numbers "
                "from 0 up"
            )

    def read_int8(self, part: Part, numbers: Int8[np.ndarray, "O I"], scales: Float[np.ndarray, " O"]) -> None:
        """Rows of an expert in int8, as they are stored, or made of the weights that are. Raises as `read_plain`."""
        if self.expert_format == "int8":
            self.read_stored(part, numbers, scales)
            return
        weights = np.empty(numbers.shape, np.float32)
        self.read_plain(part, weights)
        quantise_into(weights, numbers, scales)

    def read_plain(self, part: Part, out: Float[np.ndarray, "O I"]) -> None:
        """Rows of an expert as floats. Raises `CheckpointError` for weights or scales that are not finite."""
        if self.expert_format is None:
            self.read((part,), out)
        else:
            numbers, scales = (np.empty(*kind) for kind in quantised_matrix(self.expert_format, part.matrix))
            self.read_stored(part, numbers, scales)
            _DEQUANTISE[self.expert_format](numbers, scales, out)
        self.check_finite(self.expert_tensors(part)[0], out)

    def check_finite(self, part: Part, numbers: Float[np.ndarray, "O I"]) -> None:
        """Raises `CheckpointError` where a number that was made of a tensor is infinite or NaN."""
        if not are_finite(numbers):
            self._refuse_values(part)

    def _refuse_values(self, part: Part) -> NoReturn:
        file, name = self.located(part)
        raise CheckpointError(f"{file.path}: {name} has values that are not finite")

    def _check(self, part: Part, dtypes: tuple[str, ...]) -> None:
        if part not in self:
            raise CheckpointError(f"{self.directory}: tensor {part.name} is missing")
        file, name = self.located(part)
        info = file.tensors[name]
        if info.shape != part.shape:
            raise CheckpointError(f"{file.path}: tensor {name} has shape {info.shape}; expected {part.shape}")
        if info.dtype in dtypes:
            return
        if dtypes != tuple(WEIGHT_DTYPES):
            raise CheckpointError(
                f"{file.path}: tensor {name} is {info.dtype}; expected {' or '.join(dtypes)}, as {self._says}"
            )
        known = ", ".join(WEIGHT_DTYPES)
        hint = ""
        if info.dtype in STORED_DTYPES and self.expert_format is None:
            hint = "; quantised ones need a quantization_config in config.json"
        raise CheckpointError(f"{file.path}: tensor {name} is {info.dtype}; weights must be one of {known}{hint}")
