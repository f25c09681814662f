"""Compile ``train.cpp`` for this machine on first use, load it, and say whether it may be used.

The library lands in ``$OPENZAYA_CACHE`` (default ``~/.cache/openzaya``) under a name that is a hash of source,
compiler, flags and CPU, so an old one is never loaded; it is written beside its name and renamed, so processes
that compile at once do not see each other's halves. It is linked without an OpenMP library of its own: the
one that torch has loaded serves both, and no second pool of threads exists.

Without a compiler, or with ``OPENZAYA_KERNELS=0``, :func:`library` is None and every caller takes its
plain PyTorch twin.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("train.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
log = logging.getLogger("openzaya")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loaded kernels, compiled if need be (some seconds, once a machine); None where there are none."""
    if os.environ.get("OPENZAYA_KERNELS", "1") == "0":
        return None
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    openmp = _loaded_openmp()
    if compiler is None or openmp is None:
        missing = "no C++ compiler (g++ or clang++)" if compiler is None else "no OpenMP library in torch"
        log.warning("training kernels are off, plain PyTorch is used: %s", missing)
        return None
    try:
        path = _compiled(compiler)
        ctypes.CDLL(openmp, mode=ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        log.warning("training kernels are off, plain PyTorch is used: %s", detail.strip()[-500:])
        return None


def available() -> bool:
    """Whether the kernels are there; compiles them on the first call."""
    return library() is not None


def cache_directory() -> Path:
    """Where compiled kernels are kept."""
    return Path(os.environ.get("OPENZAYA_CACHE") or Path.home() / ".cache" / "openzaya")


def _compiled(compiler: str) -> Path:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    key = "\n".join((SOURCE.read_text(), compiler, version, *FLAGS, _cpu_features()))
    path = cache_directory() / f"train-{hashlib.sha256(key.encode()).hexdigest()[:20]}.so"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        objects, shared = Path(directory) / "train.o", Path(directory) / "train.so"
        for command in (
            [compiler, *FLAGS, "-c", str(SOURCE), "-o", str(objects)],
            [compiler, "-shared", str(objects), "-o", str(shared), "-lm"],
        ):
            subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        os.replace(shared, path)
    return path


def _cpu_features() -> str:
    """What -march=native depends on; a home directory may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = ("model name", "cpu family", "model\t", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(names)))


def _loaded_openmp() -> str | None:
    """Path of the OpenMP library that torch has loaded into this process."""
    torch.get_num_threads()
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    paths = {line.split(maxsplit=5)[-1] for line in lines if "/" in line}
    for stem in ("libgomp", "libiomp5", "libomp"):
        found = sorted(path for path in paths if Path(path).name.startswith(stem))
        # torch's own copy, should another package have brought one too.
        for path in sorted(found, key=lambda path: "torch" not in path):
            return path
    return None
