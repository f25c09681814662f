"""The cascade's questions in parts, on several processes: problems, instructions, Markovian RSA.

A job is some questions for one checkpoint. Sampling on two cores is half arithmetic and half Python, so processes with
one thread each get more out of them than one process with two threads. A question's seed follows from its number, not
from its job, so neither the number of processes nor the size of the jobs changes a result.
"""

from __future__ import annotations

import asyncio
import functools
import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import PreTrainedTokenizerFast

from openzaya.data.chat import render
from openzaya.data.tokenizer import load_tokenizer
from openzaya.environments.base import Task
from openzaya.environments.instructions import problem_and_forms
from openzaya.errors import EngineError, OpenZayaError
from openzaya.eval.benchmarks import EvalConfig, answer, keep_samples, score
from openzaya.infer.generate import complete, engine_for
from openzaya.infer.sampling import SamplingParams
from openzaya.model import hf
from openzaya.model.transformer import Zaya
from openzaya.problems import Problem, get_family
from openzaya.problems.instructions.composed import verify_forms
from openzaya.ttc.completer import Rollout
from openzaya.ttc.config import RSAConfig
from openzaya.ttc.engine_completer import EngineCompleter
from openzaya.ttc.results import RSAResult
from openzaya.ttc.rsa import markovian_rsa

INSTRUCTION_SEED = 1 << 24
"""Added to the seed, so that instructions and problems draw apart."""


@dataclass(frozen=True)
class Job:
    """Questions for one checkpoint."""

    kind: Literal["problems", "instructions", "rsa"]
    row: int
    """The table's row that the checkpoint has."""
    model: str
    first: int
    """The number of the first question among those of its kind."""
    questions: tuple[Any, ...]
    """Problems; tasks of an instruction environment."""
    config: EvalConfig
    """How answers are sampled."""
    rsa: RSAConfig | None = None

    @property
    def num_rollouts(self) -> int:
        """Its size, for shares of the whole."""
        each = self.rsa.num_rollouts if self.rsa is not None else self.config.k + (self.kind == "problems")
        return each * len(self.questions)


@dataclass(frozen=True)
class InstructionScore:
    """Shares of a task's samples; None where none has a verdict."""

    strict: float | None
    """All forms followed, and the answer right."""
    followed: float | None
    """All forms followed."""
    num_tokens: int


@dataclass(frozen=True)
class RSAScore:
    """One problem's run of Markovian RSA."""

    rounds: tuple[float | None, ...]
    """Mean reward of each round's rollouts, the last one the final."""
    majority: float | None
    """Reward of the most frequent answer of the final round."""
    passed: float | None
    truncated: float
    num_tokens: int


@dataclass
class Outcome:
    """What a job found, aligned with its questions."""

    scores: list[Any] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)


