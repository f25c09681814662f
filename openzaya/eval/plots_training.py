"""The figures of training: loss, expert load, residual stream, learning rates, speed.

They share one horizontal axis, the optimiser steps of all phases laid end to end, with each phase as a
shaded band. Lines of layers run from dark (first layer) to light (last).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from openzaya.eval.plots import (
    BLUE,
    INK,
    MUTED,
    ORANGE,
    PHASE_BANDS,
    RED,
    TEAL,
    Drawing,
    Plot,
    draw_plots,
    label_grid,
    new_figure,
)
from openzaya.eval.run_directory import Run, Stage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Stages = Sequence[Stage]
MAX_POINTS = 1200
LOAD_ENTROPY_TARGET = 0.98


def training_plots(run: Run) -> list[Plot]:
    """The figures of all training stages; those whose metrics were not logged are left out."""
    drawings: list[Drawing] = [
        (
            "loss",
            "Cross-entropy per supervised token. Thin: each step; bold: moving average, restarted in each phase. "
            "Phases have different data, so the steps between bands are changes of task, not of quality.",
            _loss,
        ),
        (
            "load_entropy",
            "How evenly each layer's router spreads tokens over its experts: 1 is perfectly even, 0 means one expert "
            f"gets all. Above the dashed line ({LOAD_ENTROPY_TARGET}) balancing works; a layer that falls and stays "
            "down has collapsed.",
            load_entropy_figure,
        ),
        (
            "expert_load",
            "Tokens that each expert received in the last logged batch, as a multiple of its fair share. 1 everywhere "
            "is ideal; a cell near 0 is an expert that is hardly used.",
            _expert_load,
        ),
        (
            "residual_rms",
            "Root mean square of the residual stream after each layer. It should settle; growth without bound in the "
            "last layers announces an instability.",
            _residual,
        ),
        ("learning_rate", "Learning rates of the two optimisers: warm-up, constant, decay.", _learning_rate),
        (
            "gradient_norm",
            "Norm of the whole gradient before clipping. Spikes that do not return are a warning.",
            gradient_norm_figure,
        ),
        (
            "throughput",
            "Training speed. Thin: each step; bold: moving average. Drops are other work on the machine, "
            "saving, or longer windows.",
            _throughput,
        ),
    ]
    return draw_plots(drawings, run.training)


def laid_end_to_end(stages: Stages, key: str) -> list[tuple[Stage, NDArray[Any], NDArray[np.float64]]]:
    """Each phase's series with its steps moved behind those of the phases before it."""
    pieces, offset = [], 0
    for stage in stages:
        steps, values = stage.series(key)
        if len(steps):
            pieces.append((stage, steps + offset, values))
        offset += stage.metrics[-1]["step"]
    return pieces


def finish_step_axis(axes: Axes, stages: Stages) -> None:
    """Bands, their names above the plot, and the axis' label."""
    start = 0
    for index, stage in enumerate(stages):
        end = start + stage.metrics[-1]["step"]
        axes.axvspan(start, end, color=PHASE_BANDS[index % len(PHASE_BANDS)], zorder=0, linewidth=0)
        if start:
            axes.axvline(start, color="#9ca3af", linewidth=0.8, zorder=1)
        axes.text(
            *((start + end) / 2, 1.015),
            stage.phase,
            transform=axes.get_xaxis_transform(),
            ha="center",
            va="bottom",
            color=MUTED,
            fontsize=9.5,
        )
        start = end
    axes.set_xlim(0, max(start, 1))
    axes.set_xlabel("optimiser step, all phases")


def thinned(steps: NDArray[Any], values: NDArray[np.float64]) -> tuple[NDArray[Any], NDArray[np.float64]]:
    stride = max(1, math.ceil(len(steps) / MAX_POINTS))
    return steps[::stride], values[::stride]


def smoothed(values: NDArray[np.float64], *, share: float = 0.01) -> NDArray[np.float64]:
    """Exponential moving average [N], unbiased at the start, over about ``share`` of the series; passes over NaN."""
    decay = 1 - 1 / max(2.0, len(values) * share)
    total = weight = 0.0
    averages = np.empty_like(values)
    for index, value in enumerate(values):
        if math.isfinite(value):
            total, weight = decay * total + value, decay * weight + 1
        averages[index] = total / weight if weight else math.nan
    return averages


def _raw_and_smoothed(stages: Stages, key: str, title: str, label: str, colour: str) -> tuple[Figure, Axes] | None:
    pieces = laid_end_to_end(stages, key)
    if not pieces:
        return None
    figure, axes = new_figure(title)
    for _, steps, values in pieces:
        axes.plot(*thinned(steps, values), color=colour, alpha=0.25, linewidth=0.7)
        axes.plot(*thinned(steps, smoothed(values)), color=colour)
    # Start-up values can be far above everything that follows: they may leave the frame.
    every = np.concatenate([values for _, _, values in pieces])
    low, high = np.quantile(every, [0.001, 0.995])
    margin = 0.08 * max(high - low, 1e-12)
    axes.set_ylim(max(0.0, low - margin) if low >= 0 else low - margin, high + margin)
    axes.set_ylabel(label)
    finish_step_axis(axes, stages)
    return figure, axes


