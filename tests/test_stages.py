"""A whole tiny pipeline: it runs, is skipped, resumed, and refuses a recipe that has changed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from openzaya.data.tokenizer import load_tokenizer
from openzaya.errors import ConfigError
from openzaya.model import hf
from openzaya.stages import TokenizerConfig, is_finished, make_tokenizer, run_pipeline, stage_kind
from openzaya.train.loop import Trainer
from tests.command import error_line, openzaya
from tests.train import miniature

STAGES = ("01-tokenizer", "02-pretrain", "03-sft", "04-eval")

SFT = """
kind = "train"
phase = "sft"
context_length = 160
windows_per_batch = 2
steps = 8

[model]
start_from = "02-pretrain"
changes = { rope_theta = 1e6 }

[[data.sources]]
kind = "aggregation"
families = ["sorting"]
difficulties = [0, 0]
tau = 8
num_candidates = 2

[[data.sources]]
kind = "problems"
families = ["sorting", "counting"]
difficulties = [0, 1]
"""

EVAL = """
kind = "eval"
model = "03-sft"
families = ["sorting", "largest_run"]
easy = [0, 0]
hard = [1, 1]
per_cell = 2
k = 2
max_new_tokens = 8
"""


def write_recipes(folder: Path) -> Path:
    """A pipeline of all kinds of stages, of seconds in all."""
    folder.mkdir(parents=True)
    miniature.write_texts(folder / "texts")
    (folder / "01-tokenizer.toml").write_text(
        f'kind = "tokenizer"\nvocab_size = {miniature.VOCAB_SIZE}\nproblems_per_family = 5\n'
        f"text_paths = [{json.dumps(str(folder / 'texts'))}]\n"
    )
    (folder / "02-pretrain.toml").write_text(miniature.recipe_text(folder / "texts", steps=10))
    (folder / "03-sft.toml").write_text(SFT)
    (folder / "04-eval.toml").write_text(EVAL)
    (folder / "README.md").write_text("not a stage")
    return folder


def contents(directory: Path) -> dict[str, tuple[int, bytes]]:
    files = (path for path in sorted(directory.rglob("*")) if path.is_file() and "report" not in path.name)
    return {
        str(path.relative_to(directory)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in files
        if "plots" not in path.parts
    }


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(recipes, run) of a pipeline that ran to its end."""
    root = tmp_path_factory.mktemp("pipeline")
    recipes = write_recipes(root / "recipes")
    finished = openzaya("run", recipes, "--out", root / "run")
    assert finished.code == 0, finished.err
    assert finished.out.strip() == f"report: {root / 'run' / 'report.html'}"
    return recipes, root / "run"


def test_every_stage_leaves_what_the_next_one_needs(pipeline) -> None:
    _, run = pipeline
    assert sorted(path.name for path in run.iterdir() if path.is_dir() and path.name != "plots") == list(STAGES)
    for stage in STAGES:
        assert is_finished(run / stage)
        assert {"run.json", "resolved.toml", "environment.json", "status.json"} <= {
            p.name for p in (run / stage).iterdir()
        }
    assert len(load_tokenizer(run / "01-tokenizer" / "tokenizer")) <= miniature.VOCAB_SIZE
    assert hf.load(run / "03-sft" / "model").config.rope_theta == 1e6
    assert hf.load(run / "02-pretrain" / "model").config.rope_theta == 10_000
    assert len(miniature.metrics_without_clock(run / "03-sft")) == 8
    evaluation = json.loads((run / "04-eval" / "eval.json").read_text())
    assert evaluation["groups"].keys() == {"easy", "hard", "all", "never_trained"}
    report = (run / "report.md").read_text()
    assert all(stage in report for stage in STAGES)


def test_the_final_status_says_what_was_done(pipeline) -> None:
    _, run = pipeline
    status = json.loads((run / "02-pretrain" / "status.json").read_text())
    assert status["state"] == "done" and status["step"] == status["total_steps"] == 10
    assert status["parameters"] == miniature.config().num_parameters()
    assert status["tokens"] == miniature.metrics_without_clock(run / "02-pretrain")[-1]["train/tokens"]
    assert status["data"]["sources"].keys() == {"text", "problems"}


def test_run_again_everything_is_skipped(pipeline) -> None:
    recipes, run = pipeline
    before = contents(run)
    finished = openzaya("run", recipes, "--out", run)
    assert finished.code == 0
    assert [line for line in finished.err.splitlines() if line.endswith("done already")] == [
        f"{stage}: done already" for stage in STAGES
    ]
    assert contents(run) == before


def test_a_finished_stage_refuses_another_recipe(pipeline) -> None:
    recipes, run = pipeline
    before = contents(run)
    line = error_line(openzaya("run", recipes, "--out", run, "03-sft.optimizer.momentum=0.5"))
    assert "03-sft was finished with another recipe ('momentum = 0.95' then, 'momentum = 0.5' now)" in line
    assert "remove that directory" in line
    assert contents(run) == before


