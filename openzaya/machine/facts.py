"""Facts of this machine that decide what runs and how fast: processor, memory, kernels, measured bandwidth.

Decoding reads all of a model's active weights for every token, so the speed at which memory is read bounds it. The
bandwidth is measured: all threads read a buffer much larger than the caches, with the inference kernels' own loop
where they are built, else with ``torch.sum``; the best of a few rounds counts, for other programs only slow it down.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from openzaya.errors import ConfigError, SandboxUnavailable
from openzaya.kernels import build
from openzaya.machine.memory import Memory, allowed_processors, read_memory
from openzaya.sandbox import isolation

SERVER_PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "llguidance")
_BANDWIDTH_BUFFER_BYTES = 1 << 30
_SHOWN_FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16")
_ARM_FEATURES = ("asimd", "asimddp", "i8mm", "bf16", "sve")


@dataclass(frozen=True)
class Kernels:
    """Compiled kernels of one kind."""

    built: bool
    problem: str = ""
    tier: str | None = None
    """The instruction sets that they were compiled for."""


@dataclass(frozen=True)
class Machine:
    """What :func:`look` found."""

    system: str
    python: str
    torch: str
    processor: str
    num_cores: int
    """Logical processors of the machine."""
    allowed_cores: float
    """Those this process may use; a container may allow a fraction."""
    num_threads: int
    """Threads that PyTorch and the kernels use."""
    instruction_sets: tuple[str, ...]
    memory: Memory
    compiler: str | None
    """Path and version of the C++ compiler."""
    openmp: bool
    training_kernels: Kernels
    inference_kernels: Kernels
    read_bandwidth: float
    """Bytes a second, all threads together."""
    bandwidth_from: str
    gpus: tuple[str, ...]
    cache_directory: str
    cache_free_bytes: int | None
    cache_problem: str
    """Why nothing can be written there; "" where all is well."""
    missing_packages: tuple[str, ...]
    """Of those that ``openzaya serve`` needs."""
    sandbox: str = ""
    """How programs that models write are isolated; "" where they cannot be."""
    sandbox_problem: str = ""
    """Why they cannot be."""


def look() -> Machine:
    """Look at this machine: a few seconds, and about a minute where kernels have to be compiled first."""
    with _quiet_log():
        inference = _inference_kernels()
        # What keeps one kind from being built (no compiler, no place to write to) keeps the other too.
        training = Kernels(True) if build.available() else Kernels(False, inference.problem)
    bandwidth, source = read_bandwidth()
    cache, free, problem = _cache()
    sandbox, sandbox_problem = _sandbox()
    return Machine(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        torch=torch.__version__,
        processor=_processor_name(),
        num_cores=os.cpu_count() or 1,
        allowed_cores=allowed_processors(),
        num_threads=torch.get_num_threads(),
        instruction_sets=_instruction_sets(),
        memory=read_memory(),
        compiler=_compiler(),
        openmp=torch.backends.openmp.is_available(),
        training_kernels=training,
        inference_kernels=inference,
        read_bandwidth=bandwidth,
        bandwidth_from=source,
        gpus=_gpus(),
        cache_directory=cache,
        cache_free_bytes=free,
        cache_problem=problem,
        missing_packages=tuple(name for name in SERVER_PACKAGES if importlib.util.find_spec(name) is None),
        sandbox=sandbox,
        sandbox_problem=sandbox_problem,
    )


def read_bandwidth(num_rounds: int = 5, buffer_bytes: int | None = None) -> tuple[float, str]:
    """Bytes a second that all threads together read from memory, and what measured it."""
    available = read_memory().available
    size = buffer_bytes or _BANDWIDTH_BUFFER_BYTES
    size = size if available is None else min(size, available // 4)
    buffer = torch.ones(max(size // 4, 1 << 18))
    with _quiet_log():
        kernels = _inference_kernels()
    read, source = (_kernel_read, "kernels") if kernels.built else (_torch_read, "torch.sum")
    best = min(read(buffer) for _ in range(num_rounds))
    return buffer.nbytes / best, source


def _kernel_read(buffer: torch.Tensor) -> float:
    from ctypes import c_double, c_int, c_int64, c_void_p

    library = build.inference().library
    assert library is not None
    function = library.cpu_read
    function.restype, function.argtypes = c_double, (c_int, c_void_p, c_int64)
    return function(torch.get_num_threads(), buffer.data_ptr(), buffer.nbytes)


def _torch_read(buffer: torch.Tensor) -> float:
    start = time.perf_counter()
    buffer.sum()
    return time.perf_counter() - start


# --- kernels and compiler ---------------------------------------------------------------------------


def _inference_kernels() -> Kernels:
    try:
        tier = build.inference_tier()
        loaded = build.inference()
    except ConfigError as error:
        return Kernels(False, str(error))
    return Kernels(loaded.library is not None, loaded.problem, tier)


@contextlib.contextmanager
def _quiet_log() -> Iterator[None]:
    """The report says itself why kernels are off."""
    log = logging.getLogger("openzaya")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _compiler() -> str | None:
    command = shlex.split(os.environ.get("CXX", "")) or [shutil.which("g++") or shutil.which("clang++") or ""]
    if not command[0]:
        return None
    try:
        found = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{' '.join(command)} ({found.stdout.splitlines()[0] if found.stdout else 'version unknown'})"


# --- processor, devices, disk -----------------------------------------------------------------------


def _cpuinfo(field: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.split(":")[0].strip() == field), "")


def _processor_name() -> str:
    name = _cpuinfo("model name")
    if not name and sys.platform == "darwin":
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            asked = ["sysctl", "-n", "machdep.cpu.brand_string"]
            name = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    return name or platform.processor() or platform.machine()


def _instruction_sets() -> tuple[str, ...]:
    flags = set((_cpuinfo("flags") or _cpuinfo("Features")).split())
    if flags:
        return tuple(name for name in (*_SHOWN_FEATURES, *_ARM_FEATURES) if name in flags)
    return (torch.backends.cpu.get_cpu_capability(),)


def _sandbox() -> tuple[str, str]:
    try:
        return str(isolation()), ""
    except SandboxUnavailable as error:
        return "", str(error)


def _gpus() -> tuple[str, ...]:
    names = []
    if torch.cuda.is_available():
        names += [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        names.append("Apple GPU (mps)")
    return tuple(names)


def _cache() -> tuple[str, int | None, str]:
    """The cache directory, the free bytes of its disk, and why it cannot be written to ("" if it can)."""
    try:
        directory = build.cache_directory()
    except RuntimeError as error:
        return "", None, f"{error}; OPENZAYA_CACHE names a directory"
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return str(directory), free, f"{existing} cannot be written to; OPENZAYA_CACHE names another directory"
    return str(directory), free, ""
