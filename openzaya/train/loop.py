"""The training loop: one for pretraining, midtraining, SFT and reward models.

A step takes ``accumulation`` micro-batches of packed windows. Their losses are sums over supervised tokens and
are divided by the step's true number of supervised tokens, so the gradient does not depend on how the batch
was cut. Then: clip, Muon and AdamW, balancing biases from the load of the whole step, metrics.

That is next-token prediction. What learns something else is a subclass of ``Trainer`` with its own data and loss
(openzaya/rl/reward_training.py), run by the same ``train``.

Everything that decides the rest of a run is in its checkpoint; an interrupted run continues bit for bit
(same machine and number of threads). SIGINT or SIGTERM finishes the step in hand, saves and raises
KeyboardInterrupt; a second one stops at once.

Shape suffixes: B windows, T tokens a window, N = B*T, L layers, X experts and the skip class.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from openzaya.config import Resolved
from openzaya.data.mixture import Mixture
from openzaya.data.packing import Batch, PackedBatches
from openzaya.data.recipe import build_mixture
from openzaya.data.tokenizer import load_tokenizer
from openzaya.errors import ConfigError
from openzaya.kernels.host import keep_freed_memory
from openzaya.model import hf
from openzaya.model.balancing import Balancer, count_load, load_entropy, load_shares
from openzaya.model.config import preset
from openzaya.model.transformer import ForwardRecord, Zaya
from openzaya.runlog import Metric, RunLog
from openzaya.train.checkpoint import list_checkpoints, load_latest, save_checkpoint
from openzaya.train.loss import linear_cross_entropy
from openzaya.train.optim import MuonAdamW
from openzaya.train.recipe import ModelChoice, TrainConfig

EXPERT_LOAD_EVERY = 50
"""Steps between records of the full expert load and the residual norms."""
FIXED_BY_SHAPES = "start_from keeps the checkpoint's tensors; to train another shape start from a preset"


class Batches(Protocol):
    """An endless stream of micro-batches that resumes bit for bit."""

    def __next__(self) -> Batch: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def report(self) -> dict[str, Any]: ...


def train(
    recipe: Resolved[Any], directory: Path, *, resume: bool = True, trainer_type: type[Trainer] | None = None
) -> Path:
    """Run one phase in ``directory`` and return the exported model's path.

    Names of earlier stages in the recipe are looked up beside ``directory``. With ``resume`` the newest
    checkpoint there is continued, if there is one; without it, those that are there are removed. ``trainer_type``
    is by default :class:`Trainer`; the recipe's schema must be the one that it takes.

    Raises:
        OpenZayaError: a recipe, checkpoint or data source that cannot be used.
        KeyboardInterrupt: interrupted, with everything saved.
    """
    config = recipe.value
    if config.threads:
        torch.set_num_threads(config.threads)
    keep_freed_memory()
    with interruption() as interrupted:
        trainer = (trainer_type or Trainer)(config, directory.parent)
        if resume:
            trainer.resume(directory / "checkpoints")
        else:
            for path in list_checkpoints(directory / "checkpoints"):
                path.unlink()
        with RunLog(
            directory,
            total_steps=config.steps,
            resume_step=trainer.step,
            phase=config.phase,
            resolved_toml=recipe.to_toml(),
        ) as log:
            while trainer.step < config.steps:
                log.log(trainer.step + 1, trainer.train_step())
                stop = bool(interrupted)
                if stop or trainer.step % config.checkpoint_every == 0 or trainer.step == config.steps:
                    save_checkpoint(
                        directory / "checkpoints", trainer.step, trainer.state_dict(), keep=config.keep_checkpoints
                    )
                if stop and trainer.step < config.steps:
                    raise KeyboardInterrupt
            log.set_final(**trainer.final_numbers())
            return trainer.export(directory / "model")


class Trainer:
    """Model, data, optimiser and counters of one phase; ``stages`` is where earlier stages' directories lie.

    This one predicts the next token. A subclass that learns something else overrides :meth:`open_data`,
    :meth:`trained_module`, :meth:`num_supervised`, :meth:`loss`, :meth:`loss_metrics` and :meth:`export`.
    """

    def __init__(self, config: TrainConfig, stages: Path):
        self.config = config
        self.model = starting_model(config.model, stages).to(config.device)
        self.tokenizer = load_tokenizer(_tokenizer_path(config, stages))
        if len(self.tokenizer) > self.model.config.vocab_size:
            raise ConfigError(
                f"the tokenizer has {len(self.tokenizer)} tokens, "
                f"the model's vocabulary {self.model.config.vocab_size}; "
                "train a smaller tokenizer or raise model.changes.vocab_size"
            )
        if config.context_length > self.model.config.max_position_embeddings:
            raise ConfigError(
                f"context_length={config.context_length} exceeds the model's max_position_embeddings="
                f"{self.model.config.max_position_embeddings}; lower it or set model.changes.max_position_embeddings"
            )
        self.mixture, self.batches = self.open_data()
        self.optimizer = MuonAdamW(self.trained_module(), config.optimizer, config.steps)
        self.balancer = Balancer(self.model, config.balancing)
        self.step = 0
        self.tokens = self.supervised_tokens = 0
        self.seconds = 0.0
        self.last_metrics: dict[str, Metric] = {}

    def open_data(self) -> tuple[Mixture, Batches]:
        """The mixture of sources, and the micro-batches that are made of it."""
        mixture = build_mixture(self.config.data, self.tokenizer, self.config.context_length)
        batches = PackedBatches(
            mixture, self.config.context_length, self.config.windows_per_batch, self.config.data.shard_examples
        )
        return mixture, batches

    def trained_module(self) -> nn.Module:
        """What the optimiser steps and checkpoints hold: the model, with a new head where there is one."""
        return self.model

    def num_supervised(self, batch: Batch) -> int:
        """Tokens of a micro-batch that its loss is a sum over."""
        return int(targets_of(batch)[1].sum())

    def loss(self, hidden_BTD: Tensor, batch: Batch, *, scale: float) -> Tensor:
        """``scale`` times the sum of the micro-batch's losses, a scalar, of the normed hidden states."""
        targets_N, loss_mask_N = targets_of(batch)
        return linear_cross_entropy(
            hidden_BTD.flatten(0, 1), self.model.head_weight, targets_N, loss_mask_N, scale=scale
        )

    def loss_metrics(self, mean_loss: float) -> dict[str, Metric]:
        """What is logged of a step's loss, which is the mean over its supervised tokens."""
        return {"loss/ce_nats": mean_loss}

    def train_step(self) -> dict[str, Metric]:
        """One optimiser step; returns its metrics."""
        started = time.perf_counter()
        self.step += 1
        micro_batches = [next(self.batches) for _ in range(self.config.accumulation)]
        supervised = sum(self.num_supervised(batch) for batch in micro_batches)
        tokens = sum(int((batch.document_ids >= 0).sum()) for batch in micro_batches)
        is_detailed = self.step % EXPERT_LOAD_EVERY == 0 or self.step in (1, self.config.steps)

        mean_loss, load_LX = 0.0, torch.zeros(0)
        records = [ForwardRecord(measure_residual=is_detailed) for _ in micro_batches]
        for batch, record in zip(micro_batches, records, strict=True):
            loss, micro_load_LX = self._forward_backward(batch, record, supervised, tokens)
            mean_loss += loss
            load_LX = micro_load_LX if load_LX.numel() == 0 else load_LX + micro_load_LX
        numbers = self.optimizer.step(self.step)
        self.balancer.step(load_LX, numbers["optim/schedule_scale"])

        self.tokens += tokens
        self.supervised_tokens += supervised
        seconds = time.perf_counter() - started
        self.seconds += seconds
        entropy_L = load_entropy(load_LX)
        metrics: dict[str, Metric] = {
            **self.loss_metrics(mean_loss),
            "train/tokens": self.tokens,
            "train/supervised_tokens": self.supervised_tokens,
            "route/load_entropy": entropy_L.tolist(),
            "route/load_entropy_min": float(entropy_L.min()),
            "route/skip_share": (load_LX[:, -1] / load_LX.sum(1).clamp_min(1)).tolist(),
            "data/fill": tokens / sum(batch.tokens.numel() for batch in micro_batches),
            "time/step_s": seconds,
            "time/tokens_per_s": tokens / seconds,
            **{key: value for key, value in numbers.items() if key != "optim/schedule_scale"},
        }
        if is_detailed:
            metrics["route/expert_load"] = load_shares(load_LX).tolist()
            metrics["residual/rms"] = torch.stack(records[0].residual_rms).tolist()
        self.last_metrics = metrics
        return metrics

    def _forward_backward(
        self, batch: Batch, record: ForwardRecord, supervised: int, tokens: int
    ) -> tuple[float, Tensor]:
        """Add one micro-batch's gradient; returns its part of the step's mean loss and its load (L, X)."""
        batch = type(batch)(**{name: tensor.to(self.config.device) for name, tensor in vars(batch).items()})
        hidden_BTD = self.model.hidden_states(
            batch.tokens, document_ids=batch.document_ids, positions=batch.positions, record=record
        )
        loss = self.loss(hidden_BTD, batch, scale=1 / max(1, supervised))
        is_token_N = batch.document_ids.reshape(-1) >= 0
        auxiliary = self.balancer.auxiliary_loss(record.routes, is_token_N)
        objective = loss if auxiliary is None else loss + auxiliary / max(1, tokens)
        objective.backward()
        return float(loss.detach()), count_load(record.routes, is_token_N).cpu()

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the rest of the run."""
        return {
            "model": self.trained_module().state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "balancer": self.balancer.state_dict(),
            "data": self.batches.state_dict(),
            "counters": {"tokens": self.tokens, "supervised_tokens": self.supervised_tokens, "seconds": self.seconds},
            "last_metrics": self.last_metrics,
            "random_state": torch.get_rng_state(),
        }

    def resume(self, checkpoints: Path) -> None:
        """Continue from the newest checkpoint in ``checkpoints``, if there is one."""
        state = load_latest(checkpoints)
        if state is None:
            return
        self.trained_module().load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.balancer.load_state_dict(state["balancer"])
        self.batches.load_state_dict(state["data"])
        self.step = state["step"]
        self.tokens, self.supervised_tokens = state["counters"]["tokens"], state["counters"]["supervised_tokens"]
        self.seconds = state["counters"]["seconds"]
        self.last_metrics = state["last_metrics"]
        torch.set_rng_state(state["random_state"])

    def final_numbers(self) -> dict[str, Any]:
        """What a reader wants to know of the whole phase, for ``status.json``."""
        return {
            "tokens": self.tokens,
            "supervised_tokens": self.supervised_tokens,
            "train_seconds": round(self.seconds, 1),
            "parameters": self.model.config.num_parameters(),
            "final": {key: value for key, value in self.last_metrics.items() if not isinstance(value, list)},
            "data": {"packing": self.batches.report(), "sources": self.mixture.report()},
        }

    def export(self, path: Path) -> Path:
        """Save the model with its tokenizer: natively where the layout can hold it."""
        is_released = self.model.config.is_released_architecture
        hf.save(self.model, path, layout="native" if is_released else "openzaya", tokenizer=self.tokenizer)
        return path


def targets_of(batch: Batch) -> tuple[Tensor, Tensor]:
    """Next-token targets (int64) and which of them count (bool), both flat (N): never across a document's end."""
    targets_BT = torch.zeros_like(batch.tokens)
    targets_BT[:, :-1] = batch.tokens[:, 1:]
    mask_BT = torch.zeros_like(batch.loss_mask)
    mask_BT[:, :-1] = batch.loss_mask[:, 1:] & (batch.document_ids[:, 1:] == batch.document_ids[:, :-1])
    return targets_BT.reshape(-1), mask_BT.reshape(-1)


