"""One page about a run: ``report.md`` and a self-contained ``report.html``, with the figures in ``plots/``.

Reads files only (``run_directory.py``), so it works while a run is going on, after it was interrupted,
on a single stage, and on a machine without the checkpoints. Tables are lists of rows of text, made here
once and laid out by the two templates beside this file.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openzaya.eval.plots import Plot
from openzaya.eval.plots_evaluation import evaluation_plots, never_trained_families
from openzaya.eval.plots_training import training_plots
from openzaya.eval.report_rl import (
    calibration_sections,
    cascade_facts,
    cascade_sections,
    rl_facts,
    rl_section,
)
from openzaya.eval.run_directory import Run, Stage, read_run
from openzaya.eval.tables import (
    MISSING,
    Fact,
    Sample,
    Table,
    bounds,
    count,
    duration_s,
    evaluation_sample,
    final_loss,
    interval_text,
    percent,
    range_of,
    short_count,
    stage_duration,
)
from openzaya.runlog import format_duration, write_text_atomically

GROUP_TITLES = {
    "easy": "easy half",
    "hard": "hard half",
    "all": "all trained families",
    "never_trained": "never trained on",
}
MAX_SAMPLES_EACH = 6


@dataclass(frozen=True)
class ReportPaths:
    """What :func:`write_report` wrote."""

    markdown: Path
    html: Path
    plots: tuple[Path, ...]


@dataclass(frozen=True)
class EvaluationSection:
    """Everything shown about one evaluation stage."""

    name: str
    settings: str
    groups: Table
    families: Table
    plots: tuple[Plot, ...]
    good: tuple[Sample, ...]
    bad: tuple[Sample, ...]


def write_report(run_dir: str | Path) -> ReportPaths:
    """Write the report of ``run_dir``, a pipeline's directory or one stage's, into it.

    Raises :class:`openzaya.errors.DataError` where the directory holds no stage or a file is malformed.
    """
    run = read_run(run_dir)
    trained = training_plots(run)
    evaluations = tuple(_evaluation_section(stage) for stage in run.evaluations)
    reinforcement = rl_section(run.reinforcement)
    cascades, calibrations = cascade_sections(run), calibration_sections(run)
    plots = [*trained, *(plot for section in evaluations for plot in section.plots)]
    plots += [plot for section in cascades for plot in section.plots]
    plots += [plot for section in calibrations for plot in section.plots]
    if reinforcement is not None:
        plots += reinforcement.all_plots
    paths = [path for plot in plots for path in plot.save(run.directory / "plots")]
    content: dict[str, Any] = {
        "title": run.directory.resolve().name,
        "facts": _facts(run),
        "stages": _stage_table(run),
        "cascades": cascades,
        "calibrations": calibrations,
        "reinforcement": reinforcement,
        "training_plots": trained,
        "evaluations": evaluations,
        "environment": _environment_table(run),
        "recipes": [(stage.name, stage.resolved_toml) for stage in run.stages if stage.resolved_toml],
    }
    markdown, html = run.directory / "report.md", run.directory / "report.html"
    write_text_atomically(markdown, _render("report.md.jinja", content))
    write_text_atomically(html, _render("report.html.jinja", content))
    return ReportPaths(markdown, html, tuple(paths))


# --- contents -------------------------------------------------------------------------------------


def _facts(run: Run) -> list[Fact]:
    facts = [*cascade_facts(run), *rl_facts(run)]
    if run.training:
        last = run.training[-1]
        loss = final_loss(last)
        if loss is not None:
            facts.append(Fact("final training loss", f"{loss:.3f} nats", last.phase))
        tokens = sum(stage.last("train/tokens") or 0 for stage in run.training)
        if tokens:
            facts.append(Fact("tokens trained on", short_count(tokens), f"{len(run.training)} phases"))
        facts.append(Fact("training time", format_duration(sum(map(duration_s, run.training))), "wall clock"))
        entropy = run.training[0].last("route/load_entropy_min")
        if entropy is not None:
            facts.append(Fact("lowest load entropy", f"{entropy:.3f}", f"any layer, end of {run.training[0].phase}"))
    for stage in run.evaluations:
        groups = stage.evaluation.get("groups", {})
        for group, key, label in (("easy", "greedy", "greedy"), ("hard", "avg_at_k", "at temperature")):
            if (value := groups.get(group, {}).get(key)) is not None:
                suffix = f" {stage.evaluation.get('temperature', 1):g}" if key == "avg_at_k" else ""
                facts.append(Fact(f"{GROUP_TITLES[group]}, {label}{suffix}", percent(value[0]), bounds(value)))
    return facts


def _stage_table(run: Run) -> Table:
    header = ("stage", "state", "steps", "tokens", "supervised", "time", "tokens/s", "final loss (nats)")
    rows = []
    for stage in run.stages:
        total = stage.status.get("total_steps")
        # A stage that logs no steps (tokenizer, evaluation) has none, whatever its status says.
        steps = stage.metrics[-1]["step"] if stage.metrics else None
        speed = stage.series("time/rollout_tokens_per_s" if stage.is_rl else "time/tokens_per_s")[1]
        loss = final_loss(stage)
        rows.append(
            (
                stage.name,
                stage.status.get("state", MISSING) + (f": {stage.status['error']}" if "error" in stage.status else ""),
                MISSING if steps is None else f"{steps:,}" + (f" of {total:,}" if total and total != steps else ""),
                # RL logs a step's tokens, training the sum so far.
                count(
                    sum(stage.series("rl/sampled_tokens")[1].tolist()) if stage.is_rl else stage.last("train/tokens")
                ),
                count(stage.last("train/supervised_tokens")),
                stage_duration(stage),
                count(float(sorted(speed)[len(speed) // 2]) if len(speed) else None),
                MISSING if loss is None else f"{loss:.3f}",
            )
        )
    return Table(header, tuple(rows), num_text_columns=2)


def _evaluation_section(stage: Stage) -> EvaluationSection:
    evaluation = stage.evaluation
    k = evaluation.get("k", "k")
    header = ("problems", "n", "greedy", f"avg@{k}", f"pass@{k}", f"majority@{k}", "truncated")
    groups = [
        (
            GROUP_TITLES.get(name, name) + range_of(group.get("difficulties", [])),
            count(group.get("n")),
            *(interval_text(group.get(key)) for key in ("greedy", "avg_at_k", "pass_at_k", "majority_at_k")),
            percent(group.get("truncation_rate")),
        )
        for name, group in evaluation.get("groups", {}).items()
    ]
    settings = [
        (f"model `{evaluation['model']}`" if "model" in evaluation else ""),
        f"{k} samples a problem at temperature {evaluation.get('temperature', 1):g}",
        f"seed {evaluation.get('seed', MISSING)}",
        f"at most {evaluation.get('max_new_tokens', MISSING)} new tokens",
        f"{evaluation['no_verdict']:,} responses without a verdict left out" if evaluation.get("no_verdict") else "",
        "brackets: 95 % intervals",
    ]
    good, bad = _chosen_samples(stage.samples)
    return EvaluationSection(
        name=stage.name,
        settings=", ".join(part for part in settings if part),
        groups=Table(header, tuple(groups)),
        families=_family_table(evaluation),
        plots=tuple(evaluation_plots(stage)),
        good=good,
        bad=bad,
    )


def _family_table(evaluation: dict[str, Any]) -> Table:
    """Means over each family's difficulties, weighted by the number of problems."""
    k = evaluation.get("k", "k")
    unseen = never_trained_families(evaluation)
    rows = []
    for name, cells in sorted(evaluation.get("families", {}).items(), key=lambda item: (item[0] in unseen, item[0])):
        num = sum(cell["n"] for cell in cells.values())
        means = []
        for key in ("greedy", "avg", "pass_k", "truncated"):
            counted = [cell for cell in cells.values() if cell.get(key) is not None]
            weight = sum(cell["n"] for cell in counted)
            means.append(percent(sum(cell["n"] * cell[key] for cell in counted) / weight if weight else None))
        rows.append((name.replace("_", " ") + (" *" if name in unseen else ""), count(num), *means))
    header = ("family", "n", "greedy", f"avg@{k}", f"pass@{k}", "truncated")
    return Table(header, tuple(rows))


