"""How far the trainer's log probabilities are from the engine's, with and without router replay.

    python benchmarks/rl_agreement.py MODEL [--prompts P] [--group G] [--seed S] [--quick] [--json]

MODEL is a checkpoint with a tokenizer (the SFT model that ``make nano`` leaves, for example). The engine samples G
rollouts of each of P problems at temperature 1; the trainer then runs the same tokens, once with the experts that the
engine chose and once with its own router's. A row for each pair of precisions:

    engine fp32, trainer fp32        engine bf16, trainer bf16        engine bf16, trainer fp32
    engine int8, trainer fp32        engine int4, trainer fp32

and on each: KL(engine || trainer) in nats a token (estimator ratio - 1 - log ratio), Pearson r of the probabilities,
the largest gap of a log probability, and the share of tokens whose experts differ in some layer.

The last line is one JSON object; a run without --quick also writes benchmarks/results/rl_agreement.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.serve_load import circumstances, write_model  # noqa: E402
from openzaya.data.tokenizer import load_tokenizer  # noqa: E402
from openzaya.environments.families import FamilyEnvironment  # noqa: E402
from openzaya.model import hf  # noqa: E402
from openzaya.model.transformer import ForwardRecord, Zaya  # noqa: E402
from openzaya.problems import TRAINED_FAMILIES  # noqa: E402
from openzaya.rl.batch import PolicyBatch, PolicySequence, make_batches  # noqa: E402
from openzaya.rl.learner import policy_logprobs  # noqa: E402
from openzaya.rl.loss import agreement  # noqa: E402
from openzaya.rl.pool import RolloutEngine  # noqa: E402
from openzaya.rl.rollout import Order, RolloutConfig, order_seed  # noqa: E402

RESULTS = Path(__file__).parent / "results"
PAIRS = (
    ("float32", None, "float32"),
    ("bfloat16", None, "bfloat16"),
    ("bfloat16", None, "float32"),
    ("float32", "int8", "float32"),
    ("float32", "int4", "float32"),
)
"""Engine's dtype, its quantisation, trainer's dtype."""


def roll_out(path: Path, dtype: str, quantize: str | None, num_prompts: int, group: int, seed: int) -> list[Any]:
    """Sequences as the learner gets them, with advantage 1."""
    environments = {name: FamilyEnvironment(name, seed=seed) for name in TRAINED_FAMILIES}
    config = RolloutConfig(group_size=max(2, group), max_new_tokens=200)
    settings = {"quantize": quantize}
    engine = RolloutEngine(
        hf.load(path, dtype=dtype), load_tokenizer(path), {"a": environments}, config, engine_settings=settings
    )
    orders = []
    for number in range(num_prompts):
        name = TRAINED_FAMILIES[number % len(TRAINED_FAMILIES)]
        task = environments[name].task(number % 8, number)
        orders.append(Order(number, "a", "plain", task, group, order_seed(seed, number)))
    engine.start(orders)
    groups: list[Any] = []
    while len(groups) < len(orders):
        groups += engine.finished()
    engine.close()
    return [PolicySequence(one.prompt_tokens, rollout, 1.0) for one in groups for rollout in one.rollouts]


@torch.no_grad()
def compare(model: Zaya, sequences: list[PolicySequence], *, replay: bool) -> dict[str, float]:
    """Engine against trainer over all sampled tokens."""
    ours, theirs, num_other, num_routed = [], [], 0, 0
    for batch in make_batches(sequences, window_tokens=512, windows_per_batch=8, replay_experts=True):
        recorded = batch.experts
        assert recorded is not None
        asked = batch if replay else PolicyBatch(**{**vars(batch), "experts": None})
        record = ForwardRecord()
        logprobs, _ = policy_logprobs(model, asked, record)
        ours.append(logprobs)
        theirs.append(batch.of_next(batch.sampler_logprobs))
        rows = batch.predicts_N
        differs = (record.experts_NL() != recorded.flatten(0, 1)).any(1)[rows]
        num_other += int(differs.sum())
        num_routed += int(rows.sum())
    logprobs, sampler = torch.cat(ours).float(), torch.cat(theirs)
    found = agreement(logprobs, sampler, torch.ones_like(logprobs, dtype=torch.bool))
    return {
        "kl_nats": found.kl_nats,
        "pearson_r": found.pearson_r,
        "largest_gap_nats": found.largest_gap_nats,
        "other_experts_share": num_other / max(1, num_routed),
        "num_tokens": found.num_tokens,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    arguments = parser.parse_args()
    arguments.quick |= arguments.model is None
    if arguments.quick:
        arguments.prompts, arguments.group = 9, 2
    with tempfile.TemporaryDirectory() as directory:
        measure(arguments, arguments.model or write_model(Path(directory)))


def measure(arguments: argparse.Namespace, path: Path) -> None:
    """All pairs of precisions on the model at ``path``."""
    rows = []
    for dtype, quantize, trainer_dtype in PAIRS:
        sequences = roll_out(path, dtype, quantize, arguments.prompts, arguments.group, arguments.seed)
        model = hf.load(path, dtype=trainer_dtype)
        row: dict[str, Any] = {"engine": quantize or dtype, "trainer": trainer_dtype}
        row["replay"], row["no_replay"] = (compare(model, sequences, replay=replay) for replay in (True, False))
        rows.append(row)
        if not arguments.json:
            for name in ("replay", "no_replay"):
                print(
                    f"engine {row['engine']:9} trainer {trainer_dtype:9} {name:10}"
                    + "".join(f"  {key} {value:.3g}" for key, value in row[name].items()),
                    flush=True,
                )
    result = {"seed": arguments.seed, "prompts": arguments.prompts, "group": arguments.group, "rows": rows}
    result |= circumstances()
    if not arguments.quick:
        (RESULTS / "rl_agreement.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
