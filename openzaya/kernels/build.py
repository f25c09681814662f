"""Compile the kernels of ``cpp/`` for this machine on first use, load them, and say whether they may be used.

The library lands in ``$OPENZAYA_CACHE`` (default ``~/.cache/openzaya``) under a name that is a hash of all
sources, compiler, flags and CPU, so an old one is never loaded. It is written beside its name and renamed, so
processes that compile at once do not see each other's halves, and it ends with a digest of itself, so a damaged
one is compiled again instead of loaded. It is linked without an OpenMP library of its own: the one that torch
has loaded serves both, and no second pool of threads exists.

There are two libraries: for training (``cpp/train.cpp``, compiled for exactly this processor) and for inference
(``cpp/cpu.cpp``, compiled for the best of a few instruction sets, its *tier*).

Without a compiler, without a place to write to, or with ``OPENZAYA_KERNELS=0``, there is no
library, one notice in the log says why, and every caller takes its plain PyTorch twin. ``CXX`` names another compiler;
``OPENZAYA_KERNEL_FLAGS`` is added to its flags (``-march=x86-64-v3`` for a machine of another kind).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from openzaya.errors import ConfigError

SOURCES = Path(__file__).with_name("cpp")
FLAGS = ("-O3", "-std=c++2a", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
TRAINING_FLAGS = ("-march=native",)
# In inference a token's result must not depend on how many tokens share a loop: products and sums stay apart.
INFERENCE_FLAGS = ("-ffp-contract=off",)
_AVX2 = ("avx2", "fma", "f16c", "bmi2")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni")
TIERS = {
    "amx": (*_AVX512, "avx512bf16", "amx-tile", "amx-int8"),
    "avx512bf16": (*_AVX512, "avx512bf16"),
    "avx512": _AVX512,
    "avx2": _AVX2,
}
"""Instruction sets that the inference kernels are written for, best first, each with what it takes."""
UNTRIED_TIERS = ("amx",)
"""No machine with these was at hand when the kernels were written: each machine checks for itself (check.py)."""
DIGEST_BYTES = 32
log = logging.getLogger("openzaya")


@dataclass(frozen=True)
class Loaded:
    """Compiled kernels, or why there are none."""

    library: ctypes.CDLL | None
    problem: str = ""


def library() -> ctypes.CDLL | None:
    """The training kernels, compiled if need be (some seconds, once a machine); None where there are none."""
    return _load("train", TRAINING_FLAGS).library


def available() -> bool:
    """Whether the training kernels are there; compiles them on the first call."""
    return library() is not None


def inference() -> Loaded:
    """The inference kernels for :func:`inference_tier`; compiled if need be."""
    tier = inference_tier()
    if tier is None:
        return Loaded(None, f"the processor ({platform.machine()}) has none of the instruction sets {', '.join(TIERS)}")
    return _load_tier(tier)


@functools.cache
def _inference_tier(wanted: str | None) -> str | None:
    present = set(_cpu_features().replace("avx512_", "avx512").replace("amx_", "amx-").split())
    possible = [name for name, features in TIERS.items() if present.issuperset(features)]
    if wanted and wanted not in possible:
        raise ConfigError(
            f"OPENZAYA_CPU_TIER={wanted}, but this processor can run: {', '.join(possible) or 'none'}; "
            "choose one of them or unset it"
        )
    for tier in [wanted] if wanted else possible:
        if tier not in UNTRIED_TIERS or _is_proven(_load_tier(tier)):
            return tier
    return None


def inference_tier() -> str | None:
    """The best of :data:`TIERS` that this processor has, or the one that ``OPENZAYA_CPU_TIER`` names if it has it."""
    return _inference_tier(os.environ.get("OPENZAYA_CPU_TIER") or None)


def _load_tier(tier: str) -> Loaded:
    return _load("cpu", (*INFERENCE_FLAGS, *(f"-m{feature}" for feature in TIERS[tier])))


def _is_proven(loaded: Loaded) -> bool:
    """Whether a library passes check.py in a process of its own, where a wrong instruction does no harm."""
    if loaded.library is None:
        return True  # there is nothing to prove, and the reason is on record
    path = Path(loaded.library._name)
    passed = path.with_suffix(".passed")
    if not passed.exists():
        command = [sys.executable, "-m", "openzaya.kernels.check", str(path)]
        try:
            subprocess.run(command, capture_output=True, timeout=120, check=True)
            passed.touch()
        except (OSError, subprocess.SubprocessError):
            log.warning("kernels for the newest instructions fail their check; those for older ones are used")
            return False
    return int(loaded.library.cpu_prepare()) == 0


@functools.cache
def _load(name: str, flags: tuple[str, ...]) -> Loaded:
    """Compile and load ``cpp/NAME.cpp``; a problem is logged once."""
    if os.environ.get("OPENZAYA_KERNELS", "1") == "0":
        return Loaded(None, "OPENZAYA_KERNELS=0 turns the kernels off")
    try:
        openmp = loaded_openmp()
        path = _compiled(name, _compiler(), flags)
        ctypes.CDLL(openmp, mode=ctypes.RTLD_GLOBAL)
        return Loaded(ctypes.CDLL(str(path)))
    except subprocess.SubprocessError as error:
        reason = f"{getattr(error, 'stderr', None) or error} (CXX names another compiler)"
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error)
    reason = reason.strip()[-500:]
    kind = {"train": "training", "cpu": "inference"}[name]
    log.warning("%s kernels are off, plain PyTorch is used: %s", kind, reason)
    return Loaded(None, reason)


def cache_directory() -> Path:
    """Where compiled kernels are kept. RuntimeError where the user has no home directory."""
    return Path(os.environ.get("OPENZAYA_CACHE") or Path.home() / ".cache" / "openzaya")


def _compiler() -> list[str]:
    """The command that compiles C++, as words."""
    command = shlex.split(os.environ.get("CXX", "")) or [shutil.which("g++") or shutil.which("clang++") or ""]
    if not command[0]:
        raise FileNotFoundError("no C++ compiler (g++ or clang++) on the PATH, and none in CXX")
    return command


def _compiled(name: str, compiler: list[str], extra_flags: tuple[str, ...]) -> Path:
    """The library's path, compiled now unless a whole one is there."""
    flags = [*FLAGS, *extra_flags, *shlex.split(os.environ.get("OPENZAYA_KERNEL_FLAGS", ""))]
    path = cache_directory() / f"{name}-{_key(name, compiler, flags)}.so"
    if _is_whole(path):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        place = tempfile.TemporaryDirectory(dir=path.parent)
    except OSError as error:
        raise OSError(f"{error}; OPENZAYA_CACHE names another directory for the compiled kernels") from error
    with place as directory:
        objects, shared = Path(directory) / "kernels.o", Path(directory) / "kernels.so"
        for command in (
            [*compiler, *flags, "-c", str(SOURCES / f"{name}.cpp"), "-o", str(objects)],
            [*compiler, "-shared", str(objects), "-o", str(shared), "-lm"],
        ):
            subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        # What follows the last section of a library does not concern the loader.
        with shared.open("r+b") as file:
            digest = hashlib.sha256(file.read()).digest()
            file.write(digest)
        os.replace(shared, path)
    return path