def _chosen_samples(samples: list[dict[str, Any]]) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """A few solved and a few missed problems; the hardest solved and the easiest missed, one a family first."""

    def choose(candidates: list[dict[str, Any]], *, hardest: bool) -> tuple[Sample, ...]:
        ordered = sorted(candidates, key=lambda sample: sample["difficulty"], reverse=hardest)
        seen: dict[str, int] = {}
        ranked = []
        for sample in ordered:
            seen[sample["family"]] = seen.get(sample["family"], 0) + 1
            ranked.append((seen[sample["family"]], sample))
        ranked.sort(key=lambda pair: pair[0])
        return tuple(evaluation_sample(sample) for _, sample in ranked[:MAX_SAMPLES_EACH])

    # A reward of null is "no verdict": such a sample is neither solved nor missed.
    solved = [sample for sample in samples if (sample.get("reward") or 0) > 0]
    missed = [sample for sample in samples if sample.get("reward") is not None and sample["reward"] <= 0]
    return choose(solved, hardest=True), choose(missed, hardest=False)


def _environment_table(run: Run) -> Table | None:
    environment = next((stage.environment for stage in reversed(run.stages) if stage.environment), None)
    if environment is None:
        return None
    rows = []
    for key, value in environment.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {version}" for name, version in value.items() if version)
        elif isinstance(value, list):
            value = " ".join(str(entry) for entry in value)
        rows.append((key.replace("_", " "), MISSING if value is None else str(value)))
    return Table(("", "last stage ran on"), tuple(rows), num_text_columns=2)


# --- layout ---------------------------------------------------------------------------------------


def _render(template: str, content: dict[str, Any]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        # Samples hold whatever a model wrote: in HTML all text is escaped.
        autoescape=template.endswith(".html.jinja"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    environment.filters["fence"] = _fenced
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|").replace("\n", " ")
    return environment.get_template(template).render(content)


def _fenced(text: str, language: str = "text") -> str:
    """``text`` as a Markdown code block, with a fence longer than any run of backticks in it."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
