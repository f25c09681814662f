"""Training speed on the CPU: OpenZAYA against transformers' ZAYA, one full step of each in turn.

    python benchmarks/train_step.py [--quick] [--shape nano|8b-slice|both] [--rounds N] [--threads N] [--json]

A step is forward, loss, backward and optimiser, in fp32. Both sides get the same weights, the same batch and
torch.optim.AdamW(fused=True); losses must agree before anything is timed. transformers runs with each of its
expert implementations that is usable here (grouped_mm, its default, and eager); the fastest is the peer. Shapes:

    nano      the ``nano`` preset, 16 rows of 256 tokens; sides interleaved in one process
    8b-slice  2 layers of ``zaya1-8b`` with its whole vocabulary, 2 rows of 256 tokens; one process a side in turn,
              because two optimisers' states do not fit beside each other

A further row times windows packed with short documents, which transformers cannot do correctly: no ratio.
Peak memory is the peak resident set of a process that runs one side alone. The last line is one JSON object;
without --quick each shape is also written to benchmarks/results/train_step-SHAPE.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from openzaya.kernels import build
from openzaya.kernels.host import keep_freed_memory
from openzaya.model.config import ZayaConfig, preset

RESULTS = Path(__file__).parent / "results"
PEERS = ("grouped_mm", "eager")
SHAPES: dict[str, tuple[ZayaConfig, int, int]] = {
    "nano": (preset("nano"), 16, 256),
    "8b-slice": (preset("zaya1-8b").with_changes(num_hidden_layers=2), 2, 256),
}


def fill(model: torch.nn.Module, initializer_range: float) -> None:
    """The same weights on both sides: drawn from a generator seeded by the parameter's name."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "_scale", "layernorm.weight", "temp")):
                parameter.fill_(1)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.normal_(
                    std=initializer_range, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))
                )


def make_batch(config: ZayaConfig, rows: int, length: int) -> torch.Tensor:
    """Token ids (rows, length)."""
    return torch.randint(3, config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))


