"""Reading a run directory: the stages of a pipeline, or one stage, from its files alone.

A pipeline's directory holds one numbered folder a stage (``02-pretrain``); a stage is any folder with one of the files
of ``openzaya/runlog.py``, or the result of an evaluation, a cascade or a calibration. Whatever is missing is simply
absent from the result: a run may be half done, interrupted, or only one stage of it present.
"""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openzaya.errors import DataError
from openzaya.runlog import check_run_format, read_json, read_metrics

RESULT_FILES = ("metrics.jsonl", "eval.json", "cascade.json", "calibration.json")
STAGE_FILES = ("run.json", "status.json", *RESULT_FILES)


@dataclass(frozen=True)
class Stage:
    """One stage's files. ``metrics`` is empty for a stage that trains nothing."""

    name: str
    directory: Path
    status: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    resolved_toml: str = ""
    evaluation: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    groups: list[dict[str, Any]] = field(default_factory=list)
    """Of a stage of RL: the groups that were drawn, an entry a step."""
    rollouts: list[dict[str, Any]] = field(default_factory=list)
    """Of a stage of RL: some of its rollouts."""
    prior: dict[str, Any] = field(default_factory=dict)
    """Of a stage of RL: what its starting policy solved."""
    cascade: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)

    @property
    def is_rl(self) -> bool:
        """Whether it has trained on rollouts."""
        return bool(self.groups) or any("rl/drawn_groups" in record for record in self.metrics[:1])

    @property
    def recipe(self) -> dict[str, Any]:
        """The values of ``resolved.toml``; empty without one."""
        try:
            return tomllib.loads(self.resolved_toml)
        except tomllib.TOMLDecodeError:
            return {}

    @property
    def phase(self) -> str:
        """The name without its number: ``02-pretrain`` -> ``pretrain``."""
        return re.sub(r"^\d+[-_]", "", self.name)

    def series(self, key: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Steps and values of the metric ``key``: values [N] or, for per-layer lists, [N, L]; null is NaN.

        Records without the key are left out, as are lists whose length differs from the last one's.
        """
        found = [(record["step"], record[key]) for record in self.metrics if record.get(key) is not None]
        rows = [(step, np.asarray(value, dtype=np.float64)) for step, value in found]
        if not rows:
            return np.zeros(0, dtype=np.int64), np.zeros(0)
        shape = rows[-1][1].shape
        rows = [(step, row) for step, row in rows if row.shape == shape]
        return np.array([step for step, _ in rows]), np.stack([row for _, row in rows])

    def last(self, key: str) -> float | None:
        """The last value of a scalar metric."""
        return next((record[key] for record in reversed(self.metrics) if record.get(key) is not None), None)


@dataclass(frozen=True)
class Run:
    """A run's stages in order."""

    directory: Path
    stages: tuple[Stage, ...]

    @property
    def training(self) -> tuple[Stage, ...]:
        """Stages that train on data."""
        return tuple(stage for stage in self.stages if stage.metrics and not stage.is_rl)

    @property
    def reinforcement(self) -> tuple[Stage, ...]:
        """Stages that train on rollouts."""
        return tuple(stage for stage in self.stages if stage.metrics and stage.is_rl)

    @property
    def evaluations(self) -> tuple[Stage, ...]:
        return tuple(stage for stage in self.stages if stage.evaluation)

    @property
    def cascades(self) -> tuple[Stage, ...]:
        return tuple(stage for stage in self.stages if stage.cascade)

    @property
    def calibrations(self) -> tuple[Stage, ...]:
        return tuple(stage for stage in self.stages if stage.calibration)


def read_run(directory: str | Path) -> Run:
    """Read ``directory``, a pipeline's or a single stage's. Raises :class:`DataError` where it is neither."""
    directory = Path(directory)
    if not directory.is_dir():
        raise DataError(f"{directory} is not a directory; name a run, such as runs/nano")
    check_run_format(directory)
    if any((directory / name).exists() for name in RESULT_FILES):
        return Run(directory, (_read_stage(directory),))
    folders = [folder for folder in sorted(directory.iterdir()) if folder.is_dir()]
    stages = [_read_stage(folder) for folder in folders if any((folder / name).exists() for name in STAGE_FILES)]
    if not stages:
        raise DataError(
            f"{directory} holds no stage: neither it nor a folder in it has any of {', '.join(STAGE_FILES)}; "
            "name the directory that a run was written to"
        )
    return Run(directory, tuple(stages))


def _read_stage(directory: Path) -> Stage:
    check_run_format(directory)
    resolved = directory / "resolved.toml"
    return Stage(
        name=directory.resolve().name,
        directory=directory,
        status=read_json(directory / "status.json") or {},
        environment=read_json(directory / "environment.json") or {},
        metrics=_read_steps(directory / "metrics.jsonl"),
        resolved_toml=resolved.read_text(encoding="utf-8") if resolved.exists() else "",
        evaluation=read_json(directory / "eval.json") or {},
        samples=_read_samples(directory / "samples.jsonl"),
        groups=_read_steps(directory / "groups.jsonl"),
        rollouts=_read_steps(directory / "rollouts.jsonl"),
        prior=read_json(directory / "prior.json") or {},
        cascade=read_json(directory / "cascade.json") or {},
        calibration=read_json(directory / "calibration.json") or {},
    )


def _read_steps(path: Path) -> list[dict[str, Any]]:
    """Records with a ``step``; a half-written last line is left out."""
    return read_metrics(path) if path.exists() else []


def _read_samples(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    samples = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        try:
            if line:
                samples.append(json.loads(line))
        except ValueError:
            raise DataError(f"{path}:{number}: not a JSON object; remove the line or evaluate again") from None
    return samples
