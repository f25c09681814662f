"""The report's sections about reinforcement learning: the cascade's table, the stages of RL, calibrations.

As in ``report.py`` everything comes from a run's files. What the table says first is what changed over the cascade, and
whether greedy accuracy moved with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from openzaya.eval.plots import Plot
from openzaya.eval.plots_cascade import cascade_plots
from openzaya.eval.plots_curriculum import calibration_plots, curriculum_plots, refiltering_plots
from openzaya.eval.plots_rl import rl_plots
from openzaya.eval.run_directory import Run, Stage
from openzaya.eval.tables import (
    MISSING,
    Fact,
    Sample,
    Table,
    count,
    evaluation_sample,
    interval_text,
    percent,
    shortened,
    stage_duration,
)

SAMPLES_EACH = 4
WINDOW = 0.1
"""Share of a stage's steps behind its first and its last numbers."""


@dataclass(frozen=True)
class CascadeSection:
    """Everything shown about one cascade."""

    name: str
    settings: str
    tables: tuple[Table, ...]
    plots: tuple[Plot, ...]
    good: tuple[Sample, ...]
    bad: tuple[Sample, ...]


@dataclass(frozen=True)
class RLStageSection:
    """What belongs to one stage of RL alone."""

    name: str
    plots: tuple[Plot, ...]
    good: tuple[Sample, ...]
    bad: tuple[Sample, ...]


@dataclass(frozen=True)
class RLSection:
    """All stages of RL."""

    table: Table
    plots: tuple[Plot, ...]
    stages: tuple[RLStageSection, ...]

    @property
    def all_plots(self) -> list[Plot]:
        return [*self.plots, *(plot for stage in self.stages for plot in stage.plots)]


@dataclass(frozen=True)
class CalibrationSection:
    """One calibration."""

    name: str
    table: Table
    plots: tuple[Plot, ...]


# --- the cascade ----------------------------------------------------------------------------------


def cascade_facts(run: Run) -> list[Fact]:
    """The headline numbers of the last cascade."""
    if not run.cascades:
        return []
    cascade = run.cascades[-1].cascade
    rows = [row for row in cascade.get("rows", []) if row["role"] == "cascade"]
    facts = []
    for key, label in (("avg_at_k", f"avg@{cascade.get('k', 'k')}"), ("greedy", "greedy")):
        found = [row for row in rows if row.get(key) is not None]
        if not found:
            continue
        whole = f"{found[0]['label']} → {found[-1]['label']}" if len(found) > 1 else found[0]["label"]
        change = _comparison(cascade, found[0]["label"], found[-1]["label"]).get(key)
        detail = whole + (f", {_points_text(change)}" if change else "")
        values = " → ".join(dict.fromkeys(percent(row[key][0]) for row in (found[0], found[-1])))
        facts.append(Fact(f"held-out {label}", values, detail))
    rsa = cascade.get("rsa")
    if rsa and rsa.get("avg") and rsa["single"].get("avg_at_k"):
        values = f"{percent(rsa['single']['avg_at_k'][0])} → {percent(rsa['avg'][0])}"
        facts.append(Fact("with Markovian RSA", values, f"{rsa['n']} problems, {_points_text(rsa['gain'])}"))
    return facts


def cascade_sections(run: Run) -> tuple[CascadeSection, ...]:
    """One a cascade."""
    return tuple(_cascade_section(stage) for stage in run.cascades)


def _cascade_section(stage: Stage) -> CascadeSection:
    cascade = stage.cascade
    settings = [
        f"{count(cascade.get('n'))} held-out problems, the same for all rows",
        f"{cascade.get('k', 'k')} samples at temperature {cascade.get('temperature', 1):g}",
        f"seed {cascade.get('seed', MISSING)}",
        f"at most {cascade.get('max_new_tokens', MISSING)} new tokens",
        "brackets: 95 % intervals over problems, of differences paired by problem",
    ]
    tables = [_row_table(cascade), _difference_table(cascade), _rsa_table(cascade), _band_table(cascade)]
    # The last model's responses say where the cascade has come to.
    last = [row["label"] for row in cascade.get("rows", []) if row["role"] == "cascade"][-1:]
    samples = [sample for sample in stage.samples if [sample.get("model")] == last]
    good = [sample for sample in samples if (sample.get("reward") or 0) > 0]
    bad = [sample for sample in samples if sample.get("reward") is not None and sample["reward"] <= 0]
    return CascadeSection(
        name=stage.name,
        settings=", ".join(settings),
        tables=tuple(table for table in tables if table is not None),
        plots=tuple(cascade_plots(stage)),
        good=tuple(evaluation_sample(sample) for sample in _one_each(good, "family")),
        bad=tuple(evaluation_sample(sample) for sample in _one_each(bad, "family")),
    )


