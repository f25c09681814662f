"""An interrupted phase ends like one that was not, bit for bit: weights, optimisers, data, metrics."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from openzaya.errors import CheckpointError, ConfigError
from openzaya.stages import run_stage
from openzaya.train.checkpoint import list_checkpoints, load_latest
from openzaya.train.loop import Trainer, train
from tests.command import error_line, openzaya
from tests.train import miniature

STEPS = 30
SUBPROCESS_FROM = 18
"""In-process interruptions lie before this step, those of a real process behind it."""

SLOW_PROCESS = """
import sys, time
from openzaya import cli
from openzaya.train.loop import Trainer
plain_step = Trainer.train_step
def slow_step(self):
    time.sleep(0.15)
    return plain_step(self)
Trainer.train_step = slow_step
cli.main()
"""
"""The command line, with steps slow enough for a signal to arrive before the end."""


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """A SIGINT to this process in the middle of ``step``."""
    plain_step = Trainer.train_step

    def train_step(self: Trainer):
        if self.step + 1 == step:
            os.kill(os.getpid(), signal.SIGINT)
        return plain_step(self)

    monkeypatch.setattr(Trainer, "train_step", train_step)


def final_state(stage: Path) -> dict:
    state = load_latest(stage / "checkpoints")
    assert state is not None
    return state


def assert_equal_runs(stage: Path, reference: Path) -> None:
    assert miniature.differences(final_state(stage), final_state(reference)) == []
    assert miniature.metrics_without_clock(stage) == miniature.metrics_without_clock(reference)
    assert (stage / "model" / "model.safetensors").read_bytes() == (
        reference / "model" / "model.safetensors"
    ).read_bytes()


@pytest.fixture(scope="module")
def phase(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(recipe, directory of its run without interruption)."""
    stages = tmp_path_factory.mktemp("stages")
    recipe = miniature.write_phase(stages, steps=STEPS)
    train(miniature.resolve(recipe), stages / "reference")
    return recipe, stages / "reference"


def test_interrupted_at_ten_random_steps_it_ends_the_same(phase, monkeypatch) -> None:
    recipe, reference = phase
    stage = reference.parent / "interrupted"
    draw = random.Random(5)
    in_process = sorted(draw.sample(range(1, SUBPROCESS_FROM), 8))
    shard_positions = set()
    for step in in_process:
        with monkeypatch.context() as patch:
            interrupt_at(patch, step)
            with pytest.raises(KeyboardInterrupt):
                train(miniature.resolve(recipe), stage)
        state = final_state(stage)
        assert state["step"] == step
        shard_positions.add(state["data"]["windows_emitted"])
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert len(shard_positions - {0}) >= 3, "no interruption in the middle of a shard: the test shows too little"

    arguments = ["train", str(recipe), "--out", str(stage)]
    for _ in range(2):
        reached = final_state(stage)["step"]
        command = [sys.executable, "-c", SLOW_PROCESS, *arguments]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
        deadline = time.monotonic() + 120
        while len(miniature.metrics_without_clock(stage)) <= reached + 1 and time.monotonic() < deadline:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, message = process.communicate(timeout=60)
        assert process.returncode == 130
        assert message.strip().splitlines()[-1].startswith("interrupted; ")
        assert "Traceback" not in message
        assert reached < final_state(stage)["step"] < STEPS

    finished = openzaya(*arguments)
    assert finished.code == 0 and "report:" in finished.out
    assert_equal_runs(stage, reference)


def test_a_planted_difference_is_seen(phase) -> None:
    """The comparison above fails for one changed bit anywhere in the state."""
    _, reference = phase
    state, changed = final_state(reference), final_state(reference)
    assert miniature.differences(state, changed) == []
    changed["optimizer"]["muon"]["state"][0]["momentum_buffer"].view(torch.int32).view(-1)[7] ^= 1
    assert miniature.differences(state, changed) == [".optimizer.muon.state.0.momentum_buffer"]


