"""The figures of difficulty: what the starting policy solved, which levels were kept, where each environment stands.

Small multiples, one panel an environment, in the order of their names; of very many environments the first
``MAX_PANELS`` are drawn. All panels of a figure share their axes unless said otherwise, so they can be compared.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from openzaya.eval.plots import BLUE, INK, MUTED, ORANGE, PHASE_BANDS, Drawing, Plot, draw_plots, label_grid
from openzaya.eval.run_directory import Stage
from openzaya.rl.curriculum import kept_levels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_PANELS = 60
NUM_COLUMNS = 5
MAX_ROWS = 80
"""Environments in a table of levels."""


def curriculum_plots(stage: Stage) -> list[Plot]:
    """The figures of one stage of RL: pass rates before it, calibration, difficulty over time."""
    slug = re.sub(r"\W+", "_", stage.name)
    drawings: list[Drawing] = []
    for source, rates in stage.prior.get("pass_rates", {}).items():
        limit = max_prior_pass_rates(stage).get(source, 1.0)
        drawings.append(
            (
                f"prior_{slug}_{re.sub(r'[^a-zA-Z0-9]+', '_', source)}",
                f"What the starting policy of {stage.phase} solved of the source {source}, in per cent, by environment "
                f"and level. Levels above {100 * limit:g} % (grey) are left out; of an environment with nothing left, "
                "its hardest level stays.",
                functools.partial(_prior, rates, limit),
            )
        )
    for source, fits in stage.prior.get("calibration", {}).items():
        drawings.append(_calibration_drawing(f"calibration_{slug}", source, fits))
    drawings.append(
        (
            f"difficulty_{slug}",
            f"Difficulty of each environment over the steps of {stage.phase}, as the policy drives it: up one after a "
            "group above 70 %, down one after a group without a right answer. Dots: groups, from none right (orange) "
            "to all right (green).",
            _difficulty,
        )
    )
    return draw_plots(drawings, stage)


def calibration_plots(calibration: Mapping[str, Any]) -> list[Plot]:
    """The figures of ``calibration.json``, one a source."""
    sources = calibration.get("calibration", {}).items()
    return draw_plots([_calibration_drawing("calibration", source, fits) for source, fits in sources], None)


def refiltering_plots(stages: Sequence[Stage]) -> list[Plot]:
    """Levels of each environment that every stage kept, where any stage asked for it."""
    caption = (
        "Levels that each stage trained on after its starting policy was asked: those that it solved too often already "
        "are left out, so the easy end goes as the policy gets better. Below: lowest and highest level."
    )
    return draw_plots([("levels_kept", caption, _levels_kept)], stages)


def max_prior_pass_rates(stage: Stage) -> dict[str, float]:
    """Source -> pass rate above which a level is left out, from the stage's recipe."""
    sources = stage.recipe.get("sources", [])
    return {source["name"]: float(source.get("max_prior_pass_rate", 1.0)) for source in sources if "name" in source}


def _calibration_drawing(name: str, source: str, fits: Mapping[str, Any]) -> Drawing:
    return (
        f"{name}_{re.sub(r'[^a-zA-Z0-9]+', '_', source)}",
        f"Pass rate against difficulty in the environments of {source}. Dots: groups that were observed, larger where "
        "several lie on each other; line: the fitted curve, shaded where its middle is uncertain by one standard "
        "deviation; dashed: the difficulty to begin at, where half should be solved or, if that is lower, the highest "
        "one allowed.",
        functools.partial(_calibration, fits),
    )


# --- small multiples ------------------------------------------------------------------------------