def _row_table(cascade: dict[str, Any]) -> Table:
    k = cascade.get("k", "k")
    has_instructions = any(row.get("instructions") for row in cascade.get("rows", []))
    header = ["model", f"avg@{k}", "greedy", f"majority@{k}", f"pass@{k}", "truncated", "length when right"]
    rows = []
    for row in cascade.get("rows", []):
        length = row.get("length_right_tokens")
        cells = [
            str(row["label"]) + ("" if row["role"] == "cascade" else " (beside)"),
            *(interval_text(row.get(key)) for key in ("avg_at_k", "greedy", "majority_at_k", "pass_at_k")),
            percent(row.get("truncation_rate")),
            MISSING if length is None else f"{length[0]:.1f}",
        ]
        if has_instructions:
            found = row.get("instructions") or {}
            cells += [interval_text(found.get("strict")), interval_text(found.get("followed"))]
        rows.append(tuple(cells))
    if has_instructions:
        header += ["instructions", "forms alone"]
    return Table(tuple(header), tuple(rows))


def _difference_table(cascade: dict[str, Any]) -> Table | None:
    comparisons = cascade.get("comparisons", [])
    if not comparisons:
        return None
    k = cascade.get("k", "k")
    columns = [("avg_at_k", f"avg@{k}"), ("greedy", "greedy"), ("majority_at_k", f"majority@{k}")]
    columns += [("pass_at_k", f"pass@{k}"), ("instructions", "instructions")]
    columns = [(key, title) for key, title in columns if any(entry.get(key) for entry in comparisons)]
    rows = []
    for entry in comparisons:
        length = entry.get("length_right_tokens")
        rows.append(
            (
                f"{entry['before']} → {entry['after']}",
                *(_points_text(entry.get(key)) for key, _ in columns),
                MISSING if length is None else f"{length[0]:+.1f} [{length[1]:+.1f}, {length[2]:+.1f}]",
            )
        )
    return Table(("paired difference, points", *(title for _, title in columns), "length, tokens"), tuple(rows))


def _rsa_table(cascade: dict[str, Any]) -> Table | None:
    rsa = cascade.get("rsa")
    if not rsa:
        return None
    single, settings = rsa["single"], rsa.get("settings", {})
    how = ", ".join(f"{name}={settings[name]}" for name in ("n", "c", "t", "beta", "tau") if name in settings)
    rows = [
        (
            "single rollouts",
            *(interval_text(single.get(key)) for key in ("avg_at_k", "majority_at_k", "pass_at_k")),
            *(MISSING, percent(single.get("truncation_rate"))),
        ),
        (
            f"Markovian RSA ({how})",
            *(interval_text(rsa.get(key)) for key in ("avg", "majority", "pass")),
            *(_points_text(rsa.get("gain")), percent(rsa.get("truncation_rate"))),
        ),
    ]
    rounds = [
        (f"its round {index}", interval_text(value), *([MISSING] * 4))
        for index, value in enumerate(rsa.get("rounds", [])[:-1])
    ]
    header = (f"last model, {rsa['n']} problems", "mean", "majority", "at least one", "gain in the mean", "truncated")
    return Table(header, (rows[0], *rounds, rows[1]))


def _band_table(cascade: dict[str, Any]) -> Table | None:
    bands = (cascade.get("rsa") or {}).get("bands")
    if not bands:
        return None
    rows = tuple(
        (
            band["single_right"],
            str(band["n"]),
            *(interval_text(band.get(key)) for key in ("first", "final")),
            _points_text(band["gain"]),
        )
        for band in bands
    )
    return Table(("RSA where single rollouts are right in", "problems", "first round", "last round", "gain"), rows)


def _comparison(cascade: dict[str, Any], before: str, after: str) -> dict[str, Any]:
    found = (e for e in cascade.get("comparisons", []) if (e["before"], e["after"]) == (before, after))
    return next(found, {})


def _points_text(value: Sequence[float] | None) -> str:
    """A difference of shares in points."""
    if value is None:
        return MISSING
    return f"{100 * value[0]:+.1f} [{100 * value[1]:+.1f}, {100 * value[2]:+.1f}]"


# --- stages of RL ---------------------------------------------------------------------------------


def rl_facts(run: Run) -> list[Fact]:
    """Where no cascade was evaluated, what the last stage's rollouts say."""
    if not run.reinforcement or run.cascades:
        return []
    stage = run.reinforcement[-1]
    first, last = _ends(stage, "rl/reward")
    if first is None or last is None:
        return []
    return [Fact("reward of rollouts", f"{percent(first)} → {percent(last)}", f"{stage.phase}, first and last tenth")]


def rl_section(stages: Sequence[Stage]) -> RLSection | None:
    """All stages of RL; None without one."""
    if not stages:
        return None
    return RLSection(
        table=_rl_table(stages),
        plots=tuple([*rl_plots(stages), *refiltering_plots(stages)]),
        stages=tuple(_stage_section(stage) for stage in stages),
    )


