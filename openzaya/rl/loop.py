"""The RL loop: rollouts, update, weights to the rollout engines, one step after the other.

    collect   the groups of the step (collect.py), from a pool of rollout engines (pool.py)
    update    one step of the policy (learner.py)
    publish   the new weights, every ``publish_every`` steps; rollouts in flight go on with them

A stage begins by asking the starting policy: how often it solves each level, to leave out what is too easy, and where
each environment's difficulty should begin (prior.py). Everything that decides the rest of a run is in its checkpoint,
waiting groups and outstanding orders among it. A synchronous run continues bit for bit; an asynchronous one trains
every group once. SIGINT or SIGTERM finishes the step in hand, saves and raises KeyboardInterrupt.
"""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import torch

from openzaya.config import Resolved
from openzaya.data.tokenizer import load_tokenizer
from openzaya.errors import ConfigError
from openzaya.kernels.host import keep_freed_memory
from openzaya.model import hf
from openzaya.rl.behaviour import make_reward
from openzaya.rl.collect import Collector
from openzaya.rl.learner import Learner
from openzaya.rl.pool import LocalPool, RolloutEngine, RolloutPool
from openzaya.rl.prior import apply_prior
from openzaya.rl.processes import ProcessPool
from openzaya.rl.prompts import PromptStream
from openzaya.rl.recipe import RLConfig
from openzaya.rl.rollout import Group
from openzaya.rl.samples import StepLines, choose_samples, describe_groups
from openzaya.rl.worker import WorkerSetup
from openzaya.runlog import Metric, RunLog, write_text_atomically
from openzaya.train.checkpoint import list_checkpoints, load_latest, save_checkpoint
from openzaya.train.loop import interruption, stage_path, starting_model

LIVE_NUMBERS = {
    "rl/reward": "reward {:.3f}",
    "rl/solved_groups": "groups solved {:.2f}",
    "rl/length_tokens": "length {:.0f}",
    "rl/engine_trainer_kl": "KL {:.1e}",
    "rl/staleness_max": "stale {:.0f}",
    "rl/repetition_rate": "loops {:.3f}",
    "time/rollout_tokens_per_s": "{:,.0f} tokens/s",
}


def train_rl(recipe: Resolved[RLConfig], directory: Path, *, resume: bool = True) -> Path:
    """Run one stage of RL in ``directory`` and return the exported model's path.

    Names of earlier stages in the recipe are looked up beside ``directory``. With ``resume`` the newest checkpoint
    there is continued, if there is one; without it, those that are there are removed.

    Raises:
        OpenZayaError: a recipe, checkpoint or environment that cannot be used; engine and trainer disagree.
        KeyboardInterrupt: interrupted, with everything saved.
    """
    config = recipe.value
    if config.threads:
        torch.set_num_threads(config.threads)
    keep_freed_memory()
    checkpoints = directory / "checkpoints"
    if not resume:
        for path in list_checkpoints(checkpoints):
            path.unlink()
    with interruption() as interrupted, RLRun(config, directory.parent) as run:
        run.begin(checkpoints)
        with (
            RunLog(
                directory,
                total_steps=config.steps,
                resume_step=run.step,
                phase=config.phase,
                resolved_toml=recipe.to_toml(),
                live_numbers=LIVE_NUMBERS,
            ) as log,
            StepLines(directory / "groups.jsonl", run.step) as group_lines,
            StepLines(directory / "rollouts.jsonl", run.step) as samples,
        ):
            run.write_prior(directory)
            while run.step < config.steps:
                metrics = run.train_step()
                log.log(run.step, metrics)
                group_lines.write([describe_groups(run.step, run.collector.drawn, run.trained)])
                if run.step % config.samples_every == 0 or run.step in (1, config.steps):
                    samples.write(choose_samples(run.step, run.collector.drawn))
                stop = bool(interrupted)
                if stop or run.step % config.checkpoint_every == 0 or run.step == config.steps:
                    save_checkpoint(checkpoints, run.step, run.state_dict(), keep=config.keep_checkpoints)
                if stop and run.step < config.steps:
                    raise KeyboardInterrupt
            log.set_final(**run.final_numbers())
            return run.export(directory / "model")


