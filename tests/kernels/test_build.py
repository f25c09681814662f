"""Compiling and keeping the kernels: processes at once, damaged files, machines of another kind."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from openzaya.kernels import build
from tests.kernels.every_kernel import ROOT, Report, finish, start

needs_compiler = pytest.mark.skipif(not build.available(), reason="no C++ compiler on this machine")


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Report], Path]:
    """Two processes, of two threads each, that met at an empty cache; and the cache."""
    directory = tmp_path_factory.mktemp("twins")
    cache = directory / "a folder" / "cache"
    files = [directory / "first.pt", directory / "second.pt"]
    processes = [start(file, OPENZAYA_CACHE=str(cache)) for file in files]
    return [finish(process, file) for process, file in zip(processes, files, strict=True)], cache


@needs_compiler
def test_two_processes_compile_at_once(twins: tuple[list[Report], Path]) -> None:
    reports, cache = twins
    assert [(report["available"], report["notices"]) for report in reports] == [(True, [])] * 2
    assert [path.suffix for path in cache.iterdir()] == [".so"], "one library, and nothing of the work"


@needs_compiler
def test_every_kernel_was_called(twins: tuple[list[Report], Path]) -> None:
    """What follows from the processes' reports concerns all of the kernels."""
    sources = "".join(path.read_text() for path in (build.SOURCES / "train").glob("*.hpp"))
    kernels = sorted(re.findall(r"^void (\w+)\(int threads,", sources, flags=re.MULTILINE))
    assert len(kernels) == 13
    assert twins[0][0]["called"] == kernels


@needs_compiler
def test_same_bits_with_two_threads(twins: tuple[list[Report], Path]) -> None:
    """In two calls of one process, and in two processes."""
    (first, second), _ = twins
    assert first["num_threads"] == second["num_threads"] == 2
    assert first["same_bits"] and second["same_bits"]
    for name, tensor in first.tensors.items():
        assert tensor.equal(second.tensors[name]), name


@needs_compiler
def test_kernels_start_no_threads_of_their_own(twins: tuple[list[Report], Path]) -> None:
    """A second pool beside torch's would wait for it on the same cores."""
    for report in twins[0]:
        assert report["threads_before"] >= 2, "torch has started its pool"
        assert report["threads_after"] == report["threads_before"]


@needs_compiler
def test_a_build_for_avx2_gives_the_same_numbers(twins: tuple[list[Report], Path], tmp_path: Path) -> None:
    """Every kernel against its twin again, with code for a machine without AVX-512."""
    if not {"avx2", "fma", "bmi2"} <= set(Path("/proc/cpuinfo").read_text().split()):
        pytest.skip("this machine cannot run x86-64-v3 code")
    setting = {"OPENZAYA_CACHE": str(tmp_path), "OPENZAYA_KERNEL_FLAGS": "-march=x86-64-v3"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/kernels/test_functions.py"]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | setting, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout[-2000:]
    assert " passed in " in result.stdout and "skipped" not in result.stdout
    assert {path.name for path in tmp_path.glob("*.so")}.isdisjoint(path.name for path in twins[1].iterdir())
    assert len(list(tmp_path.glob("*.so"))) == 1


@pytest.fixture
def quick_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The compiler, told not to optimise, and an empty cache."""
    monkeypatch.setenv("OPENZAYA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENZAYA_KERNEL_FLAGS", "-O0")
    return build._compiler()


@needs_compiler
def test_a_damaged_library_is_compiled_again(quick_compiler: list[str]) -> None:
    """Loading one that was cut would end the process with SIGBUS, and a wrong bit could compute anything."""
    path = build._compiled("train", quick_compiler, ())
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damaged in (whole[: len(whole) // 2], whole[:-1], b"", bytes(flipped)):
        path.write_bytes(damaged)
        assert not build._is_whole(path)
        assert build._compiled("train", quick_compiler, ()) == path and build._is_whole(path)
    assert ctypes.CDLL(str(path)).linear_forward


@needs_compiler
def test_a_whole_library_is_not_compiled_again(quick_compiler: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = build._compiled("train", quick_compiler, ())
    written = path.stat().st_mtime_ns
    monkeypatch.setattr(build.tempfile, "TemporaryDirectory", None)
    assert build._compiled("train", quick_compiler, ()) == path and path.stat().st_mtime_ns == written


@needs_compiler
def test_every_source_is_part_of_the_name(
    quick_compiler: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "cpp"
    shutil.copytree(build.SOURCES, copy)
    monkeypatch.setattr(build, "SOURCES", copy)
    for name in ("train", "cpu"):
        keys = {build._key(name, quick_compiler, ["-O3"])}
        files = [copy / f"{name}.cpp", *(copy / name).iterdir()]
        assert len(files) >= 8
        for file in files:
            file.write_text(file.read_text() + "\n// changed\n")
            keys.add(build._key(name, quick_compiler, ["-O3"]))
        keys.add(build._key(name, quick_compiler, ["-O2"]))
        assert len(keys) == len(files) + 2


def test_headers_include_what_exists_and_all_travel_with_the_package() -> None:
    for name in ("train", "cpu"):
        paths = [build.SOURCES / f"{name}.cpp", *(build.SOURCES / name).glob("*.hpp")]
        included = {Path(file).name for path in paths for file in re.findall(r'#include "(.+)"', path.read_text())}
        assert included | {f"{name}.cpp"} == {path.name for path in paths}
    project = (build.SOURCES.parent.parent.parent / "pyproject.toml").read_text()
    assert all(f'"**/*{suffix}"' in project for suffix in {path.suffix for path in build.SOURCES.rglob("*.?pp")})
