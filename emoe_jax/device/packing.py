"""Several small arrays in one buffer, so that they cross between host and device in one copy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

Field = tuple[tuple[int, ...], Any]
"""The shape and dtype of an array."""

_WORD = 4
"""Bytes. The buffer is of 32-bit words, and every array begins with one."""


class Packing:
    """Where arrays of known shapes lie in one buffer of 32-bit words, in the order given.

    Dtypes of 1, 2 and 4 bytes. Booleans take a byte each.
    """

    def __init__(self, **fields: Field):
        self.fields: dict[str, Field] = {name: (shape, np.dtype(dtype)) for name, (shape, dtype) in fields.items()}
        self._places: dict[str, slice] = {}
        """By name: the words of an array."""
        self.words = 0
        """Of the whole buffer."""
        for name, (shape, dtype) in self.fields.items():
            first, self.words = self.words, self.words - (-math.prod(shape) * dtype.itemsize // _WORD)
            self._places[name] = slice(first, self.words)

    def empty(self) -> Int32[np.ndarray, " words"]:
        """A buffer in which every array is zero."""
        return np.zeros(self.words, np.int32)

    def words_before(self, name: str) -> int:
        """Where an array begins."""
        return self._places[name].start

    def views(self, buffer: Int32[np.ndarray, " words"]) -> dict[str, np.ndarray]:
        """The arrays in a buffer on the host. Writing to one writes to the buffer, if that may be written to."""
        arrays = {}
        for name, (shape, dtype) in self.fields.items():
            words = buffer[self._places[name]]
            if dtype.itemsize == _WORD:
                arrays[name] = (words if dtype == words.dtype else words.view(dtype)).reshape(shape)
            else:
                arrays[name] = words.view(dtype)[: math.prod(shape)].reshape(shape)
        return arrays

    def unpack(self, buffer: Int32[Array, " words"]) -> dict[str, Array]:
        """The arrays in a buffer on the device, while a function is traced."""
        return {name: self._unpacked(buffer, name) for name in self.fields}

    def pack(self, arrays: Mapping[str, Array]) -> Int32[Array, " words"]:
        """The buffer with these arrays, while a function is traced. Raises `ValueError` for another shape."""
        parts = []
        for name, (shape, dtype) in self.fields.items():
            array = jnp.asarray(arrays[name]).astype(dtype)
            if array.shape != shape:
                raise ValueError(f"{name} has the shape {array.shape} where {shape} is packed")
            parts.append(_as_words(array.reshape(-1)))
        return jnp.concatenate(parts)

    def _unpacked(self, buffer: Array, name: str) -> Array:
        shape, dtype = self.fields[name]
        size, words = math.prod(shape), buffer[self._places[name]]
        stored = np.dtype(np.uint8) if dtype == np.bool_ else dtype
        array = jax.lax.bitcast_convert_type(words, stored).reshape(-1)[:size].reshape(shape)
        return array.astype(jnp.bool_) if dtype == np.bool_ else array


def _as_words(array: Array) -> Array:
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    per_word = _WORD // array.dtype.itemsize
    if per_word > 1:
        array = jnp.pad(array, (0, -array.shape[0] % per_word)).reshape(-1, per_word)
    return jax.lax.bitcast_convert_type(array, jnp.int32)
