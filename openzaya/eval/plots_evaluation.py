"""The figures of an evaluation: accuracy against difficulty, and per family.

Accuracies carry 95 % Wilson intervals that count problems, not samples: several samples of one problem
are not independent, so the interval is, if anything, too wide.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from openzaya.eval.plots import BLUE, INK, MUTED, ORANGE, PHASE_BANDS, Drawing, Plot, draw_plots, label_grid, new_figure
from openzaya.eval.run_directory import Stage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def evaluation_plots(stage: Stage) -> list[Plot]:
    """The figures of one evaluation (``eval.json``)."""
    drawings: list[Drawing] = [
        (
            "accuracy_by_difficulty",
            "Share of held-out problems solved against difficulty, all trained families together, with 95 % intervals. "
            "The gap between the lines is what more samples, RL or aggregation can gain.",
            _accuracy_by_difficulty,
        ),
        (
            "accuracy_by_family",
            "Share of held-out problems solved, per family and difficulty; the small number is how many problems stand "
            "behind a cell. Families marked * were never trained on.",
            _accuracy_by_family,
        ),
    ]
    return draw_plots(drawings, stage)


def wilson_interval(share: float, num: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a ``share`` seen in ``num`` independent trials."""
    if num == 0:
        return 0.0, 1.0
    z = 1.959964
    centre = (share + z * z / (2 * num)) / (1 + z * z / num)
    half = z * math.sqrt(share * (1 - share) / num + z * z / (4 * num * num)) / (1 + z * z / num)
    return max(0.0, centre - half), min(1.0, centre + half)


def never_trained_families(evaluation: dict[str, Any]) -> list[str]:
    """Families that ``eval.json`` counts in its group ``never_trained``."""
    return list(evaluation.get("groups", {}).get("never_trained", {}).get("families", []))


def difficulties_of(evaluation: dict[str, Any]) -> list[int]:
    """All difficulties that were evaluated, ascending."""
    return sorted({int(difficulty) for cells in evaluation.get("families", {}).values() for difficulty in cells})


def _accuracy_by_difficulty(stage: Stage) -> Figure | None:
    evaluation = stage.evaluation
    difficulties = difficulties_of(evaluation)
    if not difficulties:
        return None
    unseen = never_trained_families(evaluation)
    trained = [cells for name, cells in evaluation["families"].items() if name not in unseen]
    figure, axes = new_figure("Accuracy against difficulty", width=7.2, height=4.0)
    lines = [
        (f"at least one of {evaluation.get('k', 'k')} correct", "pass_k", MUTED, "s"),
        ("greedy", "greedy", BLUE, "o"),
        (f"temperature {evaluation.get('temperature', 1.0):g}, mean of {evaluation.get('k', 'k')}", "avg", ORANGE, "D"),
    ]
    for offset, (label, key, colour, marker) in zip((-0.05, 0.0, 0.05), lines, strict=True):
        points = []
        for difficulty in difficulties:
            cells = [family[str(difficulty)] for family in trained if str(difficulty) in family]
            cells = [cell for cell in cells if cell.get(key) is not None and cell["n"]]
            if cells:
                num = sum(cell["n"] for cell in cells)
                points.append((difficulty, sum(cell["n"] * cell[key] for cell in cells) / num, num))
        if not points:
            continue
        at = np.array([difficulty + offset for difficulty, _, _ in points])
        shares = np.array([share for _, share, _ in points])
        low, high = np.array([wilson_interval(share, num) for _, share, num in points]).T
        axes.errorbar(
            *(at, shares),
            yerr=np.maximum(0, [shares - low, high - shares]),
            color=colour,
            marker=marker,
            markersize=5,
            capsize=3,
            elinewidth=1.1,
            label=label,
        )
    _shade_groups(axes, evaluation)
    axes.set_xlim(difficulties[0] - 0.5, difficulties[-1] + 0.5)
    axes.set_xticks(difficulties)
    axes.set_xlabel("difficulty")
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")
    axes.set_ylabel("problems solved")
    axes.legend(loc="lower left")
    return figure


def _shade_groups(axes: Axes, evaluation: dict[str, Any]) -> None:
    for name, colour in (("easy", PHASE_BANDS[2]), ("hard", PHASE_BANDS[1])):
        group = [int(difficulty) for difficulty in evaluation.get("groups", {}).get(name, {}).get("difficulties", [])]
        if group:
            axes.axvspan(min(group) - 0.5, max(group) + 0.5, color=colour, zorder=0, linewidth=0)
            axes.text(
                *((min(group) + max(group)) / 2, 1.015, f"{name} half"),
                transform=axes.get_xaxis_transform(),
                ha="center",
                va="bottom",
                color=MUTED,
                fontsize=9.5,
            )


def _accuracy_by_family(stage: Stage) -> Figure | None:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    evaluation = stage.evaluation
    difficulties = difficulties_of(evaluation)
    if not difficulties:
        return None
    unseen = never_trained_families(evaluation)
    families = sorted(evaluation["families"], key=lambda name: (name in unseen, name))
    cmap = LinearSegmentedColormap.from_list("accuracy", ["#fef3c7", "#86c5b5", "#0f5f58"], bad="#f3f4f6")
    size = (2.6 + 1.15 * len(difficulties), 1.5 + 0.5 * len(families))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    titles = ("Greedy", f"Temperature {evaluation.get('temperature', 1.0):g}, mean of {evaluation.get('k', 'k')}")
    for axes, key, title in zip(panels, ("greedy", "avg"), titles, strict=True):
        table = np.full((len(families), len(difficulties)), np.nan)
        for row, family in enumerate(families):
            for column, difficulty in enumerate(difficulties):
                cell = evaluation["families"][family].get(str(difficulty))
                if cell is None or cell.get(key) is None:
                    continue
                table[row, column] = cell[key]
                colour = "white" if cell[key] > 0.7 else INK
                axes.text(column, row - 0.08, f"{100 * cell[key]:.0f}", ha="center", va="center", color=colour)
                axes.text(
                    *(column, row + 0.3, f"n={cell['n']}"),
                    ha="center",
                    va="center",
                    color=colour,
                    alpha=0.75,
                    fontsize=6.5,
                )
        image = axes.imshow(table, cmap=cmap, vmin=0, vmax=1, aspect="auto")
        label_grid(axes, num_rows=len(families), num_columns=len(difficulties))
        axes.set_xticks(range(len(difficulties)), [str(difficulty) for difficulty in difficulties])
        axes.set_title(title, pad=10)
        axes.set_xlabel("difficulty")
    labels = [name.replace("_", " ") + ("*" if name in unseen else "") for name in families]
    panels[0].set_yticks(range(len(families)), labels)
    bar = figure.colorbar(image, ax=panels, pad=0.015, aspect=22)
    bar.ax.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")
    bar.outline.set_visible(False)
    return figure
