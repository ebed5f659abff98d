"""Lowering for CUDA on a machine without a GPU, and counts of what would stall the host there."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
from jax import export
from jax.extend.mlir import ir
from jax.interpreters.mlir import make_ir_context
from jax.sharding import AbstractDevice, AbstractMesh

_DEVICE = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
_TRITON = export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")


def export_for_cuda(jitted: Any, *arguments: Any, **statics: Any) -> export.Exported:
    """What `jitted` becomes on a GPU. JAX 0.12 wants to know which one before it lowers a Triton kernel."""
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=_DEVICE)):
        return export.export(jitted, platforms=["cuda"], disabled_checks=[_TRITON])(*arguments, **statics)


@dataclasses.dataclass(frozen=True)
class Counts:
    """What one lowered function holds. A function that several places call is counted once, as the text has it.

    On a GPU the host waits for the device in each iteration of a `traced_loops`, in each of the `conditionals` and of
    the `callbacks`. XLA knows the trips of `counted_loops` when it compiles.
    """

    traced_loops: int
    counted_loops: int
    conditionals: int
    callbacks: int
    kernels: int
    sorts: int
    arguments: int
    """Buffers per call; arguments that the function does not use are not passed."""

    @property
    def stalls(self) -> int:
        """Places at which the host would wait for the device."""
        return self.traced_loops + self.conditionals + self.callbacks

    @classmethod
    def of(cls, exported: export.Exported) -> "Counts":
        """The counts of an exported function."""
        return cls.of_text(exported.mlir_module())

    @classmethod
    def of_text(cls, text: str) -> "Counts":
        """The counts of a StableHLO module with one public function."""
        with make_ir_context():
            operations = list(_operations(ir.Module.parse(text).operation))
            names = [operation.name for operation in operations]
            counted = [
                _trips_are_constant(operation) for operation in operations if operation.name == "stablehlo.while"
            ]
            targets = [_target(operation) for operation in operations if operation.name == "stablehlo.custom_call"]
            return cls(
                traced_loops=counted.count(False),
                counted_loops=counted.count(True),
                conditionals=names.count("stablehlo.case") + names.count("stablehlo.if"),
                callbacks=sum("callback" in target for target in targets) + sum(name in _EXCHANGES for name in names),
                kernels=sum("triton" in target or "mosaic" in target for target in targets),
                sorts=names.count("stablehlo.sort"),
                arguments=sum(_parameters(operation) for operation in operations if operation.name == "func.func"),
            )


_EXCHANGES = {f"stablehlo.{name}" for name in ("infeed", "outfeed", "send", "recv")}
"""Data passes between host and device in the middle of a function."""

_SHAPING = {f"stablehlo.{name}" for name in ("broadcast_in_dim", "convert", "reshape")}
"""A constant behind one of these is a constant still."""


_CONSTANTS = {"stablehlo.constant", "stablehlo.get_dimension_size"}
"""The shapes of an exported function are known. JAX 0.12 writes the trips of a cumulative sum as such a size."""


def _operations(operation: Any) -> Iterator[Any]:
    yield operation
    for region in operation.regions:
        for block in region:
            for inner in block:
                yield from _operations(inner.operation)


def _target(call: Any) -> str:
    return str(call.attributes["call_target_name"])


def _parameters(function: Any) -> int:
    """How many arguments the public function of a module has; 0 for the others."""
    attributes = function.attributes
    visibility = str(attributes["sym_visibility"]) if "sym_visibility" in attributes else '"public"'
    return len(function.regions[0].blocks[0].arguments) if visibility == '"public"' else 0


def _trips_are_constant(loop: Any) -> bool:
    """Whether the text shows it: a counter from a constant, by a constant step, compared with a constant."""
    condition, body = (region.blocks[0] for region in loop.regions)
    predicate = _maker(_last(condition).operands[0])
    if predicate is None or predicate.name != "stablehlo.compare":
        return False
    places = [_carried(value, condition) for value in predicate.operands]
    return any(
        counter is not None and _is_counter(loop, body, counter) and _is_bound(loop, body, value, place)
        for counter, value, place in zip(places, reversed(list(predicate.operands)), reversed(places), strict=True)
    )


def _is_counter(loop: Any, body: Any, place: int) -> bool:
    """Carried value `place` begins with a constant, and a constant is added to it or subtracted from it."""
    step = _maker(_last(body).operands[place])
    if not _is_constant(loop.operands[place]) or step is None:
        return False
    first, second = (*step.operands, None, None)[:2]
    if step.name == "stablehlo.add" and second is not None and _carried(second, body) == place:
        first, second = second, first
    moves = step.name in ("stablehlo.add", "stablehlo.subtract")
    return moves and _carried(first, body) == place and _is_constant(second)


def _is_bound(loop: Any, body: Any, value: Any, place: int | None) -> bool:
    """A constant, or a carried value that begins as a constant and that no iteration changes."""
    if place is None:
        return _is_constant(value)
    return _is_constant(loop.operands[place]) and _carried(_last(body).operands[place], body) == place


def _last(block: Any) -> Any:
    return list(block)[-1].operation


def _carried(value: Any, block: Any) -> int | None:
    """Which of the loop's carried values `value` is, if it is one as it came into `block`."""
    return next((index for index, argument in enumerate(block.arguments) if argument == value), None)


def _is_constant(value: Any) -> bool:
    maker = _maker(value)
    while maker is not None and maker.name in _SHAPING:
        maker = _maker(maker.operands[0])
    return maker is not None and maker.name in _CONSTANTS


def _maker(value: Any) -> Any | None:
    """The operation whose result `value` is; none where it is an argument of a block."""
    owner = value.owner
    return None if isinstance(owner, ir.Block) else getattr(owner, "operation", owner)
