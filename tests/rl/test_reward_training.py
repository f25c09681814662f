"""Reward models train by the loop of all phases: the loss is Bradley-Terry's, runs resume bit for bit, pairs are told
apart."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor

from openzaya.config import Resolved, load_recipe
from openzaya.data.preferences import PairBatch
from openzaya.errors import CheckpointError, ConfigError, DataError
from openzaya.model import hf
from openzaya.rl.reward_model import RewardModel
from openzaya.rl.reward_training import RewardTrainer, bradley_terry, train_reward_model
from openzaya.stages import run_stage
from openzaya.train.checkpoint import load_latest
from openzaya.train.loop import Trainer
from openzaya.train.recipe import RewardModelConfig
from tests.train import miniature

STEPS = 12


def write_recipe(stages: Path, *, steps: int = STEPS, extra: str = "") -> Path:
    """Tokenizer and recipe of a reward model on fresh weights."""
    if not (stages / "01-tokenizer").exists():
        miniature.write_tokenizer(stages)
    shape = ", ".join(f"{key} = {json.dumps(value)}" for key, value in miniature.SHAPE.items())
    path = stages / "08-reward.toml"
    path.write_text(f"""
kind = "reward_model"
tokenizer = "01-tokenizer"
context_length = 160
windows_per_batch = 4
accumulation = 2
steps = {steps}
checkpoint_every = 1000
evaluate_every = 5
{extra}
[model]
preset = "smoke"
changes = {{ {shape} }}
[optimizer]
warmup_steps = 2
[data]
held_out_pairs = 24
[[data.sources]]
kind = "problem_pairs"
families = ["sorting", "counting"]
difficulties = [0, 1]
shares = {{ repeated = 1.0, untidy = 1.0 }}
""")
    return path


def resolve(recipe: Path, *overrides: str) -> Resolved[RewardModelConfig]:
    return load_recipe(recipe, RewardModelConfig, overrides)


@pytest.fixture(scope="module")
def phase(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(recipe, directory of its run)."""
    stages = tmp_path_factory.mktemp("stages")
    recipe = write_recipe(stages)
    train_reward_model(resolve(recipe), stages / "reference")
    return recipe, stages / "reference"


# --- the loss ---------------------------------------------------------------------------------------


def test_bradley_terry_is_the_textbooks() -> None:
    chosen, rejected = torch.tensor([2.0, -1.0, 0.0]), torch.tensor([1.0, 3.0, 0.0])
    probabilities = 1 / (1 + torch.exp(rejected - chosen))
    assert float(bradley_terry(chosen, rejected)) == pytest.approx(float(-probabilities.log().sum()), rel=1e-6)
    centred = bradley_terry(chosen, rejected, centring=0.1) - bradley_terry(chosen, rejected)
    assert float(centred) == pytest.approx(0.1 * (9 + 4 + 0), rel=1e-5)
    far = bradley_terry(torch.tensor([-1e4]), torch.tensor([1e4]))
    assert float(far) == 2e4  # no overflow


def one_step(recipe: Path, *overrides: str) -> tuple[dict[str, Tensor], dict, list[PairBatch]]:
    """Gradients before the optimiser takes them, metrics and micro-batches of a first step."""
    subject = RewardTrainer(resolve(recipe, *overrides).value, recipe.parent)
    module, taken = subject.trained_module(), []
    plain_next, plain_step = subject.batches.__next__, subject.optimizer.step

    class Recorded:
        def __next__(self) -> PairBatch:
            taken.append(plain_next())
            return taken[-1]

    gradients: dict[str, Tensor] = {}

    def step(number: int) -> dict[str, float]:
        gradients.update({n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None})
        return plain_step(number)

    subject.batches = Recorded()  # type: ignore[assignment]
    subject.optimizer.step = step  # type: ignore[method-assign]
    return gradients, subject.train_step(), taken


