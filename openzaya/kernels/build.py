"""Compile the kernels of ``cpp/`` for this machine on first use, load them, and say whether they may be used.

The library lands in ``$OPENZAYA_CACHE`` (default ``~/.cache/openzaya``) under a name that is a hash of all
sources, compiler, flags and CPU, so an old one is never loaded. It is written beside its name and renamed, so
processes that compile at once do not see each other's halves, and it ends with a digest of itself, so a damaged
one is compiled again instead of loaded. It is linked without an OpenMP library of its own: the one that torch
has loaded serves both, and no second pool of threads exists.

Without a compiler, without a place to write to, or with ``OPENZAYA_KERNELS=0``, :func:`library` is None, one
notice in the log says why, and every caller takes its plain PyTorch twin. ``CXX`` names another compiler;
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
import tempfile
from pathlib import Path

import torch

SOURCES = Path(__file__).with_name("cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
DIGEST_BYTES = 32
log = logging.getLogger("openzaya")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loaded kernels, compiled if need be (some seconds, once a machine); None where there are none."""
    if os.environ.get("OPENZAYA_KERNELS", "1") == "0":
        return None
    try:
        openmp = _loaded_openmp()
        path = _compiled(_compiler())
        ctypes.CDLL(openmp, mode=ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(path))
    except subprocess.SubprocessError as error:
        reason = f"{getattr(error, 'stderr', None) or error} (CXX names another compiler)"
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error)
    log.warning("training kernels are off, plain PyTorch is used: %s", reason.strip()[-500:])
    return None


def available() -> bool:
    """Whether the kernels are there; compiles them on the first call."""
    return library() is not None


def cache_directory() -> Path:
    """Where compiled kernels are kept. RuntimeError where the user has no home directory."""
    return Path(os.environ.get("OPENZAYA_CACHE") or Path.home() / ".cache" / "openzaya")


def _compiler() -> list[str]:
    """The command that compiles C++, as words."""
    command = shlex.split(os.environ.get("CXX", "")) or [shutil.which("g++") or shutil.which("clang++") or ""]
    if not command[0]:
        raise FileNotFoundError("no C++ compiler (g++ or clang++) on the PATH, and none in CXX")
    return command


def _compiled(compiler: list[str]) -> Path:
    """The library's path, compiled now unless a whole one is there."""
    flags = [*FLAGS, *shlex.split(os.environ.get("OPENZAYA_KERNEL_FLAGS", ""))]
    path = cache_directory() / f"train-{_key(compiler, flags)}.so"
    if _is_whole(path):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        place = tempfile.TemporaryDirectory(dir=path.parent)
    except OSError as error:
        raise OSError(f"{error}; OPENZAYA_CACHE names another directory for the compiled kernels") from error
    with place as directory:
        objects, shared = Path(directory) / "train.o", Path(directory) / "train.so"
        for command in (
            [*compiler, *flags, "-c", str(SOURCES / "train.cpp"), "-o", str(objects)],
            [*compiler, "-shared", str(objects), "-o", str(shared), "-lm"],
        ):
            subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        # What follows the last section of a library does not concern the loader.
        with shared.open("r+b") as file:
            digest = hashlib.sha256(file.read()).digest()
            file.write(digest)
        os.replace(shared, path)
    return path


def _key(compiler: list[str], flags: list[str]) -> str:
    """A hash of everything that the library depends on."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    sources = [part for path in sorted(SOURCES.glob("*.[ch]pp")) for part in (path.name, path.read_text())]
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


def _loaded_openmp() -> str:
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