def _stage_section(stage: Stage) -> RLStageSection:
    latest = list(reversed(stage.rollouts))
    # The verdict says what is right: a reward may be a score, or have been taken for a loop.
    good = [entry for entry in latest if entry.get("verdict") == 1]
    bad = [entry for entry in latest if entry.get("verdict") != 1]
    return RLStageSection(
        name=stage.name,
        plots=tuple(curriculum_plots(stage)),
        good=tuple(_rollout_sample(entry) for entry in _one_each(good, "environment")),
        # Reasons are few and environments many: of each reason one comes first.
        bad=tuple(_rollout_sample(entry) for entry in _one_each(_one_each(bad, "reason", len(bad)), "environment")),
    )


def _one_each(entries: Sequence[dict[str, Any]], key: str, num: int = SAMPLES_EACH) -> list[dict[str, Any]]:
    """So many, those that are the first with their value of ``key`` before all others."""
    seen: set[Any] = set()
    first: list[dict[str, Any]] = []
    later: list[dict[str, Any]] = []
    for entry in entries:
        (later if entry.get(key) in seen else first).append(entry)
        seen.add(entry.get(key))
    return [*first, *later][:num]


def _rollout_sample(entry: dict[str, Any]) -> Sample:
    parts = [f"difficulty {entry['difficulty']}", f"step {entry['step']}", str(entry["form"])]
    parts += [f"{entry['num_tokens']} tokens", *(["truncated"] if entry["is_truncated"] else [])]
    parts.append(f"{percent(entry['solve_rate'])} of its group right")
    return Sample(
        title=str(entry["environment"]),
        detail=", ".join(parts),
        prompt=shortened(str(entry["prompt"])),
        response=shortened(str(entry["response"])),
        note_label="no verdict" if entry["reward"] is None else f"reward {entry['reward']:g}",
        note=str(entry["reason"]),
    )


def _rl_table(stages: Sequence[Stage]) -> Table:
    header = ("stage", "steps", "groups drawn", "equal", "too old", "reward", "length", "highest KL", "loops", "time")
    rows = []
    for stage in stages:
        rows.append(
            (
                stage.name,
                count(stage.metrics[-1]["step"]),
                *(count(_total(stage, f"rl/{name}")) for name in ("drawn_groups", "dropped_equal", "dropped_stale")),
                _ends_text(stage, "rl/reward", 100, " %"),
                _ends_text(stage, "rl/length_tokens", 1, ""),
                _highest_kl(stage),
                percent(_mean(stage, "rl/repetition_rate")),
                stage_duration(stage),
            )
        )
    return Table(header, tuple(rows))


def _total(stage: Stage, key: str) -> float | None:
    values = stage.series(key)[1]
    return float(values.sum()) if len(values) else None


def _mean(stage: Stage, key: str) -> float | None:
    values = stage.series(key)[1]
    return float(values.mean()) if len(values) else None


def _highest_kl(stage: Stage) -> str:
    values = stage.series("rl/on_policy_kl")[1]
    return f"{values.max():.1e}" if len(values) else MISSING


def _ends(stage: Stage, key: str) -> tuple[float | None, float | None]:
    """Mean over the first and over the last tenth of the stage."""
    values = stage.series(key)[1]
    if not len(values):
        return None, None
    size = max(1, round(WINDOW * len(values)))
    return float(values[:size].mean()), float(values[-size:].mean())


def _ends_text(stage: Stage, key: str, scale: float, unit: str) -> str:
    first, last = _ends(stage, key)
    if first is None or last is None:
        return MISSING
    return f"{scale * first:.1f} → {scale * last:.1f}{unit}"


# --- calibrations ---------------------------------------------------------------------------------


def calibration_sections(run: Run) -> tuple[CalibrationSection, ...]:
    """One a ``calibration.json``."""
    return tuple(
        CalibrationSection(
            stage.name, calibration_table(stage.calibration), tuple(calibration_plots(stage.calibration))
        )
        for stage in run.calibrations
    )


def calibration_table(calibration: dict[str, Any]) -> Table:
    """Every environment with its fit."""
    header = ("environment", "source", "start at", "half solved at", "± 1 deviation", "slope", "groups", "solved")
    rows = []
    for source, fits in calibration.get("calibration", {}).items():
        for name, fit in sorted(fits.items()):
            right, asked = (sum(group[index] for group in fit["observed"]) for index in (1, 2))
            rows.append(
                (
                    *(name, source, str(fit["difficulty"])),
                    *(f"{fit['middle']:.2f}", f"{fit['deviation']:.2f}", f"{fit['slope']:.2f}"),
                    *(count(len(fit["observed"])), percent(right / asked if asked else None)),
                )
            )
    return Table(header, tuple(rows), num_text_columns=2)