def run_jobs(jobs: Sequence[Job], num_processes: int) -> Iterator[tuple[Job, Outcome]]:
    """Run ``jobs`` and give each with its outcome as it ends; with one process in this one.

    Raises:
        OpenZayaError: a checkpoint that cannot be read or asked; a process that died.
    """
    if num_processes <= 1:
        yield from ((job, run_job(job)) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, context, initializer=_begin_process) as pool:
        pending = {pool.submit(run_job, job): job for job in jobs}
        try:
            for future in as_completed(pending):
                yield pending[future], future.result()
        except OpenZayaError:
            raise
        except RuntimeError as error:  # BrokenProcessPool among them
            raise EngineError(
                f"an evaluation process ended with {type(error).__name__}: {error}; it was killed or ran out of "
                "memory: lower max_rows or processes"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _begin_process() -> None:
    """One thread, and no life after the process that asks, however that ended."""
    import torch

    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def run_job(job: Job) -> Outcome:
    """Do one job."""
    model, tokenizer = _checkpoint(job.model)
    if job.kind == "problems":
        answered = answer(model, tokenizer, job.questions, job.config, first=job.first)
        return Outcome([score(item) for item in answered], keep_samples(answered, job.config))
    if job.kind == "instructions":
        return _follow_instructions(model, tokenizer, job)
    assert job.rsa is not None
    results = asyncio.run(_run_rsa(model, tokenizer, job.questions, job.rsa))
    return Outcome([rsa_score(result) for result in results])


@functools.lru_cache(maxsize=1)
def _checkpoint(path: str) -> tuple[Zaya, PreTrainedTokenizerFast]:
    """Jobs of one checkpoint follow each other: the last one is kept."""
    return hf.load(path), load_tokenizer(path)


# --- instructions ---------------------------------------------------------------------------------


def _follow_instructions(model: Zaya, tokenizer: PreTrainedTokenizerFast, job: Job) -> Outcome:
    config = job.config
    prompts = [
        render([dict(message) for message in task.messages], tokenizer, add_generation_prompt=True).tokens
        for task in job.questions
    ]
    params = SamplingParams(
        temperature=config.temperature,
        top_p=config.top_p,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed + INSTRUCTION_SEED + job.first * config.k,
    )
    with engine_for(model, prompts, params, min(config.max_rows, len(prompts) * config.k)) as engine:
        sampled = complete(engine, prompts, params, config.k)
    outcome = Outcome()
    for task, completions in zip(job.questions, sampled, strict=True):
        responses = [str(tokenizer.decode(completion.tokens)) for completion in completions]
        num_tokens = sum(len(completion.tokens) for completion in completions)
        outcome.scores.append(instruction_score(task, responses, num_tokens))
        is_truncated = completions[0].finish_reason == "length"
        outcome.samples.append(_instruction_sample(task, responses[0], config.temperature, is_truncated))
    return outcome


def instruction_score(task: Task, responses: Sequence[str], num_tokens: int) -> InstructionScore:
    """Judge ``responses`` to a task of an instruction environment."""
    problem, forms = problem_and_forms(task)
    strict = [verify_forms(problem, forms, response).reward for response in responses]
    followed = [verify_forms(problem, forms, response, answer_required=False).reward for response in responses]
    return InstructionScore(_mean(strict), _mean(followed), num_tokens)


def _instruction_sample(task: Task, response: str, temperature: float, is_truncated: bool) -> dict[str, Any]:
    problem, forms = problem_and_forms(task)
    verdict = verify_forms(problem, forms, response)
    return {
        "family": "instructions",
        "difficulty": task.difficulty,
        "prompt": task.messages[-1]["content"],
        "gold": ", ".join(form.name for form in forms),
        "response": response,
        "reward": verdict.reward,
        "reason": verdict.reason,
        "temperature": temperature,
        "truncated": is_truncated,
    }


# --- Markovian RSA --------------------------------------------------------------------------------


async def _run_rsa(
    model: Zaya, tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem], config: RSAConfig
) -> list[RSAResult]:
    """One result a problem; all problems share the engine."""
    from openzaya.infer.engine import Engine

    with Engine(model, tokenizer, max_running=384, max_waiting=1 << 20) as engine:
        completer, together = EngineCompleter(engine), asyncio.Semaphore(48)

        async def one(problem: Problem) -> RSAResult:
            async with together:
                return await markovian_rsa(
                    problem.prompt, completer, config, verifier=lambda rollout: rollout_reward(problem, rollout)
                )

        return list(await asyncio.gather(*map(one, problems)))


def rollout_reward(problem: Problem, rollout: Rollout) -> float | None:
    """The family's verdict on a rollout of RSA; one that never closed its reasoning is wrong."""
    text = f"<think>{rollout.reasoning}"
    if rollout.is_closed:
        text += f"</think>{rollout.content}"
    return get_family(problem.family).verify(problem, text).reward


def rsa_score(result: RSAResult) -> RSAScore:
    """The numbers of one run."""
    final = result.rounds[-1]
    return RSAScore(
        rounds=tuple(_mean([candidate.correct for candidate in one.done]) for one in result.rounds),
        majority=result.selected[0].correct,
        passed=max((c.correct for c in final.done if c.correct is not None), default=None),
        truncated=final.truncated / max(1, len(final.candidates)),
        num_tokens=result.usage.completion,
    )


def _mean(rewards: Sequence[float | None]) -> float | None:
    found = [reward for reward in rewards if reward is not None]
    return sum(found) / len(found) if found else None
