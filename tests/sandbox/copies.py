"""A copy of the sandbox under a path of its own: readable for any user, and its processes can be told from others'."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import openzaya.sandbox

_PACKAGE = Path(openzaya.sandbox.__file__).parent.parent


def copy_package(place: Path) -> Path:
    """The copied package; ``place`` is then good for PYTHONPATH."""
    copy = place / "openzaya"
    shutil.copytree(_PACKAGE / "sandbox", copy / "sandbox", ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "__init__.py").touch()
    shutil.copy(_PACKAGE / "errors.py", copy)
    return copy


def running(mark: str) -> list[str]:
    """Command lines of the processes whose arguments mention ``mark``."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if mark in line:
                found.append(line)
    return found


def left_over(mark: str, seconds: float = 10.0) -> list[str]:
    """As ``running``, but with some time to end."""
    deadline = time.monotonic() + seconds
    while (left := running(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left
