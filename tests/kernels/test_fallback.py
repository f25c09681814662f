"""Doing without the kernels: plain PyTorch gives the same numbers, and one notice says why."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from openzaya.kernels import build
from tests.kernels.every_kernel import Report, assert_same_numbers, finish, start


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """A process with the kernels turned off."""
    file = tmp_path_factory.mktemp("plain") / "plain.pt"
    return finish(start(file, OPENZAYA_KERNELS="0"), file)


def test_turned_off_they_are_replaced_without_a_word(plain: Report, tmp_path: Path) -> None:
    assert not plain["available"] and plain["notices"] == []
    if not build.available():
        pytest.skip("no C++ compiler on this machine")
    # The cache of the test's own process: nothing is left to compile.
    file = tmp_path / "kernels.pt"
    report = finish(start(file, OPENZAYA_CACHE=str(build.cache_directory())), file)
    assert report["available"] and report["called"]
    assert_same_numbers(plain, report)


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"PATH": "/nonexistent"}, "no C++ compiler"),
        ({"CXX": "false"}, "false"),
        ({"CXX": "/nonexistent/g++"}, "No such file"),
        ({"OPENZAYA_CACHE": "/dev/null/cache"}, "OPENZAYA_CACHE"),
    ],
    ids=["no compiler on the PATH", "compiler fails", "compiler missing", "nowhere to write"],
)
def test_without_kernels_plain_pytorch_and_one_notice(
    environment: dict[str, str], reason: str, plain: Report, tmp_path: Path
) -> None:
    if "OPENZAYA_CACHE" in environment and shutil.which("g++") is None:
        pytest.skip("no C++ compiler on this machine")
    file = tmp_path / "tensors.pt"
    report = finish(start(file, **({"OPENZAYA_CACHE": str(tmp_path / "cache")} | environment)), file)
    assert not report["available"]
    (notice,) = report["notices"]
    assert "plain PyTorch is used" in notice and reason in notice
    assert_same_numbers(report, plain)