def test_each_part_of_the_state_matters(phase, monkeypatch) -> None:
    """Left out of a resume, weights, optimiser, balancer or data change what follows."""
    recipe, reference = phase
    stage = reference.parent / "parts"
    config = miniature.resolve(recipe).value
    with monkeypatch.context() as patch:
        interrupt_at(patch, 12)
        with pytest.raises(KeyboardInterrupt):
            train(miniature.resolve(recipe), stage)
    wanted = miniature.metrics_without_clock(reference)[12:15]
    for omitted in (None, "model", "optimizer", "balancer", "batches"):
        trainer = Trainer(config, stage.parent)
        if omitted is not None:
            monkeypatch.setattr(getattr(trainer, omitted), "load_state_dict", lambda state: None)
        trainer.resume(stage / "checkpoints")
        found = []
        for _ in range(3):
            metrics = trainer.train_step()
            found.append({"step": trainer.step} | metrics)
        kept = [{k: v for k, v in f.items() if k not in miniature.EXCLUDED_FROM_METRICS} for f in found]
        if omitted == "balancer":
            state = trainer.state_dict()["balancer"]["state"]
            assert int(state[0]["step"]) == 3, "the balancer was not left out"
        else:
            assert (kept == wanted) == (omitted is None), omitted


def test_killed_behind_a_checkpoint_it_repeats_the_lost_steps(phase) -> None:
    """A kill leaves later metrics, a cut line and half a checkpoint; none of it survives the resumption."""
    recipe, reference = phase
    stage = reference.parent / "killed"
    resolved = miniature.resolve(recipe, "checkpoint_every=10", "keep_checkpoints=3")
    train(resolved, stage)
    newest = list_checkpoints(stage / "checkpoints")[-1]
    newest.rename(newest.with_suffix(".tmp"))
    with (stage / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "loss/ce')
    train(resolved, stage)
    assert [path.name for path in sorted((stage / "checkpoints").iterdir())] == [
        "step-00000010.pt",
        "step-00000020.pt",
        "step-00000030.pt",
    ]
    assert_equal_runs(stage, reference)


def test_killed_before_the_export_it_keeps_its_final_numbers(phase) -> None:
    recipe, reference = phase
    stage = reference.parent / "unexported"
    train(miniature.resolve(recipe), stage)
    trainer = Trainer(miniature.resolve(recipe).value, stage.parent)
    trainer.resume(stage / "checkpoints")
    assert trainer.final_numbers()["final"]["loss/ce_nats"] == pytest.approx(
        miniature.metrics_without_clock(reference)[-1]["loss/ce_nats"]
    )
    assert trainer.final_numbers()["tokens"] == miniature.metrics_without_clock(reference)[-1]["train/tokens"]


def test_sigterm_saves_too_and_a_second_signal_ends_at_once(phase, monkeypatch) -> None:
    recipe, reference = phase
    stage = reference.parent / "terminated"
    plain_step = Trainer.train_step

    def terminated(self: Trainer):
        os.kill(os.getpid(), signal.SIGTERM)
        return plain_step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", terminated)
        with pytest.raises(KeyboardInterrupt):
            train(miniature.resolve(recipe), stage)
    assert final_state(stage)["step"] == 1

    def twice(self: Trainer):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return plain_step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", twice)
        with pytest.raises(KeyboardInterrupt):
            train(miniature.resolve(recipe), stage)
    assert final_state(stage)["step"] == 1


def test_without_resume_it_begins_anew_and_old_checkpoints_go(phase) -> None:
    recipe, reference = phase
    stage = reference.parent / "anew"
    train(miniature.resolve(recipe, "steps=6"), stage)
    train(miniature.resolve(recipe, "steps=4"), stage, resume=False)
    assert [path.name for path in list_checkpoints(stage / "checkpoints")] == ["step-00000004.pt"]
    assert [record["step"] for record in miniature.metrics_without_clock(stage)] == [1, 2, 3, 4]


def test_a_begun_stage_refuses_another_recipe_but_other_bookkeeping(phase, monkeypatch) -> None:
    recipe, reference = phase
    stage = reference.parent / "other-recipe"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            run_stage(recipe, stage)
    with pytest.raises(ConfigError, match=r"begun with another recipe.*weight_decay = 0.01' then"):
        run_stage(recipe, stage, ["optimizer.weight_decay=0.5"])
    with pytest.raises(ConfigError, match="begun with another recipe"):
        run_stage(recipe, stage, ["model.changes.hidden_size=64"])
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            run_stage(recipe, stage, ["checkpoint_every=3", "keep_checkpoints=1"])
    assert [path.name for path in list_checkpoints(stage / "checkpoints")] == ["step-00000004.pt"]


def test_a_truncated_newest_checkpoint_is_one_clear_error(phase, monkeypatch) -> None:
    recipe, reference = phase
    stage = reference.parent / "truncated"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            train(miniature.resolve(recipe), stage)
    newest = list_checkpoints(stage / "checkpoints")[-1]
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=r"step-00000002.pt cannot be read .* remove it to resume"):
        train(miniature.resolve(recipe), stage)
    assert "step-00000002.pt cannot be read" in error_line(openzaya("train", recipe, "--out", stage))
