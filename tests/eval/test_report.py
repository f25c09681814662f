"""Reports from whole, partial and hostile run directories; the numbers in the tables; the intervals."""

from __future__ import annotations

import io
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from openzaya.errors import DataError
from openzaya.eval.plots_evaluation import wilson_interval
from openzaya.eval.plots_training import smoothed
from openzaya.eval.report import write_report
from openzaya.eval.run_directory import read_run
from openzaya.runlog import RunLog, write_json

NUM_LAYERS, NUM_EXPERTS = 3, 4


def write_training_stage(directory: Path, num_steps: int, start_loss: float, state: str = "done") -> None:
    generator = random.Random(0)
    phase = directory.name.partition("-")[2]
    log = RunLog(
        *(directory,),
        total_steps=60,
        phase=phase,
        resolved_toml=f'name = "{phase}"\n',
        tensorboard=False,
        stream=io.StringIO(),
    )
    for step in range(1, num_steps + 1):
        entropy = [1 - 0.2 * math.exp(-step / 10) * (layer + 1) / 3 for layer in range(NUM_LAYERS)]
        metrics = {
            "loss/ce_nats": start_loss * math.exp(-step / 30) + 0.05 * generator.random(),
            "train/tokens": 1000 * step,
            "train/supervised_tokens": 600 * step,
            "optim/lr_muon": 0.02,
            "optim/lr_adamw": 0.003,
            "optim/gradient_norm": 1 + generator.random(),
            "route/load_entropy": entropy,
            "route/load_entropy_min": min(entropy),
            "residual/rms": [1.0 + layer for layer in range(NUM_LAYERS)],
            "time/tokens_per_s": 2000.0 + 100 * generator.random(),
            "time/step_s": 0.5,
        }
        if step % 10 == 0:
            load = [[generator.random() for _ in range(NUM_EXPERTS)] for _ in range(NUM_LAYERS)]
            metrics["route/expert_load"] = load
        log.log(step, metrics)
    log.close(state)


def cell(accuracy: float) -> dict:
    return {"n": 20, "greedy": accuracy, "avg": 0.9 * accuracy, "pass_k": min(1.0, 1.1 * accuracy), "truncated": 0.01}


def write_evaluation_stage(directory: Path, *, response: str = "<think>1+1=2</think>2") -> None:
    directory.mkdir(parents=True)
    group = {"n": 80, "avg_at_k": [0.5, 0.4, 0.6], "greedy": [0.875, 0.8, 0.93], "pass_at_k": [0.9, 0.8, 0.95]}
    group |= {"majority_at_k": [0.6, 0.5, 0.7], "truncation_rate": 0.02}
    unseen = group | {"difficulties": [0, 1], "families": ["interleave"]}
    evaluation = {
        "model": "runs/x/04-sft",
        "k": 8,
        "seed": 0,
        "temperature": 1.0,
        "max_new_tokens": 256,
        "groups": {
            "easy": group | {"difficulties": [0, 1]},
            "hard": group | {"difficulties": [2, 3]},
            "never_trained": unseen,
        },
        "families": {
            "sorting": {str(d): cell(0.9 - 0.2 * d) for d in range(4)},
            "base_conversion": {str(d): cell(0.8 - 0.2 * d) for d in range(4)},
            "interleave": {"0": cell(0.1), "1": cell(0.0)},
        },
    }
    write_json(directory / "eval.json", evaluation)
    samples = [
        {
            "family": family,
            "difficulty": difficulty,
            "prompt": f"question {family} {difficulty}",
            "gold": "2",
            "response": response,
            "reward": reward,
            "temperature": temperature,
            "truncated": False,
        }
        for family in ("sorting", "base_conversion")
        for difficulty in range(4)
        for reward, temperature in ((1.0, 0.0), (0.0, 1.0), (None, 1.0))
    ]
    (directory / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))


