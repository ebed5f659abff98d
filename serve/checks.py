"""What `emoe doctor` looks at: each check gives findings, and none of them needs a model."""

import contextlib
import importlib
import importlib.metadata
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from emoe_jax.amounts import format_bytes

Level = Literal["ok", "warning", "problem"]

PACKAGE = "emoe-jax"
WEB = ("fastapi", "h11", "jinja2", "prometheus_client", "pydantic", "starlette", "uvicorn", "yaml")
FEWEST_MAPS = 65_530
"""Memory maps of a process: Linux's default. Each compiled step has some."""
SLOW_LINK = 6e9
"""Bytes per second. A card in a slot of 16 lanes has four times as much, even of an old standard."""
OLDEST_CARD = 8.0
"""The compute capability from which on the kernels run."""
LITTLE_SPACE = 2 << 30
LITTLE_MEMORY = 1 << 30
PINNED = 64 << 20


class Finding(NamedTuple):
    """What one check found."""

    check: str
    level: Level
    found: str
    mend: str = ""
    """What to do; empty where nothing has to be done."""


Check = Callable[[], Iterator[Finding]]


def python_and_packages() -> Iterator[Finding]:
    """Python and what the package needs, by their versions."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    try:
        wanted = importlib.metadata.metadata(PACKAGE)["Requires-Python"]
        requirements = [Requirement(line) for line in importlib.metadata.requires(PACKAGE) or ()]
    except importlib.metadata.PackageNotFoundError:
        yield Finding("package", "warning", f"{PACKAGE} is not installed, only imported", "pip install -e .")
        return
    version = ".".join(map(str, sys.version_info[:3]))
    right = version in SpecifierSet(wanted)
    yield Finding("Python", "ok" if right else "problem", version, "" if right else f"use Python {wanted}")
    missing = []
    for requirement in requirements:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            if requirement.specifier.contains(importlib.metadata.version(requirement.name), prereleases=True):
                continue
        missing.append(f"{requirement.name}{requirement.specifier}")
    if missing:
        yield Finding(
            "packages", "problem", f"missing, or of another version: {', '.join(missing)}", f"pip install {PACKAGE}"
        )
    else:
        yield Finding("packages", "ok", f"all that {PACKAGE} {importlib.metadata.version(PACKAGE)} needs")


def web_packages() -> Iterator[Finding]:
    """Whether what the server is made of can be imported."""
    broken = []
    for name in WEB:
        try:
            importlib.import_module(name)
        except Exception as error:
            broken.append(f"{name} ({type(error).__name__})")
    if broken:
        yield Finding("web packages", "problem", f"cannot import {', '.join(broken)}", f"pip install {PACKAGE}")
    else:
        yield Finding("web packages", "ok", f"{len(WEB)} can be imported")


def jax_and_device() -> Iterator[Finding]:
    """JAX, its device, and what drives it."""
    import jax

    device = jax.devices()[0]
    yield Finding("JAX", "ok", f"{jax.__version__}, jaxlib {importlib.metadata.version('jaxlib')}")
    cards = nvidia_cards()
    if device.platform == "cpu" and cards:
        chosen = os.environ.get("JAX_PLATFORMS")
        mend = "unset JAX_PLATFORMS" if chosen else f"pip install '{PACKAGE}[cuda12]'"
        yield Finding("device", "warning", f"JAX uses the CPU, although there is {cards[0][0]}", mend)
    else:
        yield Finding("device", "ok", f"{len(jax.devices())} x {device.device_kind} ({device.platform})")
    if device.platform == "cpu":
        return
    yield Finding("libraries", "ok", ", ".join(_nvidia_packages()) or "none of NVIDIA's is a Python package")
    for name, driver, capability in cards[:1]:
        old = capability < OLDEST_CARD
        mend = f"the kernels need compute capability {OLDEST_CARD:g} or newer" if old else ""
        found = f"{driver}, {name} of compute capability {capability:g}"
        yield Finding("driver", "problem" if old else "ok", found, mend)


def device_memory() -> Iterator[Finding]:
    """What the engine could plan with."""
    from emoe_jax.memory.plan import usable_memory

    size = usable_memory()
    little = size < LITTLE_MEMORY
    mend = "end other programs that use the device" if little else ""
    yield Finding("device memory", "warning" if little else "ok", f"{format_bytes(size)}", mend)


def link() -> Iterator[Finding]:
    """How fast experts could come to the device."""
    import jax

    from emoe_jax.planning.rates import link_bandwidth

    rate = link_bandwidth()
    if jax.default_backend() == "cpu":
        yield Finding("link", "ok", f"{rate / 1e9:.1f} GB/s, a copy within memory")
        return
    slow = rate < SLOW_LINK
    mend = "put the card in a slot of 16 lanes, and end what shares the link" if slow else ""
    yield Finding("link", "warning" if slow else "ok", f"{rate / 1e9:.1f} GB/s from the host to the device", mend)


def page_locked_memory() -> Iterator[Finding]:
    """Whether experts off the device can be kept where a card copies them from."""
    import jax
    import numpy as np

    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    shown = "no limit" if limit == resource.RLIM_INFINITY else f"a limit of {format_bytes(limit)} (ulimit -l)"
    if jax.default_backend() == "cpu":
        yield Finding("page-locked memory", "ok", f"{shown}; not needed on a CPU")
        return
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    try:
        jax.block_until_ready(jax.device_put(np.zeros(PINNED, np.uint8), sharding.with_memory_kind("pinned_host")))
    except Exception as error:
        found = f"{shown}; {format_bytes(PINNED)} cannot be had: {type(error).__name__}"
        mend = "ulimit -l unlimited, or --host-memory 0; loads are slower from ordinary memory"
        yield Finding("page-locked memory", "warning", found, mend)
    else:
        yield Finding("page-locked memory", "ok", f"{shown}; {format_bytes(PINNED)} can be had")


def folders() -> Iterator[Finding]:
    """Whether what is kept between starts can be written, and has room."""
    from huggingface_hub.constants import HF_HUB_CACHE

    from serve.start import compilations_folder

    for name, folder, variable in (
        ("compiled steps", compilations_folder(), "JAX_COMPILATION_CACHE_DIR"),
        ("downloaded models", Path(HF_HUB_CACHE), "HF_HOME"),
        ("temporary files", Path(tempfile.gettempdir()), "TMPDIR"),
    ):
        try:
            there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
            with tempfile.TemporaryFile(dir=there):
                pass
            free = shutil.disk_usage(there).free
        except OSError as error:
            mend = f"make it writable, or set {variable} to another folder"
            yield Finding(name, "problem", f"{folder}: {error.strerror or error}", mend)
            continue
        little = free < LITTLE_SPACE
        mend = f"make room, or set {variable} to another folder" if little else ""
        yield Finding(name, "warning" if little else "ok", f"{folder}, {format_bytes(free)} free", mend)


def memory_maps(path: Path = Path("/proc/sys/vm/max_map_count")) -> Iterator[Finding]:
    """How many memory maps a process may have."""
    try:
        most = int(path.read_text())
    except (OSError, ValueError):
        yield Finding("memory maps", "ok", "no limit is known here")
        return
    few = most < FEWEST_MAPS
    mend = f"sysctl -w vm.max_map_count={FEWEST_MAPS}" if few else ""
    yield Finding("memory maps", "warning" if few else "ok", f"vm.max_map_count is {most}", mend)


def step() -> Iterator[Finding]:
    """A tiny random model, loaded, compiled and asked for two tokens."""
    import jax
    from flax import nnx

    from emoe_jax import Engine, SamplingParams
    from emoe_jax.models import config_from_hf, save_checkpoint
    from emoe_jax.models.decoder import Decoder, init_experts

    config, began = config_from_hf(TINY), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(
            folder, TINY, nnx.state(Decoder(config, rngs=nnx.Rngs(0))), init_experts(config, jax.random.key(0))
        )
        sizes: dict[str, Any] = {"max_num_seqs": 1, "max_num_batched_tokens": 16, "expert_memory": "50%"}
        with Engine.load(folder, **sizes, routing="exact", audit_rate=0.0, policy="static") as engine:
            params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
            tokens = engine.generate([[1, 2, 3]], params)[0].token_ids
    taken = time.monotonic() - began
    right = len(tokens) == 2
    found = f"{len(tokens)} tokens of a tiny model in {taken:.1f} s, compiling included"
    yield Finding("a step", "ok" if right else "problem", found, "" if right else "report this with all lines above")


TINY: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}

CHECKS: tuple[Check, ...] = (
    python_and_packages,
    web_packages,
    jax_and_device,
    device_memory,
    link,
    page_locked_memory,
    folders,
    memory_maps,
)
"""All but `step`, which takes the longest, in the order in which they are printed."""


def nvidia_cards() -> list[tuple[str, str, float]]:
    """Name, driver version and compute capability of each card that `nvidia-smi` lists; none where there is no such
    program, or it fails."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
    try:
        asked = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
        rows = [line.split(", ") for line in asked.stdout.strip().splitlines()]
        return [(name, driver, float(capability)) for name, driver, capability in rows]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []


def _nvidia_packages() -> list[str]:
    """NVIDIA's libraries and JAX's plugins that are installed, with their versions."""
    wanted = ("jax-cuda", "nvidia-cudnn", "nvidia-cuda-runtime", "nvidia-cublas")
    found = ((one.metadata["Name"], one.version) for one in importlib.metadata.distributions())
    return sorted(f"{name} {version}" for name, version in found if name and name.startswith(wanted))