def test_the_gradient_is_that_of_the_mean_over_pairs_scored_alone(phase) -> None:
    recipe, _ = phase
    gradients, metrics, taken = one_step(recipe, "centring=0.01")
    twin = RewardTrainer(resolve(recipe, "centring=0.01").value, recipe.parent)
    module = twin.trained_module()

    def score(batch: PairBatch, last: int) -> Tensor:
        row, end = divmod(last, batch.tokens.shape[1])
        start = end - int(batch.positions[row, end])
        return twin.model.hidden_states(batch.tokens[row : row + 1, start : end + 1])[0, -1] @ module.reward_head

    chosen = torch.stack([score(batch, i) for batch in taken for i in batch.chosen_P.tolist()])
    rejected = torch.stack([score(batch, i) for batch in taken for i in batch.rejected_P.tolist()])
    assert len(taken) == 2 and len(chosen) > 4
    loss = bradley_terry(chosen, rejected, centring=0.01) / len(chosen)
    loss.backward()
    assert metrics["rm/loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert metrics["rm/accuracy"] == pytest.approx(float((chosen > rejected).float().mean()))
    assert metrics["rm/margin"] == pytest.approx(float((chosen - rejected).detach().mean()), abs=1e-6)
    assert metrics["train/supervised_tokens"] == 2 * len(chosen)
    assert "reward_head" in gradients
    for name, parameter in module.named_parameters():
        if parameter.grad is None:
            continue
        scale = max(float(parameter.grad.abs().max()), 1e-8)
        assert float((gradients[name] - parameter.grad).abs().max()) <= 2e-5 * scale, name


# --- runs -------------------------------------------------------------------------------------------


def test_it_learns_to_tell_pairs_apart(phase) -> None:
    recipe, _ = phase
    settings = ("steps=40", "optimizer.muon_learning_rate=2e-3", "optimizer.decay_steps=20")
    train_reward_model(resolve(recipe, *settings), recipe.parent / "longer")
    status = json.loads((recipe.parent / "longer" / "status.json").read_text())
    held_out = status["held_out"]
    assert held_out["pairs"] == 24 and held_out["accuracy"] >= 0.85, held_out
    assert held_out["accuracy_by_kind"].keys() == {"repeated", "untidy"}
    records = miniature.metrics_without_clock(recipe.parent / "longer")
    assert [record["step"] for record in records if "rm/heldout_accuracy" in record] == list(range(5, 41, 5))
    assert records[-1]["rm/heldout_accuracy"] == held_out["accuracy"]
    assert records[-1]["rm/loss"] < 0.8 * records[0]["rm/loss"]


def test_interrupted_it_ends_the_same(phase, monkeypatch) -> None:
    recipe, reference = phase
    stage = reference.parent / "interrupted"
    plain_step = Trainer.train_step
    for interrupted_at in (1, 5, 8):

        def train_step(self: Trainer, at: int = interrupted_at):
            if self.step + 1 == at:
                os.kill(os.getpid(), signal.SIGINT)
            return plain_step(self)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "train_step", train_step)
            with pytest.raises(KeyboardInterrupt):
                train_reward_model(resolve(recipe), stage)
    train_reward_model(resolve(recipe), stage)
    states = [load_latest(path / "checkpoints") for path in (stage, reference)]
    assert "reward_head" in states[0]["model"]
    assert miniature.differences(*states) == []
    assert miniature.metrics_without_clock(stage) == miniature.metrics_without_clock(reference)
    for name in ("model.safetensors", "config.json"):
        assert (stage / "model" / name).read_bytes() == (reference / "model" / name).read_bytes()


def test_as_a_stage_it_leaves_a_reward_model_that_is_no_language_model(phase) -> None:
    recipe, _ = phase
    stage = recipe.parent / "08-reward"
    run_stage(recipe, stage, ["steps=3"])
    loaded = RewardModel.load(stage / "model")
    held_out = json.loads((stage / "status.json").read_text())["held_out"]
    assert vars(loaded.statistics) == pytest.approx(held_out["scores"], rel=1e-6)
    with pytest.raises(CheckpointError, match=r"no plain language model.*reward_head"):
        hf.load(stage / "model")
    with pytest.raises(CheckpointError, match="no plain language model"):
        RewardTrainer(resolve(recipe, "model.start_from=08-reward").value, recipe.parent)
    with pytest.raises(ConfigError, match="of kind 'reward_model', not 'train'"):
        run_stage(recipe, recipe.parent / "other", kind="train")


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["windows_per_batch=1"], ConfigError, "windows_per_batch"),
        (["data.held_out_pairs=1"], ConfigError, "held_out_pairs"),
        (["data.sources.0.kind=text"], ConfigError, "kind"),
        (["data.sources.0.shares={ugly=1.0}"], ConfigError, "ugly"),
        (["data.sources.0.difficulties=[3,1]"], DataError, "lowest <= highest"),
        (["context_length=513"], ConfigError, "max_position_embeddings=512"),
    ],
    ids=str,
)
def test_what_cannot_be_trained_says_why(phase, overrides, error, message: str) -> None:
    recipe, _ = phase
    with pytest.raises(error, match=message):
        RewardTrainer(resolve(recipe, *overrides).value, recipe.parent).train_step()