def _grid(num: int, *, height: float = 1.75, share_y: bool = True) -> tuple[Figure, list[Axes]]:
    """So many panels; those that are too many in the last row are hidden."""
    from matplotlib.figure import Figure

    num_columns = min(NUM_COLUMNS, num)
    num_rows = -(-num // num_columns)
    size = (max(4.5, 2.05 * num_columns + 0.6), height * num_rows + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    table = figure.subplots(num_rows, num_columns, squeeze=False, sharex=True, sharey=share_y)
    panels = list(table.ravel())
    for axes in panels[num:]:
        axes.set_visible(False)
        # The panel above it is now the last of its column.
    for column in range(num_columns):
        lowest = max(row for row in range(num_rows) if row * num_columns + column < num)
        table[lowest, column].tick_params(labelbottom=True)
    return figure, panels[:num]


def _title(axes: Axes, name: str, right: str) -> None:
    shown = name.replace("_", " ")
    axes.set_title(shown if len(shown) <= 22 else shown[:20] + "…", fontsize=8.5, pad=4)
    axes.text(1, 1.02, right, transform=axes.transAxes, ha="right", va="bottom", fontsize=7.5, color=MUTED)
    axes.tick_params(labelsize=7.5)


def _calibration(fits: Mapping[str, Any], _: object) -> Figure | None:
    names = sorted(fits)[:MAX_PANELS]
    if not names:
        return None
    asked = [level for name in names for level, _, _ in fits[name]["observed"]]
    highest = max([1.0, *asked, *(fits[name]["middle"] + fits[name]["slope"] for name in names)])
    at = np.linspace(0, 1.03 * highest, 200)
    figure, panels = _grid(len(names))
    for axes, name in zip(panels, names, strict=True):
        fit = fits[name]

        def curve(middle: float, slope: float = fit["slope"]) -> Any:
            return 1 / (1 + np.exp(np.clip((at - middle) / slope, -30, 30)))

        low, high = (curve(fit["middle"] + sign * fit["deviation"]) for sign in (-1, 1))
        axes.fill_between(at, low, high, color=BLUE, alpha=0.15, linewidth=0)
        axes.plot(at, curve(fit["middle"]), color=BLUE, linewidth=1.5)
        axes.axvline(fit["difficulty"], color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        groups = [(level, right / total) for level, right, total in fit["observed"] if total]
        if groups:
            places, times = np.unique(np.array(groups), axis=0, return_counts=True)
            axes.scatter(places[:, 0], places[:, 1], s=10 + 10 * times, color=ORANGE, alpha=0.75, linewidth=0, zorder=3)
        axes.set_ylim(-0.06, 1.06)
        axes.set_yticks([0, 0.5, 1], ["0", "½", "1"])
        _title(axes, name, f"{fit['middle']:.1f} ± {fit['deviation']:.1f}")
    figure.supxlabel("difficulty", fontsize=9.5)
    figure.supylabel("pass rate", fontsize=9.5)
    return figure


def _difficulty(stage: Stage) -> Figure | None:
    """Of the sources whose difficulty follows the policy."""
    from matplotlib.colors import LinearSegmentedColormap

    online = {source.get("name") for source in stage.recipe.get("sources", []) if source.get("curriculum") == "online"}
    series: dict[str, list[tuple[int, int, float]]] = {}
    for record in stage.groups:
        for group in record.get("groups", []):
            if group["source"] in online and group["form"] == "plain":
                entry = (record["step"], group["difficulty"], group["solve_rate"])
                series.setdefault(group["environment"], []).append(entry)
    if not series:
        return None
    names = sorted(series)[:MAX_PANELS]
    colours = LinearSegmentedColormap.from_list("solved", ["#ea580c", "#d1d5db", "#0f766e"])
    figure, panels = _grid(len(names), height=1.6)
    for axes, name in zip(panels, names, strict=True):
        steps, levels, rates = np.array(series[name]).T
        axes.step(steps, levels, where="post", color=MUTED, linewidth=0.9)
        axes.scatter(steps, levels, c=rates, cmap=colours, vmin=0, vmax=1, s=9, linewidth=0, zorder=3)
        _title(axes, name, f"{levels[0]:.0f} → {levels[-1]:.0f}")
    highest = max(level for name in names for _, level, _ in series[name])
    panels[0].set_ylim(-0.4, highest + 0.6)
    figure.supxlabel("step of the stage", fontsize=9.5)
    figure.supylabel("difficulty", fontsize=9.5)
    return figure


# --- tables of levels -----------------------------------------------------------------------------


def _prior(rates: Mapping[str, Mapping[str, float]], limit: float, _: object) -> Figure | None:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    names = sorted(rates)[:MAX_ROWS]
    levels = sorted({int(level) for name in names for level in rates[name]})
    if not levels:
        return None
    cmap = LinearSegmentedColormap.from_list("rate", ["#fef3c7", "#86c5b5", "#0f5f58"], bad="#e5e7eb")
    figure = Figure(figsize=(2.6 + 0.52 * len(levels), 1.2 + 0.3 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    table = np.full((len(names), len(levels)), np.nan)
    for row, name in enumerate(names):
        kept = kept_levels(rates[name], limit) if rates[name] else []
        for column, level in enumerate(levels):
            rate = rates[name].get(str(level))
            if rate is None:
                continue
            if level in kept:
                table[row, column] = rate
            colour = "#9ca3af" if level not in kept else "white" if rate > 0.7 else INK
            axes.text(column, row, f"{100 * rate:.0f}", ha="center", va="center", fontsize=8, color=colour)
    axes.imshow(table, cmap=cmap, vmin=0, vmax=1, aspect="auto")
    _table_axes(axes, names, [str(level) for level in levels])
    axes.set_xlabel("level")
    axes.set_title("Pass rate before the stage, %", pad=10)
    return figure


def _levels_kept(stages: Sequence[Stage]) -> Figure | None:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    columns: list[tuple[str, dict[str, tuple[list[int], int]]]] = []
    for stage in stages:
        limits = max_prior_pass_rates(stage)
        for source, rates in stage.prior.get("pass_rates", {}).items():
            kept = {
                name: (kept_levels(by_level, limits.get(source, 1.0)), len(by_level))
                for name, by_level in rates.items()
                if by_level
            }
            columns.append((f"{stage.phase}\n{source.replace('_', ' ')}", kept))
    names = sorted({name for _, kept in columns for name in kept})[:MAX_ROWS]
    if not names:
        return None
    cmap = LinearSegmentedColormap.from_list("kept", [PHASE_BANDS[1], "#93c5fd", BLUE], bad="#f3f4f6")
    figure = Figure(figsize=(2.6 + 1.15 * len(columns), 1.4 + 0.34 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    table = np.full((len(names), len(columns)), np.nan)
    for (row, name), (column, (_, kept)) in ((r, c) for r in enumerate(names) for c in enumerate(columns)):
        if name not in kept:
            continue
        levels, num_asked = kept[name]
        share = len(levels) / num_asked
        table[row, column] = share
        colour = "white" if share > 0.7 else INK
        text = f"{len(levels)} of {num_asked}\n{levels[0]}–{levels[-1]}"
        axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour, linespacing=0.95)
    axes.imshow(table, cmap=cmap, vmin=0, vmax=1, aspect="auto")
    _table_axes(axes, names, [label for label, _ in columns])
    axes.set_title("Levels kept", pad=10)
    return figure


def _table_axes(axes: Axes, rows: Sequence[str], columns: Sequence[str]) -> None:
    label_grid(axes, num_rows=len(rows), num_columns=len(columns))
    axes.set_xticks(range(len(columns)), columns, fontsize=8.5)
    axes.set_yticks(range(len(rows)), [name.replace("_", " ") for name in rows], fontsize=8.5)
