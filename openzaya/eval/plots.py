"""How all figures of a report look, and how they are written.

One palette, one font, light backgrounds; every figure is kept as PNG and as SVG, and has a caption that
says what to see. The figures themselves are in ``plots_training.py`` and ``plots_evaluation.py``.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#1f2937", "#6b7280", "#e5e7eb"
BLUE, ORANGE, TEAL, RED = "#2563eb", "#ea580c", "#0f766e", "#b91c1c"
PHASE_BANDS = ("#eff6ff", "#fff7ed", "#f0fdf4", "#faf5ff", "#fefce8")
STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10.5,
    "axes.titlesize": 12.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 22,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9ca3af",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "openzaya",
}


@dataclass(frozen=True)
class Plot:
    """A drawn figure: file name without ending, caption, and its two encodings."""

    name: str
    caption: str
    png: bytes
    svg: bytes

    def save(self, folder: Path) -> list[Path]:
        """Write ``name.png`` and ``name.svg`` into ``folder`` and return their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{self.name}.png", folder / f"{self.name}.svg"]
        paths[0].write_bytes(self.png)
        paths[1].write_bytes(self.svg)
        return paths


Drawing = tuple[str, str, "Callable[[Any], Figure | None]"]
"""File name without ending, caption, and the function that draws it or finds nothing to draw."""


def draw_plots(drawings: Sequence[Drawing], subject: Any) -> list[Plot]:
    """Draw ``subject`` with each of ``drawings`` in the common style."""
    import matplotlib

    plots = []
    with matplotlib.rc_context(STYLE):
        for name, caption, draw in drawings:
            figure = draw(subject)
            if figure is not None:
                plots.append(Plot(name, caption, _encoded(figure, "png"), _encoded(figure, "svg")))
    return plots


def _encoded(figure: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    # No date in the file: the same records give the same bytes.
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    figure.savefig(buffer, format=kind, dpi=150, bbox_inches="tight", pad_inches=0.15, metadata=metadata)
    return buffer.getvalue()


def new_figure(title: str, *, width: float = 9.0, height: float = 3.9) -> tuple[Figure, Axes]:
    """A figure of ``width`` x ``height`` inches with one plot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title)
    return figure, axes


def label_grid(axes: Axes, *, num_rows: int, num_columns: int) -> None:
    """Whole-number ticks, and thin white lines between the cells."""
    axes.set_xticks(range(0, num_columns, math.ceil(num_columns / 24)))
    axes.set_yticks(range(0, num_rows, math.ceil(num_rows / 24)))
    axes.set_xticks(np.arange(num_columns + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(num_rows + 1) - 0.5, minor=True)
    axes.grid(visible=False, which="major")
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