def make_documents(rows: int, length: int) -> torch.Tensor:
    """Ids of documents of 60 to 130 tokens, packed into each row."""
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(60, 131, (rows, length // 60 + 1), generator=generator)
    return torch.stack([torch.arange(len(row)).repeat_interleave(row)[:length] for row in lengths])


def our_step(config: ZayaConfig, tokens: torch.Tensor, document_ids: torch.Tensor | None = None) -> Callable[[], float]:
    """A function that runs one step of ours and returns its loss."""
    from openzaya.model.transformer import Zaya
    from openzaya.train.loss import linear_cross_entropy

    model = Zaya(config)
    fill(model, config.initializer_range)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    targets = tokens.roll(-1, dims=1).reshape(-1)
    supervised = torch.ones_like(tokens, dtype=torch.bool)
    supervised[:, -1] = False
    if document_ids is not None:
        supervised[:, :-1] &= document_ids[:, 1:] == document_ids[:, :-1]
    mask, share = supervised.reshape(-1), 1.0 / int(supervised.sum())

    def step() -> float:
        hidden = model.hidden_states(tokens, document_ids=document_ids)
        loss = linear_cross_entropy(hidden.flatten(0, 1), model.head_weight, targets, mask, scale=share)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def peer_step(config: ZayaConfig, tokens: torch.Tensor, implementation: str) -> Callable[[], float]:
    """The same for transformers, as its documentation trains: ``model(input_ids, labels=input_ids).loss``."""
    import transformers

    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    names += ("num_experts", "moe_intermediate_size", "router_hidden_size", "eos_token_id", "max_position_embeddings")
    model = transformers.ZayaForCausalLM(
        transformers.ZayaConfig(
            **{name: getattr(config, name) for name in names},
            rope_parameters={
                "hybrid": {
                    "rope_type": "default",
                    "rope_theta": config.rope_theta,
                    "partial_rotary_factor": config.partial_rotary_factor,
                }
            },
        )
    )
    fill(model, config.initializer_range)
    model.train()
    model.set_experts_implementation(implementation)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> float:
        loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def make_step(shape: str, side: str) -> tuple[Callable[[], float], int]:
    """One side's step and the tokens it takes."""
    config, rows, length = SHAPES[shape]
    tokens = make_batch(config, rows, length)
    if side == "openzaya":
        return our_step(config, tokens), tokens.numel()
    if side == "openzaya packed":
        return our_step(config, tokens, make_documents(rows, length)), tokens.numel()
    return peer_step(config, tokens, side), tokens.numel()


def timed(step: Callable[[], float]) -> float:
    """Seconds of one step."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def run_side(shape: str, side: str, steps: int) -> None:
    """The body of a subprocess: one side alone; prints losses, seconds a step and peak memory as JSON."""
    keep_freed_memory()
    step, tokens = make_step(shape, side)
    first_loss = step()
    seconds = [timed(step) for _ in range(steps)]
    peak_gib = peak_memory_gib()
    print(json.dumps({"loss": first_loss, "seconds": seconds, "tokens": tokens, "peak_gib": peak_gib}))


def peak_memory_gib() -> float:
    """Peak resident set of this program. ``ru_maxrss`` would count the parent's memory at the fork too."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line) / 2**20


def subprocess_side(shape: str, side: str, steps: int, threads: int) -> dict[str, Any]:
    """Run :func:`run_side` in a process of its own."""
    command = [sys.executable, __file__, "--shape", shape, "--side", side, "--rounds", str(steps)]
    done = subprocess.run([*command, "--threads", str(threads)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side} at shape {shape} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def check_losses(losses: dict[str, float]) -> None:
    """Sides that compute different things are not compared."""
    ours = losses["openzaya"]
    for side, loss in losses.items():
        if abs(loss - ours) > 1e-5 * abs(ours):
            raise SystemExit(f"losses differ: openzaya {ours}, {side} {loss}; nothing was timed")


def summarise(seconds: dict[str, list[float]], tokens: int, peak_gib: dict[str, float], rounds: int) -> dict[str, Any]:
    """Medians, and the ratio to the fastest peer round by round."""
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    peer = min((side for side in PEERS if side in medians), key=lambda side: medians[side])
    ratios = [theirs / ours for ours, theirs in zip(seconds["openzaya"], seconds[peer], strict=True)]
    return {
        "tokens_a_step": tokens,
        "rounds": rounds,
        "tokens_per_s": {side: tokens / value for side, value in medians.items()},
        "seconds_a_step": {side: {"min": min(values), "median": medians[side]} for side, values in seconds.items()},
        "peer": f"transformers {peer}",
        "ratio": medians[peer] / medians["openzaya"],
        "ratio_of_fastest_rounds": min(seconds[peer]) / min(seconds["openzaya"]),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "peak_gib": peak_gib,
    }


def measure_nano(rounds: int, threads: int, quick: bool) -> dict[str, Any]:
    """All sides in this process, one step each a round."""
    sides = ("openzaya", *PEERS, "openzaya packed")
    steps = {}
    for side in sides:
        steps[side], tokens = make_step("nano", side)
    check_losses({side: steps[side]() for side in sides[:-1]})
    steps[sides[-1]]()
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for index in range(rounds):
        # Turn the order, so that no side always follows the same one.
        for side in (*sides[index % len(sides) :], *sides[: index % len(sides)]):
            seconds[side].append(timed(steps[side]))
    peaks = {}
    if not quick:
        peaks = {side: subprocess_side("nano", side, 2, threads)["peak_gib"] for side in ("openzaya", *PEERS)}
    return summarise(seconds, tokens, peaks, rounds)


def measure_slice(rounds: int, threads: int) -> dict[str, Any]:
    """One process a side and round, in turn; a round is the median of three steps after a first one."""
    seconds: dict[str, list[float]] = {side: [] for side in ("openzaya", *PEERS)}
    peaks: dict[str, float] = {}
    for _ in range(rounds):
        losses = {}
        for side in seconds:
            result = subprocess_side("8b-slice", side, 3, threads)
            losses[side], tokens = result["loss"], result["tokens"]
            seconds[side].append(statistics.median(result["seconds"]))
            peaks[side] = max(peaks.get(side, 0.0), result["peak_gib"])
        check_losses(losses)
    return summarise(seconds, tokens, peaks, rounds)


def describe() -> dict[str, Any]:
    """Machine, versions, commit, date."""
    from importlib.metadata import version

    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": git.stdout.strip() or None,
        "cpu": cpu.split(":")[-1].strip() or platform.processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "kernels": build.available(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "dtype": "float32",
        "optimiser": "torch.optim.AdamW(fused=True)",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute: few rounds at nano only, nothing written")
    parser.add_argument("--shape", choices=(*SHAPES, "both"), default="both")
    parser.add_argument("--rounds", type=int, default=None, help="rounds a shape (12 at nano, 2 at the slice)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of both sides")
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.side:
        run_side(arguments.shape, arguments.side, arguments.rounds)
        return

    keep_freed_memory()
    result: dict[str, Any] = {"benchmark": "train_step", **describe(), "shapes": {}}
    shapes = ("nano",) if arguments.quick else tuple(SHAPES) if arguments.shape == "both" else (arguments.shape,)
    for shape in shapes:
        if shape == "nano":
            rounds = arguments.rounds or (4 if arguments.quick else 12)
            summary = measure_nano(rounds, arguments.threads, arguments.quick)
        else:
            summary = measure_slice(arguments.rounds or 2, arguments.threads)
        result["shapes"][shape] = summary
        if not arguments.quick:
            RESULTS.mkdir(exist_ok=True)
            record = result | {"shapes": {shape: summary}}
            (RESULTS / f"train_step-{shape}.json").write_text(json.dumps(record, indent=1) + "\n")
        if not arguments.json:
            print(f"{shape}: {summary['tokens_a_step']} tokens a step, median of {summary['rounds']} rounds")
            for side, speed in summary["tokens_per_s"].items():
                peak = summary["peak_gib"].get(side)
                print(f"  {side:16} {speed:10.0f} tokens/s" + (f"   peak {peak:.2f} GiB" if peak else ""))
            print(
                f"  ratio to {summary['peer']}: {summary['ratio']:.2f} "
                f"(rounds {summary['ratio_min']:.2f} to {summary['ratio_max']:.2f})"
            )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