def _loss(stages: Stages) -> Figure | None:
    drawn = _raw_and_smoothed(stages, "loss/ce_nats", "Training loss", "cross-entropy (nats per token)", BLUE)
    if drawn is None:
        return None
    figure, axes = drawn
    for _, steps, values in laid_end_to_end(stages, "loss/ce_nats"):
        last = smoothed(values)[-1]
        axes.annotate(
            *(f"{last:.2f}", (steps[-1], last)),
            xytext=(-4, 7),
            textcoords="offset points",
            ha="right",
            color=BLUE,
            fontweight="bold",
            fontsize=9.5,
        )
    return figure


def _throughput(stages: Stages) -> Figure | None:
    from matplotlib.ticker import StrMethodFormatter

    drawn = _raw_and_smoothed(stages, "time/tokens_per_s", "Training speed", "tokens per second", TEAL)
    if drawn is None:
        return None
    figure, axes = drawn
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    return figure


def gradient_norm_figure(stages: Stages) -> Figure | None:
    drawn = _raw_and_smoothed(stages, "optim/gradient_norm", "Gradient norm", "norm before clipping", ORANGE)
    return None if drawn is None else drawn[0]


def _layer_lines(stages: Stages, key: str, title: str, label: str) -> tuple[Figure, Axes, NDArray[np.float64]] | None:
    """One line a layer with a colour bar for depth; also returns all values, [N, L]."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    pieces = [piece for piece in laid_end_to_end(stages, key) if piece[2].ndim == 2]
    if not pieces:
        return None
    num_layers = max(values.shape[1] for _, _, values in pieces)
    colours = colormaps["viridis"](np.linspace(0.02, 0.86, num_layers))
    figure, axes = new_figure(title)
    for _, steps, values in pieces:
        for layer in range(values.shape[1]):
            axes.plot(*thinned(steps, smoothed(values[:, layer])), color=colours[layer], linewidth=1.4)
    scale = ScalarMappable(Normalize(-0.5, num_layers - 0.5), ListedColormap(colours))
    ticks = np.unique(np.linspace(0, num_layers - 1, min(num_layers, 8)).round().astype(int)).tolist()
    bar = figure.colorbar(scale, ax=axes, pad=0.015, aspect=24, ticks=ticks)
    bar.set_label("layer")
    bar.outline.set_visible(False)
    axes.set_ylabel(label)
    finish_step_axis(axes, stages)
    every = np.concatenate([values.ravel() for _, _, values in pieces])
    return figure, axes, every[np.isfinite(every)]


def load_entropy_figure(stages: Stages) -> Figure | None:
    drawn = _layer_lines(stages, "route/load_entropy", "Expert load entropy per layer", "H(load) / ln(experts)")
    if drawn is None:
        return None
    figure, axes, values = drawn
    axes.axhline(LOAD_ENTROPY_TARGET, color=RED, linewidth=1.1, linestyle=(0, (5, 3)))
    low = min(LOAD_ENTROPY_TARGET - 0.01, float(np.quantile(values, 0.02)) if len(values) else 0.0)
    axes.set_ylim(low - 0.04 * (1 - low), 1 + 0.04 * (1 - low))
    return figure


def _residual(stages: Stages) -> Figure | None:
    drawn = _layer_lines(stages, "residual/rms", "Residual stream per layer", "root mean square")
    if drawn is None:
        return None
    figure, axes, values = drawn
    if len(values) and values.min() > 0 and values.max() / values.min() > 20:
        from matplotlib.ticker import LogLocator, NullLocator

        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    return figure


def _expert_load(stages: Stages) -> Figure | None:
    loads = [(stage, stage.series("route/expert_load")[1]) for stage in stages]
    loads = [(stage, values) for stage, values in loads if values.ndim == 3]
    if not loads:
        return None
    stage, values = loads[-1]
    load = values[-1]  # [layers, experts]
    load = load / np.maximum(load.sum(axis=1, keepdims=True), 1e-12) * load.shape[1]
    num_layers, num_experts = load.shape
    figure, axes = new_figure(
        f"Load per expert, end of {stage.phase}",
        width=max(5.0, min(12.0, 1.8 + 0.72 * num_experts)),
        height=max(2.2, min(12.0, 1.3 + 0.42 * num_layers)),
    )
    axes.set_title(axes.get_title(loc="left"), pad=8)
    image = axes.imshow(load, cmap="PuOr_r", vmin=0, vmax=2, aspect="auto")
    if num_experts * num_layers <= 400:
        for (layer, expert), multiple in np.ndenumerate(load):
            colour = "white" if abs(multiple - 1) > 0.72 else INK
            axes.text(expert, layer, f"{multiple:.2f}", ha="center", va="center", fontsize=8.5, color=colour)
    label_grid(axes, num_rows=num_layers, num_columns=num_experts)
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=16)
    bar.set_label("x fair share")
    bar.outline.set_visible(False)
    return figure


def _learning_rate(stages: Stages) -> Figure | None:
    series = [
        ("Muon (matrices)", BLUE, laid_end_to_end(stages, "optim/lr_muon")),
        ("AdamW (embeddings, vectors)", ORANGE, laid_end_to_end(stages, "optim/lr_adamw")),
    ]
    if not any(pieces for _, _, pieces in series):
        return None
    figure, axes = new_figure("Learning rate", height=3.2)
    for label, colour, pieces in series:
        for index, (_, steps, values) in enumerate(pieces):
            axes.plot(*thinned(steps, values), color=colour, label=label if index == 0 else None)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("learning rate")
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.08), ncols=2)  # beside the title, off the lines
    finish_step_axis(axes, stages)
    return figure