class Page(HTMLParser):
    """Counts tags and keeps the visible text; fails on tags that are closed in the wrong order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.links: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "tiny"
    (run / "01-tokenizer").mkdir(parents=True)
    write_json(run / "01-tokenizer" / "status.json", {"state": "done", "step": 0, "total_steps": 1, "elapsed_s": 61.4})
    write_training_stage(run / "02-pretrain", 60, 4.0)
    write_training_stage(run / "03-sft", 30, 2.0, state="interrupted")
    write_evaluation_stage(run / "05-eval")
    (run / "notes").mkdir()
    write_report(run)
    return run


TRAINING = {"loss", "load_entropy", "expert_load", "residual_rms", "learning_rate", "gradient_norm", "throughput"}
EVALUATION = {"accuracy_by_difficulty", "accuracy_by_family"}


def test_every_figure_is_written_twice_and_shown(pipeline):
    files = sorted(file.name for file in (pipeline / "plots").iterdir())
    assert files == sorted(f"{name}.{kind}" for name in TRAINING | EVALUATION for kind in ("png", "svg"))
    markdown = (pipeline / "report.md").read_text()
    assert set(re.findall(r"\(plots/(\w+)\.png\)", markdown)) == TRAINING | EVALUATION
    page = Page((pipeline / "report.html").read_text())
    assert page.tags.count("img") == len(TRAINING | EVALUATION)
    assert all(link.startswith("data:image/svg+xml;base64,") for link in page.links), "the page stands alone"
    for name in TRAINING | EVALUATION:
        assert (pipeline / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert b"</svg>" in (pipeline / "plots" / f"{name}.svg").read_bytes()


def test_tables_hold_the_numbers_of_the_files(pipeline):
    markdown = (pipeline / "report.md").read_text()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown.splitlines() if line[:2] == "| "]
    rows = {row[0]: row[1:] for row in cells}
    assert rows["02-pretrain"][:5] == ["done", "60", "60,000", "36,000", "0:30"]
    assert rows["03-sft"][:5] == ["interrupted", "30 of 60", "30,000", "18,000", "0:15"]
    assert rows["01-tokenizer"] == ["done", "–", "–", "–", "1:01", "–", "–"]
    assert rows["easy half (difficulty 0–1)"] == [
        *("80", "87.5 % [80.0, 93.0]", "50.0 % [40.0, 60.0]", "90.0 % [80.0, 95.0]", "60.0 % [50.0, 70.0]", "2.0 %")
    ]
    assert rows["sorting"] == ["80", "60.0 %", "54.0 %", "66.0 %", "1.0 %"]
    assert rows["interleave *"][:2] == ["40", "5.0 %"]
    assert list(rows).index("interleave *") > list(rows).index("sorting"), "families never trained on come last"


def test_samples_show_hard_successes_and_easy_failures(pipeline):
    markdown = (pipeline / "report.md").read_text()
    solved, missed = markdown.split("### Solved")[1].split("### Missed")
    assert re.findall(r"\*\*(\w+)\*\*, difficulty (\d), greedy", solved)[:2] == [
        *(("sorting", "3"), ("base_conversion", "3"))
    ]
    assert re.findall(r"\*\*(\w+)\*\*, difficulty (\d), temperature 1", missed)[:2] == [
        *(("sorting", "0"), ("base_conversion", "0"))
    ]
    assert solved.count("Q: question") == missed.count("Q: question") == 6


def test_the_same_files_give_the_same_report(pipeline):
    before = {path: path.read_bytes() for path in pipeline.rglob("*") if path.is_file()}
    write_report(pipeline)
    assert {path: path.read_bytes() for path in pipeline.rglob("*") if path.is_file()} == before


def test_one_running_stage_alone(tmp_path):
    stage = tmp_path / "02-pretrain"
    write_training_stage(stage, 5, 3.0, state="running")
    with (stage / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss/')
    paths = write_report(stage)
    text = paths.markdown.read_text()
    assert "| 02-pretrain | running | 5 of 60 |" in text
    assert "Evaluation" not in text
    assert {path.stem for path in paths.plots} == TRAINING - {"expert_load"}


def test_a_stage_that_has_just_started_or_logged_nonsense(tmp_path):
    with RunLog(tmp_path / "01-a", total_steps=5, tensorboard=False, stream=io.StringIO()):
        pass
    with RunLog(tmp_path / "02-b", total_steps=5, tensorboard=False, stream=io.StringIO()) as log:
        log.log(1, {"loss/ce_nats": math.nan, "route/load_entropy": [0.5, math.nan], "residual/rms": [math.inf, 1.0]})
        log.log(2, {"loss/ce_nats": math.nan, "route/load_entropy": [0.5, 0.5, 0.5]})
    text = write_report(tmp_path).markdown.read_text()
    assert "| 01-a | done | – |" in text
    assert "| 02-b | done | 2 of 5 |" in text


def test_what_a_model_wrote_cannot_change_the_page(tmp_path):
    hostile = "</pre><script>alert(1)</script> ````` \n# not a heading\n| a | b |"
    write_evaluation_stage(tmp_path / "eval", response=hostile)
    paths = write_report(tmp_path / "eval")
    assert {path.stem for path in paths.plots} == EVALUATION, "one evaluation alone has a report too"
    page = Page(paths.html.read_text())
    assert "script" not in page.tags
    assert "<script>alert(1)</script>" in page.text
    for block in paths.markdown.read_text().split("Q: ")[1:]:
        assert block.index("# not a heading") < block.index("\n``````\n")


def test_long_responses_are_shortened_in_the_middle(tmp_path):
    write_evaluation_stage(tmp_path / "eval", response="start " + "x" * 10_000 + " end")
    text = write_report(tmp_path).markdown.read_text()
    assert "A: start xxx" in text
    assert "xxx end\nexpected" in text
    assert "[... 8,510 characters ...]" in text


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no stage"),
        ({"x/other.txt": ""}, "holds no stage"),
        ({"run.json": '{"openzaya_run_format": 99}'}, "run format 99"),
        ({"x/run.json": '{"openzaya_run_format": 99}'}, "run format 99"),
        ({"x/eval.json": "{"}, "eval.json is not valid JSON"),
        ({"x/eval.json": "{}", "x/samples.jsonl": '{"a": 1}\n{'}, "samples.jsonl:2"),
    ],
)
def test_unusable_directories_are_refused(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=re.escape(message)):
        write_report(tmp_path)
    with pytest.raises(DataError, match="is not a directory"):
        read_run(tmp_path / "absent")


@pytest.mark.parametrize(
    ("share", "num", "low", "high"),
    # Published values of the Wilson score interval at 95 %.
    [(0.0, 10, 0.0, 0.2775), (0.5, 10, 0.2366, 0.7634), (1.0, 20, 0.8389, 1.0), (0.81, 263, 0.7582, 0.8529)],
)
def test_wilson_interval(share, num, low, high):
    assert wilson_interval(share, num) == pytest.approx((low, high), abs=1e-3)


def test_smoothing_keeps_constants_and_the_first_value():
    assert smoothed(np.full(500, 3.0)) == pytest.approx(np.full(500, 3.0))
    assert smoothed(np.array([5.0, 1.0]))[0] == 5.0
    assert smoothed(np.array([2.0, np.nan, 2.0])) == pytest.approx(np.array([2.0, 2.0, 2.0]))
    noisy = np.random.default_rng(0).normal(size=1000)
    assert smoothed(noisy)[100:].std() < 0.3 * noisy.std()