def stage_path(name: str, stages: Path, inside: str) -> Path | str:
    """The directory ``inside`` of the earlier stage ``name``, or ``name`` itself: a path or hub id."""
    stage = stages / name
    if (stage / inside).is_dir():
        return stage / inside
    return stage if stage.is_dir() else name


def starting_model(choice: ModelChoice, stages: Path) -> Zaya:
    if choice.start_from is None:
        return Zaya(preset(choice.preset).with_changes(**choice.changes), seed=choice.seed)
    model = hf.load(stage_path(choice.start_from, stages, "model"), dtype="float32")
    if model.quantisation is not None:
        raise ConfigError(
            f"model.start_from={choice.start_from} is quantised ({model.quantisation}), and integers cannot be "
            "trained; start from the original weights"
        )
    changed = model.config.with_changes(**choice.changes)
    with torch.device("meta"):
        wanted = {name: tensor.shape for name, tensor in Zaya(changed).state_dict().items()}
    if wanted != {name: tensor.shape for name, tensor in model.state_dict().items()}:
        raise ConfigError(
            f"model.changes={choice.changes} would change the shapes of {choice.start_from}: {FIXED_BY_SHAPES}"
        )
    return model.with_config(changed)


def _tokenizer_path(config: TrainConfig, stages: Path) -> Path | str:
    name = config.tokenizer or config.model.start_from
    if name is None:
        raise ConfigError("tokenizer is not set and there is no starting checkpoint to take it from; set tokenizer")
    return stage_path(name, stages, "tokenizer" if config.tokenizer else "model")


@contextlib.contextmanager
def interruption() -> Iterator[list[int]]:
    """Collects the first SIGINT or SIGTERM; the next one takes its usual course."""
    received: list[int] = []
    previous: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)
        previous.clear()

    def receive(number: int, frame: object) -> None:
        received.append(number)
        restore()

    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError):  # not in the main thread: the caller's business
            previous[number] = signal.signal(number, receive)
    try:
        yield received
    finally:
        restore()
