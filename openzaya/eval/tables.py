"""What the sections of a report are made of: tables of ready text, headline numbers, and numbers as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from openzaya.eval.plots_training import smoothed
from openzaya.eval.run_directory import Stage
from openzaya.runlog import format_duration

MISSING = "–"
MAX_SAMPLE_CHARACTERS = 1500


@dataclass(frozen=True)
class Table:
    """A table of ready text. Columns after the first ``num_text_columns`` hold numbers, set to the right."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_text_columns: int = 1


@dataclass(frozen=True)
class Fact:
    """A headline number."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Sample:
    """A response for people to read."""

    title: str
    detail: str
    prompt: str
    response: str
    note_label: str
    note: str


def evaluation_sample(sample: dict[str, Any]) -> Sample:
    """An entry of ``samples.jsonl``."""
    how = "greedy" if sample["temperature"] == 0 else f"temperature {sample['temperature']}"
    parts = [str(sample["model"])] if "model" in sample else []
    parts += [f"difficulty {sample['difficulty']}", how, *(["truncated"] if sample["truncated"] else [])]
    is_form = sample["family"] == "instructions"
    return Sample(
        title=str(sample["family"]),
        detail=", ".join(parts),
        prompt=str(sample["prompt"]),
        response=shortened(str(sample["response"])),
        note_label="forms asked" if is_form else "expected",
        note=str(sample["gold"]),
    )


def shortened(text: str) -> str:
    """``text`` without its middle where it is very long."""
    if len(text) <= MAX_SAMPLE_CHARACTERS:
        return text
    half = MAX_SAMPLE_CHARACTERS // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters ...]\n{text[-half:]}"


def final_loss(stage: Stage) -> float | None:
    """Moving average of the loss at the end: a single batch says little."""
    values = stage.series("loss/ce_nats")[1]
    return float(smoothed(values)[-1]) if len(values) else None


def duration_s(stage: Stage) -> float:
    """Time spent in steps where it was logged; pauses between interrupted sessions do not count."""
    seconds = stage.series("time/step_s")[1]
    if len(seconds):
        return float(seconds.sum())
    times = stage.series("time_unix_s")[1]
    return float(times[-1] - times[0]) if len(times) else 0.0


def stage_duration(stage: Stage) -> str:
    seconds = duration_s(stage) if stage.metrics else stage.status.get("elapsed_s", stage.evaluation.get("seconds"))
    return MISSING if seconds is None else format_duration(seconds)


def percent(share: float | None) -> str:
    return MISSING if share is None else f"{100 * share:.1f} %"


def bounds(value: Sequence[float]) -> str:
    return f"95 % interval {100 * value[1]:.1f} – {100 * value[2]:.1f} %"


def interval_text(value: Sequence[float] | None) -> str:
    return MISSING if value is None else f"{100 * value[0]:.1f} % [{100 * value[1]:.1f}, {100 * value[2]:.1f}]"


def count(value: float | None) -> str:
    return MISSING if value is None else f"{value:,.0f}"


def short_count(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.0f}"


def range_of(difficulties: Sequence[Any]) -> str:
    numbers = sorted(int(difficulty) for difficulty in difficulties)
    return f" (difficulty {numbers[0]}–{numbers[-1]})" if numbers else ""
