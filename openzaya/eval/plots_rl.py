"""The figures of reinforcement learning: what was solved, at which length, and whether the pipeline is sound.

The curves of all stages lie end to end, each stage a shaded band, as in ``plots_training.py``. Thin: each step; bold:
moving average, restarted in each stage. What belongs to one stage alone (its sources of prompts) has a panel a stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from openzaya.eval.plots import BLUE, MUTED, ORANGE, RED, TEAL, Drawing, Plot, draw_plots
from openzaya.eval.plots_training import (
    Stages,
    finish_step_axis,
    gradient_norm_figure,
    laid_end_to_end,
    load_entropy_figure,
    smoothed,
    thinned,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SMOOTHING = 0.08
"""Share of a stage that the moving average looks back on: stages of RL have few steps."""
FLOOR = 1e-16
"""Of logarithmic axes: engine and trainer may agree exactly."""
COLOURS = (BLUE, ORANGE, TEAL, RED, "#7c3aed", "#a16207", "#0891b2", "#be185d", "#4d7c0f", "#475569")

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """A metric and how it is drawn."""

    key: str
    label: str
    colour: str
    change: Callable[[Values], Values] = lambda values: values


@dataclass(frozen=True)
class Panel:
    """Curves on one vertical axis."""

    label: str
    curves: tuple[Curve, ...]
    is_share: bool = False
    is_logarithmic: bool = False
    from_zero: bool = True


def rl_plots(stages: Stages) -> list[Plot]:
    """The figures of all stages of RL; those whose metrics were not logged are left out."""
    drawings: list[Drawing] = [
        (
            "rl_reward",
            "Reward of all rollouts drawn (mean) and share of groups with at least one right rollout, dropped groups "
            "included. Steps between bands are changes of task; where the difficulty follows the policy, the reward "
            "stays near one half however good it gets.",
            _reward,
        ),
        (
            "rl_solve_rates",
            "Solve rate of the groups drawn, by source of prompts and by form: asked plainly, with tails of earlier "
            "rollouts, or with their answers.",
            _solve_rates,
        ),
        (
            "rl_length",
            "Length of all rollouts and of the right ones, and the share that was cut off at the limit. With the "
            "length reward on, right rollouts should get shorter while the reward holds.",
            _length,
        ),
        (
            "rl_entropy",
            "Entropy of the policy's distribution a token, and the share of tokens whose update the trust region masks "
            "(DPPO), by the sign of the advantage. Entropy that goes to 0 ends exploration.",
            _entropy,
        ),
        (
            "rl_agreement",
            "Engine against trainer: KL divergence a token and 1 minus Pearson's r of the probabilities. On tokens "
            "of the trainer's own weights both are rounding; on all tokens, staleness is added.",
            _agreement,
        ),
        (
            "rl_pipeline",
            "How many learner steps the oldest token of a group is behind, and what happened to the groups of a step.",
            _pipeline,
        ),
        (
            "rl_canaries",
            "Signs of degenerate text: rollouts that repeat themselves word by word, rollouts without a verdict, and "
            "tokens from the top of the id range, which are rare in ordinary text.",
            _canaries,
        ),
        (
            "rl_gradient_norm",
            "Norm of the whole gradient before clipping, in the stages of RL.",
            gradient_norm_figure,
        ),
        (
            "rl_load_entropy",
            "How evenly each layer's router spreads tokens over its experts in the stages of RL, as in training.",
            load_entropy_figure,
        ),
    ]
    return draw_plots(drawings, stages)


def _panels(stages: Stages, title: str, *panels: Panel) -> Figure | None:
    """One panel below the other; panels of which nothing was logged are left out."""
    drawn = [panel for panel in panels if any(laid_end_to_end(stages, curve.key) for curve in panel.curves)]
    if not drawn:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 1.0 + 2.6 * len(drawn)), layout="constrained")
    axes_of = np.atleast_1d(figure.subplots(len(drawn), 1, sharex=True))
    for index, (axes, panel) in enumerate(zip(axes_of, drawn, strict=True)):
        _draw_panel(axes, stages, panel)
        finish_step_axis(axes, stages)
        if index:
            for text in list(axes.texts):
                text.remove()
        axes.set_xlabel("learner step, all stages" if index == len(drawn) - 1 else "")
    axes_of[0].set_title(title)
    return figure


def _draw_panel(axes: Axes, stages: Stages, panel: Panel) -> None:
    highest = 0.0
    for curve in panel.curves:
        for index, (_, steps, raw) in enumerate(laid_end_to_end(stages, curve.key)):
            values = curve.change(raw)
            if panel.is_logarithmic:
                values = np.maximum(values, FLOOR)
                average = np.exp(smoothed(np.log(values), share=SMOOTHING))
            else:
                average = smoothed(values, share=SMOOTHING)
            axes.plot(*thinned(steps, values), color=curve.colour, alpha=0.25, linewidth=0.7)
            label = curve.label if index == 0 else None
            axes.plot(*thinned(steps, average), color=curve.colour, label=label)
            if len(steps) == 1:
                axes.plot(steps, values, "o", color=curve.colour, markersize=4)
            highest = max(highest, *values[np.isfinite(values)].tolist(), 0.0)
    axes.set_ylabel(panel.label)
    if panel.is_logarithmic:
        axes.set_yscale("log")
    elif panel.from_zero:
        axes.set_ylim(0, 1.08 * highest or 1.0)
    if panel.is_share:
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g} %")
    if len(panel.curves) > 1:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9)


def _reward(stages: Stages) -> Figure | None:
    curves = (Curve("rl/solved_groups", "groups solved", MUTED), Curve("rl/reward", "reward", BLUE))
    figure = _panels(stages, "Reward", Panel("share", curves, is_share=True))
    if figure is not None:
        axes = figure.axes[0]
        axes.set_ylim(-0.02, 1.02)
        for _, steps, values in laid_end_to_end(stages, "rl/reward"):
            average = smoothed(values, share=SMOOTHING)
            shown = [index for index in {0, len(steps) - 1} if math.isfinite(average[index])]
            for index in shown:
                axes.annotate(
                    *(f"{100 * average[index]:.0f}", (steps[index], average[index])),
                    xytext=(3, -12) if index == 0 and len(steps) > 1 else (0, 7),
                    textcoords="offset points",
                    ha="left" if index == 0 and len(steps) > 1 else "right",
                    color=BLUE,
                    fontweight="bold",
                    fontsize=9,
                )
    return figure


def _solve_rates(stages: Stages) -> Figure | None:
    """A panel a stage."""
    found = [(stage, keys) for stage in stages if (keys := _keys(stage.metrics, "solve_rate/"))]
    if not found:
        return None
    from matplotlib.figure import Figure

    num_columns = min(2, len(found))
    num_rows = -(-len(found) // num_columns)
    figure = Figure(figsize=(9.0, 0.8 + 2.9 * num_rows), layout="constrained")
    panels = np.atleast_1d(figure.subplots(num_rows, num_columns, squeeze=False).ravel())
    for axes, (stage, keys) in zip(panels, found, strict=False):
        for index, key in enumerate(keys):
            steps, values = stage.series(key)
            colour = COLOURS[index % len(COLOURS)]
            axes.plot(*thinned(steps, values), color=colour, alpha=0.2, linewidth=0.7)
            label = key.removeprefix("solve_rate/").replace("_", " ")
            style = "-" if key.endswith("/plain") else "--"
            axes.plot(*thinned(steps, smoothed(values, share=SMOOTHING)), style, color=colour, label=label)
        axes.set_title(stage.phase, pad=8, fontsize=11)
        axes.set_ylim(-0.02, 1.02)
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")
        axes.set_xlabel("step of the stage")
        axes.legend(fontsize=8, loc="best")
    for axes in panels[len(found) :]:
        axes.set_visible(False)
    return figure


def _keys(metrics: Sequence[dict[str, Any]], prefix: str) -> list[str]:
    return sorted({key for record in metrics for key in record if key.startswith(prefix)})


def _length(stages: Stages) -> Figure | None:
    def without_zeros(values: Values) -> Values:
        # A step without a right rollout has no length of right ones.
        return np.where(values == 0, np.nan, values)

    tokens = (
        Curve("rl/length_tokens", "all", MUTED),
        Curve("rl/length_right_tokens", "right", TEAL, without_zeros),
    )
    cut = (Curve("rl/truncated", "cut off", RED),)
    return _panels(stages, "Length", Panel("tokens", tokens), Panel("cut off", cut, is_share=True))


def _entropy(stages: Stages) -> Figure | None:
    masked = (
        Curve("rl/masked_share_positive", "advantage > 0", TEAL),
        Curve("rl/masked_share_negative", "advantage < 0", RED),
    )
    return _panels(
        *(stages, "Entropy and trust region"),
        Panel("nats a token", (Curve("rl/entropy_nats", "entropy", BLUE),)),
        Panel("tokens masked", masked, is_share=True),
    )


def _agreement(stages: Stages) -> Figure | None:
    def divergence(values: Values) -> Values:
        return np.abs(values)

    def distance(values: Values) -> Values:
        return np.abs(1 - values)

    kl = (
        Curve("rl/engine_trainer_kl", "all tokens", MUTED, divergence),
        Curve("rl/on_policy_kl", "same weights", BLUE, divergence),
    )
    r = (
        Curve("rl/engine_trainer_r", "all tokens", MUTED, distance),
        Curve("rl/on_policy_r", "same weights", BLUE, distance),
    )
    return _panels(
        *(stages, "Engine against trainer"),
        Panel("KL, nats a token", kl, is_logarithmic=True),
        Panel("1 – r", r, is_logarithmic=True),
    )


def _pipeline(stages: Stages) -> Figure | None:
    staleness = (
        Curve("rl/staleness_mean", "mean", BLUE),
        Curve("rl/staleness_max", "oldest", MUTED),
    )
    groups = (
        Curve("rl/drawn_groups", "drawn", BLUE),
        Curve("rl/dropped_equal", "equal rewards", ORANGE),
        Curve("rl/dropped_stale", "too old", RED),
        Curve("rl/evicted", "evicted", MUTED),
    )
    return _panels(stages, "Pipeline", Panel("steps behind", staleness), Panel("groups a step", groups))


def _canaries(stages: Stages) -> Figure | None:
    rates = (
        Curve("rl/repetition_rate", "short loops", RED),
        Curve("rl/long_loop_rate", "longer loops", ORANGE),
        Curve("rl/no_verdict", "no verdict", MUTED),
    )
    parts = zip((10, 5, 2, 1), (BLUE, TEAL, ORANGE, RED), strict=True)
    rare = tuple(Curve(f"rl/rare_tokens_top{part}", f"top {part} % of ids", colour) for part, colour in parts)
    return _panels(stages, "Canaries", Panel("rollouts", rates, is_share=True), Panel("tokens", rare, is_share=True))
