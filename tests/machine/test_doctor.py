"""The doctor: facts of this machine, and the right verdict on machines that lack something."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from openzaya.kernels import build
from openzaya.machine import facts
from openzaya.machine.doctor import Diagnosis, diagnose, diagnosis_text
from openzaya.machine.facts import Kernels, Machine
from openzaya.machine.memory import Memory
from tests.command import openzaya
from tests.machine.test_plan import GB, MACHINE

OFF = Kernels(False, "no C++ compiler (g++ or clang++) on the PATH, and none in CXX", "avx2")


def seen(**changes: object) -> Diagnosis:
    return diagnose(replace(MACHINE, **changes))  # type: ignore[arg-type]


def test_all_is_well() -> None:
    diagnosis = seen()
    assert diagnosis.ok and diagnosis.notices == ()
    assert [(outlook.weights, outlook.fits) for outlook in diagnosis.outlooks] == [
        ("int4", True),
        ("int8", True),
        ("bfloat16", True),
    ]
    speeds = [outlook.tokens_per_second or 0 for outlook in diagnosis.outlooks]
    assert speeds == sorted(speeds, reverse=True)
    assert diagnosis_text(diagnosis).endswith("everything works")


@pytest.mark.parametrize(
    ("changes", "notice"),
    [
        ({"compiler": None, "inference_kernels": OFF, "training_kernels": OFF}, "Install g++"),
        ({"inference_kernels": Kernels(False, "OPENZAYA_KERNELS=0 turns them off", "avx2")}, "turned off"),
        ({"inference_kernels": Kernels(False, "the processor (riscv64) has none")}, "riscv64"),
        ({"missing_packages": ("fastapi",)}, r"openzaya\[serve\]"),
        ({"num_threads": 8}, "OMP_NUM_THREADS"),
        ({"allowed_cores": 64.0}, "raise OMP_NUM_THREADS"),
        ({"read_bandwidth": 2e9}, "2.00 GB/s"),
        ({"gpus": ("A GPU",)}, "not been tested"),
    ],
)
def test_what_is_slower_or_missing_is_a_notice(changes: dict[str, object], notice: str) -> None:
    diagnosis = seen(**changes)
    assert diagnosis.ok and len(diagnosis.notices) == 1
    text = diagnosis_text(diagnosis)
    assert re.search(f"notice: .*{notice}", text), text


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"inference_kernels": Kernels(False, "error: boom", "avx2")}, "boom"),
        ({"inference_kernels": Kernels(False, "No such file: 'c+'", "avx2"), "compiler": None}, "c+"),
        ({"inference_kernels": Kernels(False, "OPENZAYA_CPU_TIER=amx, but")}, "OPENZAYA_CPU_TIER"),
        ({"training_kernels": Kernels(False)}, "training kernels"),
        ({"cache_problem": "/x cannot be written to"}, "/x"),
    ],
)
def test_what_is_set_up_wrongly_is_a_problem(changes: dict[str, object], problem: str) -> None:
    diagnosis = seen(**changes)
    assert not diagnosis.ok and problem in diagnosis.problems[0]
    assert diagnosis_text(diagnosis).endswith("see above")


def test_without_kernels_nothing_is_promised_of_quantised_speed() -> None:
    diagnosis = seen(compiler=None, inference_kernels=OFF)
    assert [outlook.tokens_per_second is None for outlook in diagnosis.outlooks] == [True, True, False]
    assert "speed unknown" in diagnosis_text(diagnosis)


def test_too_little_and_unknown_memory() -> None:
    small = seen(memory=Memory(8 * GB, 7 * GB, 8 * GB))
    assert [outlook.fits for outlook in small.outlooks] == [True, False, False]
    text = diagnosis_text(small)
    assert "does NOT fit" in text and "container limit 8.00 GB" in text
    unknown = seen(memory=Memory(None, None, None), cache_free_bytes=None)
    assert [outlook.fits for outlook in unknown.outlooks] == [None] * 3
    assert "unknown, unknown free" in diagnosis_text(unknown)


def test_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "_BANDWIDTH_BUFFER_BYTES", 1 << 22)
    machine = facts.look()
    assert isinstance(machine, Machine) and machine.num_threads >= 1 and machine.read_bandwidth > 1e7
    assert json.loads(json.dumps(diagnose(machine).to_dict()))["machine"]["torch"] == machine.torch


def test_the_command_says_what_kernels_turned_off_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "_BANDWIDTH_BUFFER_BYTES", 1 << 22)
    build._load.cache_clear()
    monkeypatch.setenv("OPENZAYA_KERNELS", "0")
    try:
        finished = openzaya("doctor")
        found = json.loads(openzaya("doctor", "--json").out)
    finally:
        build._load.cache_clear()
    assert finished.code == 0 and "notice: kernels are turned off" in finished.out and finished.err == ""
    assert "torch.sum" in finished.out
    assert found["ok"] and not found["machine"]["inference_kernels"]["built"]


def test_a_cache_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("OPENZAYA_CACHE", str(blocked / "kernels"))
    directory, free, problem = facts._cache()
    assert directory == str(blocked / "kernels") and free and "cannot be written to" in problem
    monkeypatch.setenv("OPENZAYA_CACHE", str(tmp_path / "new" / "kernels"))
    assert facts._cache()[2] == ""