def test_a_stage_that_was_removed_runs_again_and_gives_the_same(pipeline, tmp_path: Path) -> None:
    recipes, run = pipeline
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "03-sft")
    shutil.rmtree(copy / "04-eval")
    run_pipeline(recipes, copy)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (copy / "03-sft" / "model" / name).read_bytes() == (run / "03-sft" / "model" / name).read_bytes(), name
    left, right = (json.loads((r / "04-eval" / "eval.json").read_text()) | {"seconds": 0} for r in (copy, run))
    assert left == right


def test_interrupted_the_same_command_goes_on_and_ends_the_same(pipeline, tmp_path: Path, monkeypatch) -> None:
    recipes, run = pipeline
    out = tmp_path / "interrupted"
    plain_step = Trainer.train_step

    def train_step(self: Trainer):
        if (self.config.phase, self.step) in (("pretrain", 4), ("sft", 6)):
            os.kill(os.getpid(), signal.SIGINT)
        return plain_step(self)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    for stage, state in (("02-pretrain", 5), ("03-sft", 7)):
        finished = openzaya("run", recipes, "--out", out)
        assert finished.code == 130
        assert finished.err.splitlines()[-1].startswith("interrupted; ")
        status = json.loads((out / stage / "status.json").read_text())
        assert (status["state"], status["step"]) == ("interrupted", state)
    assert openzaya("run", recipes, "--out", out).code == 0
    for stage in ("02-pretrain", "03-sft"):
        assert (out / stage / "model" / "model.safetensors").read_bytes() == (
            run / stage / "model" / "model.safetensors"
        ).read_bytes()
        assert miniature.metrics_without_clock(out / stage) == miniature.metrics_without_clock(run / stage)


def test_interrupted_in_a_stage_without_checkpoints_it_is_done_again(pipeline, tmp_path: Path) -> None:
    """A real process, and a signal while the tokenizer is being trained."""
    recipes, _ = pipeline
    program = (
        "import time, openzaya.stages as stages\nfrom openzaya import cli\n"
        "stages.make_tokenizer = lambda config: time.sleep(100)\ncli.main()"
    )
    out = tmp_path / "run"
    command = [sys.executable, "-c", program, "run", str(recipes), "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    deadline = time.monotonic() + 60
    while not (out / "01-tokenizer" / "status.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in message
    assert json.loads((out / "01-tokenizer" / "status.json").read_text())["state"] == "interrupted"
    assert not is_finished(out / "01-tokenizer")


def test_overrides_reach_their_stage(pipeline, tmp_path: Path) -> None:
    recipes, _ = pipeline
    line = error_line(openzaya("run", recipes, "--out", tmp_path / "run", "05-rl.steps=3"))
    assert "override '05-rl.steps=3' names no stage; begin with one of: 01-tokenizer, 02-pretrain" in line
    assert not (tmp_path / "run").exists()
    line = error_line(openzaya("run", recipes, "--out", tmp_path / "run", "01-tokenizer.vocabsize=3"))
    assert "unknown key 'vocabsize'" in line and "did you mean 'vocab_size'" in line


def test_a_failed_stage_says_so_and_can_be_repaired(pipeline, tmp_path: Path) -> None:
    recipes, _ = pipeline
    out = tmp_path / "run"
    assert error_line(openzaya("run", recipes, "--out", out, "02-pretrain.data.sources.0.paths=['/nowhere']"))
    assert is_finished(out / "01-tokenizer") and not is_finished(out / "02-pretrain")
    assert openzaya("run", recipes, "--out", out).code == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "kind=None; set kind to one of: tokenizer, train, reward_model, rl"),
        ('kind = "dance"', "kind='dance'; set kind to one of"),
        ("kind = ", "is not valid TOML"),
        ('base = "other.toml"', "cannot read recipe"),
        ('base = "x.toml"', "set kind to one of"),
    ],
    ids=str,
)
def test_recipes_without_a_kind_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        stage_kind(tmp_path / "x.toml")


def test_the_kind_comes_from_a_base(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text('kind = "eval"')
    (tmp_path / "x.toml").write_text('base = "base.toml"')
    assert stage_kind(tmp_path / "x.toml") == "eval"


def test_a_folder_without_stages_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ConfigError, match=r"holds no stage files such as 01-tokenizer.toml"):
            run_pipeline(folder, tmp_path / "out")


def test_the_tokenizer_follows_from_its_settings(pipeline) -> None:
    recipes, run = pipeline
    settings = TokenizerConfig(
        vocab_size=miniature.VOCAB_SIZE, problems_per_family=5, text_paths=[str(recipes / "texts")]
    )
    made = make_tokenizer(settings)
    assert made.get_vocab() == load_tokenizer(run / "01-tokenizer" / "tokenizer").get_vocab()
    without_text = make_tokenizer(settings.model_copy(update={"text_characters": 0}))
    assert len(without_text) <= miniature.VOCAB_SIZE
