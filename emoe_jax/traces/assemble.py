"""From the parts of a recording to one `.npz`, in memory that does not grow with the number of tokens."""

import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Int

from emoe_jax.traces.parts import TOKEN, TraceParts

BLOCK = 1 << 14
"""Rows handled at a time."""


def assemble(parts: TraceParts) -> None:
    """Write everything recorded so far to `parts.path`, which at all times is absent or a whole trace.

    Rows are sorted by prompt. Prompts of which nothing was computed are left out, and the others numbered anew.
    """
    path = parts.path
    draft, scratch = path.with_name(path.name + ".draft"), parts.directory / "sorted.bin"
    try:
        _write(parts, draft, scratch)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
        scratch.unlink(missing_ok=True)


def _write(parts: TraceParts, draft: Path, scratch: Path) -> None:
    geometry, rows, prompts = parts.geometry, parts.rows(), parts.prompts()
    counts = np.zeros(len(prompts), np.int64)
    for block in _blocks(rows):
        counts += np.bincount(block["sample"], minlength=len(prompts))
    kept = np.flatnonzero(counts)
    number = np.cumsum(counts > 0, dtype=np.int32) - 1
    rows = _sorted(rows, counts, scratch)
    tokens, P = len(rows), len(kept)
    with zipfile.ZipFile(draft, "w", zipfile.ZIP_STORED) as archive:
        for name in ("experts", "probs", "further_experts", "further_probs"):
            of_token = rows.dtype[name]
            if 0 not in of_token.shape:
                _member(
                    archive, name, of_token.base, (tokens, *of_token.shape), (block[name] for block in _blocks(rows))
                )
        samples = (number[block["sample"]] for block in _blocks(rows))
        _member(archive, "sample", np.dtype("<i4"), (tokens,), samples)
        _member(archive, "token_pos", np.dtype("<i4"), (tokens,), (block["token_pos"] for block in _blocks(rows)))
        _member(archive, "task", np.dtype("<i2"), (P,), [prompts["task"][kept]])
        _member(archive, "prompt_length", np.dtype("<i4"), (P,), [prompts["length"][kept]])
        if geometry.tokens:
            _member(archive, "prompt_tokens", TOKEN, (int(prompts["length"][kept].sum()),), _tokens(parts, kept))
        if geometry.embedding_size:
            embeddings = (prompts["embedding"][some] for some in _blocks(kept))
            _member(archive, "prompt_embedding", np.dtype("<f2"), (P, geometry.embedding_size), embeddings)
        names = np.array(parts.tasks or [], np.str_)
        _member(archive, "task_names", names.dtype, names.shape, [names])
        for name, value in (("num_experts", geometry.num_experts), ("top_k", geometry.top_k)):
            _member(archive, name, np.dtype("<i4"), (), [np.array(value, "<i4")])


def _sorted(rows: np.ndarray, counts: Int[np.ndarray, " P"], scratch: Path) -> np.ndarray:
    """The rows by prompt, in a file: prompts are computed side by side, each front to back."""
    if not len(rows):
        return rows
    result = np.memmap(scratch, rows.dtype, "w+", shape=rows.shape)
    next_free = np.cumsum(counts) - counts
    for block in _blocks(rows):
        order = np.argsort(block["sample"], kind="stable")
        present, first, occurs = np.unique(block["sample"][order], return_index=True, return_counts=True)
        rank = np.arange(len(block)) - np.repeat(first, occurs)
        result[np.repeat(next_free[present], occurs) + rank] = block[order]
        next_free[present] += occurs
    return result


def _tokens(parts: TraceParts, kept: Int[np.ndarray, " n"]) -> Iterator[np.ndarray]:
    """Token ids of these prompts."""
    ends, tokens = np.cumsum(parts.prompts()["length"], dtype=np.int64), parts.tokens()
    for some in _blocks(kept):
        yield np.concatenate([tokens[(ends[prompt - 1] if prompt else 0) : ends[prompt]] for prompt in some])


def _blocks(rows: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), BLOCK):
        yield np.asarray(rows[start : start + BLOCK])


def _member(
    archive: zipfile.ZipFile, name: str, dtype: np.dtype, shape: tuple[int, ...], data: Iterable[np.ndarray]
) -> None:
    """One array of the archive, written piece by piece."""
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for piece in data:
            file.write(np.ascontiguousarray(piece, dtype).tobytes())