class RLRun:
    """Learner, prompts and pool of one stage; ``stages`` is where earlier stages' directories lie."""

    def __init__(self, config: RLConfig, stages: Path) -> None:
        self.config, self._stages = config, stages
        model = starting_model(config.model, stages).to(config.device)
        source = config.tokenizer or config.model.start_from
        assert source is not None
        self.tokenizer = load_tokenizer(stage_path(source, stages, "tokenizer" if config.tokenizer else "model"))
        self.prompts = PromptStream(
            config.sources,
            self.tokenizer,
            group_size=config.rollout.group_size,
            max_prompt_tokens=_max_prompt_tokens(config, model.config.max_position_embeddings),
            seed=config.seed,
        )
        self.learner = Learner(model, config)
        self.pool: RolloutPool | None = None
        self._collector: Collector | None = None
        self.trained: list[Group] = []
        """The groups of the last step."""
        self.prior: dict[str, Any] | None = None
        """What the starting policy was found to solve; None where nothing asked for it."""
        self.seconds = 0.0
        self.sampled_tokens = 0

    @property
    def step(self) -> int:
        """Steps done."""
        return self.learner.step

    @property
    def collector(self) -> Collector:
        if self._collector is None:
            raise RuntimeError("begin() comes first")
        return self._collector

    def begin(self, checkpoints: Path) -> None:
        """Continue from the newest checkpoint, or ask the starting policy; then open the pool."""
        state = load_latest(checkpoints)
        if state is not None:
            self.learner.load_state_dict(state["learner"])
            self.prompts.load_state_dict(state["prompts"])
            self.prior = state["prior"]
            self.seconds, self.sampled_tokens = state["counters"]["seconds"], state["counters"]["sampled_tokens"]
        published = checkpoints.parent / "published"
        self.pool = make_pool(self.config, self.learner, self.tokenizer, self.prompts, self._stages, published)
        self._collector = Collector(self.config, self.prompts, self.pool)
        if state is not None:
            self._collector.load_state_dict(state["collector"])
            torch.set_rng_state(state["random_state"])
        else:
            self.prior = apply_prior(self.config, self.prompts, self.pool)

    def train_step(self) -> dict[str, Metric]:
        """Collect, update, publish; returns the step's metrics."""
        assert self.pool is not None
        started = time.perf_counter()
        self.trained = groups = self.collector.next_groups(self.step)
        collected = time.perf_counter()
        metrics = self.collector.metrics(self.step, self.learner.model.config.vocab_size)
        metrics |= self.learner.update(groups, self.collector.drawn_rates())
        pipeline = self.config.pipeline
        if pipeline.is_synchronous or self.step % pipeline.publish_every == 0:
            self.pool.publish(self.step, self.learner.weights())
        seconds = time.perf_counter() - started
        self.seconds += seconds
        sampled = metrics.get("rl/sampled_tokens", 0)
        assert isinstance(sampled, int)
        self.sampled_tokens += sampled
        return (
            metrics
            | self.pool.metrics()
            | {
                "time/step_s": seconds,
                "time/collect_s": collected - started,
                "time/rollout_tokens_per_s": sampled / seconds,
            }
        )

    def write_prior(self, directory: Path) -> None:
        """``prior.json``: pass rates and calibration of the starting policy."""
        if self.prior is not None:
            write_text_atomically(directory / "prior.json", json.dumps(self.prior, indent=2) + "\n")

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the rest of the run."""
        return {
            "learner": self.learner.state_dict(),
            "prompts": self.prompts.state_dict(),
            "collector": self.collector.state_dict(),
            "prior": self.prior,
            "counters": {"seconds": self.seconds, "sampled_tokens": self.sampled_tokens},
            "random_state": torch.get_rng_state(),
        }

    def final_numbers(self) -> dict[str, Any]:
        """What a reader wants to know of the whole stage, for ``status.json``."""
        online = {
            source: {name: entry.difficulty for name, entry in state.online.items()}
            for source, state in self.prompts.sources.items()
            if state.config.curriculum == "online"
        }
        return {
            "train_seconds": round(self.seconds, 1),
            "sampled_tokens": self.sampled_tokens,
            "orders": self.prompts.num_orders,
            "eased_orders": self.prompts.num_eased,
            "difficulties": online,
        }

    def export(self, path: Path) -> Path:
        """Save the policy with its tokenizer."""
        model = self.learner.model
        is_released = model.config.is_released_architecture
        hf.save(model, path, layout="native" if is_released else "openzaya", tokenizer=self.tokenizer)
        return path

    def close(self) -> None:
        """End the pool and the environments."""
        if self.pool is not None:
            self.pool.close()
        self.prompts.close()

    def __enter__(self) -> RLRun:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def make_pool(
    config: RLConfig,
    learner: Learner,
    tokenizer: Any,
    prompts: PromptStream,
    stages: Path,
    published: Path | None = None,
) -> RolloutPool:
    """The pool that the recipe's ``pipeline`` describes, with the learner's weights.

    ``stages`` is where earlier stages' directories lie, ``published`` where remote servers find weights (default: in
    ``stages``).
    """
    pipeline = config.pipeline
    if pipeline.workers == 0 and pipeline.pool == "processes":
        engine = RolloutEngine(
            copy.deepcopy(learner.model),
            tokenizer,
            prompts.environments,
            config.rollout,
            step=learner.step,
            reward=make_reward(config.behaviour, prompts.environments, stages, config.device),
        )
        return LocalPool(engine)
    setup = WorkerSetup(
        model=learner.model.config,
        tokenizer=tokenizer,
        environments={source.name: source.environments for source in config.sources},
        rollout=config.rollout,
        behaviour=config.behaviour,
        stages=stages,
        threads=pipeline.worker_threads,
        device=config.device,
    )
    if pipeline.pool == "processes":
        return ProcessPool(setup, pipeline.workers, step=learner.step, weights=learner.weights())
    if pipeline.pool == "ray":
        from openzaya.rl.adapters.ray import RayPool

        return RayPool(setup, max(1, pipeline.workers), step=learner.step, weights=learner.weights())
    from openzaya.rl.adapters.remote import RemotePool

    return RemotePool(
        pipeline.endpoints,
        learner.model.config,
        tokenizer,
        prompts.environments,
        config.rollout,
        reward=make_reward(config.behaviour, prompts.environments, stages, config.device),
        step=learner.step,
        weights=learner.weights(),
        directory=published or stages / "published",
        # Then no group can be too old, whatever the weights that it was sampled with.
        fixed_weights=pipeline.max_staleness >= config.steps,
    )


def _max_prompt_tokens(config: RLConfig, positions: int) -> int:
    room = min(config.window_tokens, positions) - config.rollout.max_new_tokens - 1
    if room < 1:
        raise ConfigError(
            f"window_tokens={config.window_tokens} and the model's {positions} positions leave no room for a prompt "
            f"beside rollout.max_new_tokens={config.rollout.max_new_tokens}; lower this or raise window_tokens"
        )
    return room
