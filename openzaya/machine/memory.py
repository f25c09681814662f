"""How much memory and how many processors this process may use: those of the machine, or less inside a container.

Linux counts both in control groups: version 2 in ``memory.max`` and ``cpu.max``, version 1 in
``memory.limit_in_bytes`` and ``cpu.cfs_quota_us``; a group is bound by all groups above it. A group's use includes
cached files, which give way when memory is asked for, so they count as free.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

UNLIMITED_BYTES = 1 << 60
"""Version 1 writes "no limit" as a number near 2^63."""


@dataclass(frozen=True)
class Memory:
    """In bytes; None where the system does not say."""

    total: int | None
    """Of the machine, or the container's limit where that is less."""
    available: int | None
    """What can be taken without pushing anything else out."""
    container_limit: int | None

    def __post_init__(self) -> None:
        if self.total is not None and self.available is not None and self.available > self.total:
            raise ValueError(f"available={self.available} is more than total={self.total}")


def read_memory(root: Path = Path("/")) -> Memory:
    """Memory of this machine and container; ``root`` is the file system to look in."""
    total, available = _machine_memory(root)
    limit, left = None, None
    for group in _groups(root, "memory"):
        for limit_file, usage_file, file_cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            bound = _number(group / limit_file)
            if bound is None or bound >= UNLIMITED_BYTES:
                continue
            used = (_number(group / usage_file) or 0) - _stat(group / "memory.stat", file_cache)
            limit = bound if limit is None else min(limit, bound)
            rest = max(0, bound - max(0, used))
            left = rest if left is None else min(left, rest)
    if limit is not None and (total is None or limit < total):
        total = limit
        available = left if available is None or left is None else min(available, left)
    elif left is not None and available is not None:
        available = min(available, left)
    if total is not None and available is not None:
        available = min(available, total)
    return Memory(total, available, limit)


def allowed_processors(root: Path = Path("/")) -> float:
    """Processors that this process may use at a time; a container may allow a fraction."""
    try:
        allowed = float(len(os.sched_getaffinity(0)))
    except AttributeError:  # not on this system
        allowed = float(os.cpu_count() or 1)
    for group in _groups(root, "cpu"):
        quota = _text(group / "cpu.max").split()
        if len(quota) != 2:
            quota = [_text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us")]
        if all(part.isdigit() for part in quota) and int(quota[1]):
            allowed = min(allowed, int(quota[0]) / int(quota[1]))
    return allowed


def _machine_memory(root: Path) -> tuple[int | None, int | None]:
    values: dict[str, int] = {}
    for line in _text(root / "proc/meminfo").splitlines():
        words = line.split()
        if len(words) >= 2 and words[1].isdigit():
            values[words[0].rstrip(":")] = int(words[1]) * 1024
    if "MemTotal" in values:
        return values["MemTotal"], values.get("MemAvailable")
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), None
    except (AttributeError, ValueError, OSError):
        return None, None


def _groups(root: Path, controller: str) -> list[Path]:
    """Directories of this process's control groups, its own first, then those above it."""
    found: list[Path] = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        # Version 2 has one tree, version 1 one for each set of controllers.
        top = root / "sys/fs/cgroup" / controllers if controllers else root / "sys/fs/cgroup"
        group = top / path.strip("/")
        if ".." not in path:
            found += [group, *(above for above in group.parents if above.is_relative_to(top))]
    return found


def _stat(path: Path, name: str) -> int:
    for line in _text(path).splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.isdigit():
            return int(value)
    return 0


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isdigit() else None


def _text(path: Path) -> str:
    """The file's text without blanks at the ends; "" where it cannot be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
