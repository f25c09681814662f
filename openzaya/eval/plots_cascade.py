"""The figures of the cascade's table: accuracy from stage to stage, by difficulty, by family."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from openzaya.eval.plots import BLUE, INK, MUTED, ORANGE, RED, TEAL, Drawing, Plot, draw_plots, label_grid, new_figure
from openzaya.eval.run_directory import Stage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def cascade_plots(stage: Stage) -> list[Plot]:
    """The figures of ``cascade.json``."""
    k = stage.cascade.get("k", "k")
    drawings: list[Drawing] = [
        (
            "cascade",
            f"The same held-out problems after each stage: mean of {k} samples at temperature 1, greedy, the most "
            "frequent answer, at least one right; with 95 % intervals over problems. Sharpening alone would move the "
            "mean towards the majority and leave the other lines. Hollow: models beside the cascade; star: the last "
            "model with Markovian RSA, beside its single rollouts on the same problems.",
            _stages,
        ),
        (
            "cascade_by_difficulty",
            f"Mean of {k} samples against difficulty, a line a stage, from light (first) to dark (last).",
            _by_difficulty,
        ),
        ("cascade_by_family", f"Mean of {k} samples by family and stage, in per cent.", _by_family),
    ]
    return draw_plots(drawings, stage.cascade)


def _stages(cascade: dict[str, Any]) -> Figure | None:
    rows = cascade.get("rows", [])
    if not rows:
        return None
    figure, axes = new_figure("Stage by stage", width=max(7.0, 2.2 + 1.25 * len(rows)), height=4.4)
    columns = [
        ("pass_at_k", f"at least one of {cascade.get('k', 'k')}", MUTED, "s"),
        ("majority_at_k", "majority", TEAL, "^"),
        ("greedy", "greedy", BLUE, "o"),
        ("avg_at_k", "mean", ORANGE, "D"),
    ]
    labels = [str(row["label"]) for row in rows]
    num_stages = sum(row["role"] == "cascade" for row in rows)
    for offset, (key, label, colour, marker) in zip((-0.09, -0.03, 0.03, 0.09), columns, strict=True):
        points = [(index + offset, row[key]) for index, row in enumerate(rows) if row.get(key) is not None]
        chain = [point for point in points if point[0] < num_stages - 0.5]
        beside = [point for point in points if point[0] > num_stages - 0.5]
        _points(axes, chain, colour, marker, label=label, linestyle="-")
        _points(axes, beside, colour, marker, linestyle="none", markerfacecolor="white")
    instructions = [(row.get("instructions") or {}).get("strict") for row in rows]
    strict = [(index, value) for index, value in enumerate(instructions) if value is not None]
    _points(axes, [point for point in strict if point[0] < num_stages], RED, "v", label="instructions", linestyle=":")
    beside = [point for point in strict if point[0] >= num_stages]
    _points(axes, beside, RED, "v", linestyle="none", markerfacecolor="white")
    rsa = cascade.get("rsa")
    if rsa and rsa.get("avg"):
        at = len(rows)
        labels.append(f"{rows[num_stages - 1]['label']}\n+ RSA ({rsa['n']} problems)")
        _points(axes, [(at - 0.09, rsa["single"]["avg_at_k"])], ORANGE, "D", linestyle="none", markerfacecolor="white")
        _points(axes, [(at + 0.09, rsa["avg"])], INK, "*", linestyle="none", label="Markovian RSA", markersize=11)
    if len(labels) > num_stages:
        axes.axvline(num_stages - 0.5, color=MUTED, linewidth=0.8)
    axes.set_xticks(range(len(labels)), [_wrapped(label) for label in labels], fontsize=9)
    axes.set_xlim(-0.5, len(labels) - 0.5)
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")
    axes.set_ylabel("held-out problems")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9.5)
    return figure


def _points(axes: Axes, points: list[tuple[float, list[float]]], colour: str, marker: str, **style: Any) -> None:
    known = [(at, value) for at, value in points if value is not None]
    if not known:
        return
    at = np.array([place for place, _ in known])
    mean, low, high = np.array([value for _, value in known]).T
    settings = {"markersize": 5.5, "capsize": 3, "elinewidth": 1.1} | style
    axes.errorbar(at, mean, yerr=np.maximum(0, [mean - low, high - mean]), color=colour, marker=marker, **settings)


def _by_difficulty(cascade: dict[str, Any]) -> Figure | None:
    from matplotlib import colormaps

    rows = [row for row in cascade.get("rows", []) if row.get("by_difficulty")]
    if not rows or len(rows[0]["by_difficulty"]) < 2:
        return None
    figure, axes = new_figure("Accuracy against difficulty, stage by stage", width=8.0, height=4.0)
    num_stages = sum(row["role"] == "cascade" for row in rows)
    shades = colormaps["viridis_r"](np.linspace(0.12, 0.95, max(2, num_stages)))
    for index, row in enumerate(rows):
        points = sorted((int(level), share) for level, share in row["by_difficulty"].items() if share is not None)
        is_stage = row["role"] == "cascade"
        colour, style = (shades[index], "-o") if is_stage else (RED, "--s")
        axes.plot(*zip(*points, strict=True), style, color=colour, markersize=4.5, label=row["label"])
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")
    axes.set_xlabel("difficulty")
    axes.set_ylabel("mean of the samples")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9.5)
    return figure


def _by_family(cascade: dict[str, Any]) -> Figure | None:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    rows = cascade.get("rows", [])
    families = sorted({family for row in rows for family in row.get("by_family", {})})
    if not families:
        return None
    cmap = LinearSegmentedColormap.from_list("accuracy", ["#fef3c7", "#86c5b5", "#0f5f58"], bad="#f3f4f6")
    figure = Figure(figsize=(2.6 + 1.1 * len(rows), 1.3 + 0.36 * len(families)), layout="constrained")
    axes = figure.add_subplot()
    table = np.full((len(families), len(rows)), np.nan)
    for column, row in enumerate(rows):
        for line, family in enumerate(families):
            share = row["by_family"].get(family)
            if share is None:
                continue
            table[line, column] = share
            colour = "white" if share > 0.7 else INK
            axes.text(column, line, f"{100 * share:.0f}", ha="center", va="center", fontsize=9, color=colour)
    axes.imshow(table, cmap=cmap, vmin=0, vmax=1, aspect="auto")
    label_grid(axes, num_rows=len(families), num_columns=len(rows))
    axes.set_xticks(range(len(rows)), [_wrapped(str(row["label"])) for row in rows], fontsize=9)
    axes.set_yticks(range(len(families)), [family.replace("_", " ") for family in families])
    axes.set_title("By family", pad=10)
    return figure


def _wrapped(label: str) -> str:
    """A row's name below its column: what stands after the first comma on a line of its own."""
    return label.replace(", ", "\n", 1)
