"""Memory and processors inside containers, from miniature file systems of both versions of control groups."""

from __future__ import annotations

from pathlib import Path

from openzaya.machine.memory import Memory, allowed_processors, read_memory

GIB = 1 << 30


def system(root: Path, files: dict[str, object]) -> Path:
    meminfo = (
        f"MemTotal: {16 * GIB // 1024} kB\nMemFree: 1 kB\nMemAvailable: {12 * GIB // 1024} kB\nHugePages_Total: 0\n"
    )
    for name, content in {"proc/meminfo": meminfo, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def test_a_plain_machine(tmp_path: Path) -> None:
    assert read_memory(system(tmp_path, {})) == Memory(16 * GIB, 12 * GIB, None)


def test_version_2_takes_the_tightest_group(tmp_path: Path) -> None:
    top = "sys/fs/cgroup"
    files = {
        "proc/self/cgroup": "0::/outer/inner",
        f"{top}/outer/inner/memory.max": "max",
        f"{top}/outer/inner/memory.current": 2 * GIB,
        f"{top}/outer/memory.max": 4 * GIB,
        f"{top}/outer/memory.current": 3 * GIB,
        f"{top}/outer/memory.stat": f"anon {GIB}\ninactive_file {GIB}",
        f"{top}/outer/cpu.max": "150000 100000",
    }
    root = system(tmp_path, files)
    assert read_memory(root) == Memory(4 * GIB, 2 * GIB, 4 * GIB)
    assert allowed_processors(root) <= 1.5


def test_version_1(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "5:memory:/job\n4:cpu,cpuacct:/job\n0::/",
        "sys/fs/cgroup/memory/job/memory.limit_in_bytes": 8 * GIB,
        "sys/fs/cgroup/memory/job/memory.usage_in_bytes": GIB,
        "sys/fs/cgroup/memory/memory.limit_in_bytes": 9223372036854771712,
        "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": 50000,
        "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": 100000,
    }
    root = system(tmp_path, files)
    assert read_memory(root) == Memory(8 * GIB, 7 * GIB, 8 * GIB)
    assert allowed_processors(root) == 0.5


def test_a_limit_above_the_machine_changes_nothing_but_what_is_left(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/",
        "sys/fs/cgroup/memory.max": 64 * GIB,
        "sys/fs/cgroup/memory.current": 60 * GIB,
        "sys/fs/cgroup/cpu.max": "max 100000",
    }
    assert read_memory(system(tmp_path, files)) == Memory(16 * GIB, 4 * GIB, 64 * GIB)


def test_strange_files(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": "MemTotal: many kB\n:\n",
        "proc/self/cgroup": "garbage\n0::/../../etc\n0:memory:",
        "sys/fs/cgroup/memory.max": "a lot",
        "sys/fs/cgroup/cpu.max": "100000 0",
    }
    memory = read_memory(system(tmp_path, files))
    assert memory.container_limit is None and memory.available is None
    assert allowed_processors(tmp_path) >= 1


def test_this_machine() -> None:
    memory = read_memory()
    if memory.total is not None and memory.available is not None:
        assert 1 << 28 < memory.available <= memory.total
    assert allowed_processors() > 0
