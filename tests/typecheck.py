"""What annotations of arrays promise, checked in every call that the tests make: dtypes, ranks, and axes that agree.

`pytest` gets this as jaxtyping's type checker for the library. Other annotations are pyright's: fakes stand in for much
that they name.
"""

import inspect
import types
import typing
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

import beartype
from beartype.roar import BeartypeDecorHintPep585DeprecationWarning
from jaxtyping import AbstractArray

F = TypeVar("F", bound=Callable[..., Any])

GENERATED = ("__init__", "check_single_arg")
"""Of dataclasses: as pytrees they also hold shapes, shardings and whatever else stands for an array."""


def arrays_only(function: F) -> F:
    """`function` with the array annotations of its parameters and its result checked by beartype, and no others."""
    if function.__name__ in GENERATED:
        return function
    kept = {name: hint for name, hint in typing.get_type_hints(function).items() if _is_of_arrays(hint)}
    if not kept:
        return function
    function.__annotations__ = kept
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BeartypeDecorHintPep585DeprecationWarning)
        return cast(F, beartype.beartype(function))


def _is_of_arrays(hint: Any) -> bool:
    """Whether a hint is an array, or a union or tuple of nothing else."""
    if inspect.isclass(hint) and issubclass(hint, AbstractArray):
        return True
    if typing.get_origin(hint) in (typing.Union, types.UnionType, tuple):
        return all(part in (type(None), Ellipsis) or _is_of_arrays(part) for part in typing.get_args(hint))
    return False