def _key(name: str, compiler: list[str], flags: list[str]) -> str:
    """A hash of everything that the library depends on."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    paths = (SOURCES / f"{name}.cpp", *sorted((SOURCES / name).glob("*.hpp")))
    sources = [part for path in paths for part in (path.name, path.read_text())]
    key = "\0".join((*sources, *compiler, version, *flags, _cpu_features()))
    return hashlib.sha256(key.encode()).hexdigest()[:20]


def _is_whole(path: Path) -> bool:
    """Whether the file ends with the digest of what stands before it; loading a cut one could end the process."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-DIGEST_BYTES]).digest() == content[-DIGEST_BYTES:]


def _cpu_features() -> str:
    """What -march=native depends on; a home directory may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = ("model name", "cpu family", "model\t", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(names)))


def loaded_openmp() -> str:
    """Path of the OpenMP library that torch has loaded into this process."""
    torch.get_num_threads()
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = {line.split(maxsplit=5)[-1] for line in lines if "/" in line}
    for stem in ("libgomp", "libiomp5", "libomp"):
        found = sorted(path for path in paths if Path(path).name.startswith(stem))
        # torch's own copy, should another package have brought one too.
        for path in sorted(found, key=lambda path: "torch" not in path):
            return path
    raise FileNotFoundError("torch has loaded no OpenMP library")
