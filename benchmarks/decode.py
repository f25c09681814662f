"""Decoding speed on the CPU at the shape of ZAYA1-8B: OpenZAYA's engine against transformers' ZAYA.

    python benchmarks/decode.py [--layers N] [--rounds N] [--threads N] [--only NAME...] [--json]

Random weights, so this says nothing about quality. A random router sends all tokens to one expert, which flatters
every system; here each token's expert is drawn uniformly, on both sides. transformers runs with its fastest settings
for this model (``grouped_mm`` experts, ``sdpa`` attention, bfloat16) by plain forward calls and argmax; ours runs
through the engine, scheduling and sampling included. Measured in each round:

    prefill       a prompt of 512 tokens to its first token
    decode 1      time a token behind 512 tokens, one sequence
    decode 16     the same for 16 sequences at once, behind 32 tokens
    candidates    16 completions of one prompt of 512 tokens, to 16 tokens each
    context       time a token behind 1K, 8K and 32K tokens with bfloat16 and int8 keys and values (the cache holds
                  random numbers: reading it costs the same)

In the bfloat16 process both sides share the very same tensors. int8 and int4 run in processes of their own, in turn
with it, because the three do not fit in memory together. Reading speed is measured in each process before and after;
the roofline is the speed at which the bytes that a step has to read could be read. A few layers (the default is 4)
fit partly in large caches: such a run is for a quick look; ``--layers 40`` is the model. The last line is one JSON
object; 40 layers in all formats are also written to benchmarks/results/decode.json.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from openzaya.infer.cpu_runner import CpuRunner
from openzaya.infer.engine import Engine
from openzaya.infer.outputs import Delta
from openzaya.infer.runner import BLOCK_TOKENS, StepResult, StepSequence, block_bytes, slot_bytes
from openzaya.infer.sampling import SamplingParams
from openzaya.kernels import build
from openzaya.kernels.host import empty_in_large_pages
from openzaya.model.config import ZayaConfig, preset
from openzaya.model.quantised import QuantisedMatrix, QuantScheme, prepare_quantised
from openzaya.model.transformer import Zaya

RESULTS = Path(__file__).parent / "results"
PROMPT, SHORT_PROMPT, BATCH, NEW_TOKENS = 512, 32, 16, 16
CONTEXTS = (1024, 8192, 32768)
FORMATS = ("bf16", "int8", "int4")


# --- models ---------------------------------------------------------------------------------------


def fill(name: str, tensor: Tensor, numbers: Tensor) -> None:
    """Random weights, repeated where the tensor is longer than the stock of them; vectors neutral."""
    flat = tensor.view(-1)
    if name.endswith(("norm.weight", "_scale", "layernorm.weight", "temp")):
        flat.fill_(1)
    elif name.endswith(("bias", "biases")):
        flat.zero_()
    else:
        for begin in range(0, flat.numel(), numbers.numel()):
            part = flat[begin : begin + numbers.numel()]
            part.copy_(numbers[: part.numel()])


def our_model(config: ZayaConfig, format: str, shared: dict[str, Tensor] | None = None) -> Zaya:
    """A model with random weights, quantised or in bfloat16, or on the tensors of another one."""
    with torch.device("meta"):
        model = Zaya(config).to(torch.bfloat16)
        if format != "bf16":
            prepare_quantised(model, QuantScheme.parse(format))
    generator = torch.Generator().manual_seed(0)
    numbers = (torch.randn(1 << 24, generator=generator) * 0.02).to(torch.bfloat16)
    codes = torch.randint(0, 256, (1 << 24,), generator=generator, dtype=torch.uint8)
    state: dict[str, Tensor] = {}
    for name, meta in model.state_dict().items():
        if shared is not None and name in shared:
            state[name] = shared[name]
            continue
        if name == "model.embed_tokens.weight" and format != "bf16":
            state[name] = mapped_table(meta.shape, numbers)
            continue
        state[name] = empty_in_large_pages(*meta.shape, dtype=meta.dtype)
        if name.endswith(".scales"):
            state[name].fill_(0.02 / 60 if meta.dtype == torch.float32 else 0.02 / 4)
        else:
            fill(name, state[name], codes if name.endswith(".packed") else numbers)
    model.load_state_dict(state, assign=True)
    return model.eval()


def mapped_table(shape: torch.Size, numbers: Tensor) -> Tensor:
    """The embedding table in a file, as a quantised checkpoint has it: memory holds the rows that are used."""
    file = Path(tempfile.gettempdir()) / f"openzaya-decode-{shape[0]}x{shape[1]}.bin"
    size = shape.numel()
    if not file.exists() or file.stat().st_size != 2 * size:
        with file.open("wb") as writing:
            for begin in range(0, size, numbers.numel()):
                writing.write(numbers[: size - begin].view(torch.uint8).numpy())
    return torch.from_file(str(file), shared=False, size=size, dtype=torch.bfloat16).view(shape)


def peer_model(config: ZayaConfig) -> Any:
    """transformers' model in bfloat16 with random weights and experts drawn uniformly."""
    import transformers
    from transformers.models.zaya import modeling_zaya

    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    names += ("num_experts", "moe_intermediate_size", "router_hidden_size", "eos_token_id", "max_position_embeddings")
    theirs = transformers.ZayaConfig(**{name: getattr(config, name) for name in names})
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            theirs, attn_implementation="sdpa", experts_implementation="grouped_mm"
        )
    torch.set_default_dtype(torch.float32)
    numbers = (torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)) * 0.02).to(torch.bfloat16)
    state: dict[str, Tensor] = {}
    for name, meta in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        wanted = torch.float32 if name.endswith("balancing_biases") else torch.bfloat16
        state[name] = empty_in_large_pages(*meta.shape, dtype=wanted)
        fill(name, state[name], numbers)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True, strict=False)
    model.model.rotary_emb = modeling_zaya.ZayaRotaryEmbedding(theirs)
    draw = torch.Generator().manual_seed(1)

    def forward(self: Any, hidden_states: Tensor, router_states: Tensor | None = None) -> tuple[Tensor, ...]:
        # The library's own router with another choice at the end.
        states = self.down_proj(hidden_states)
        if self.use_eda and router_states is not None:
            states = states + router_states * self.router_states_scale
        logits = self.router_mlp(states)
        shares = torch.softmax(logits, dim=-1)
        choice = torch.randint(0, self.num_experts, (*shares.shape[:2], 1), generator=draw)
        gates = shares.gather(2, choice)
        return logits.flatten(0, 1), gates.reshape(-1, 1), choice.reshape(-1, 1), states.clone()

    modeling_zaya.ZayaRouter.forward = forward
    return model.eval()


class UniformExperts(CpuRunner):
    """The runner with every token's experts drawn uniformly; the router runs all the same."""

    draw = torch.Generator().manual_seed(2)

    def step(self, sequences: Sequence[StepSequence]) -> StepResult:
        shape = (self.config.num_hidden_layers,)
        return super().step(
            [
                StepSequence(
                    s.tokens,
                    s.start,
                    s.slot,
                    s.blocks,
                    s.logits,
                    torch.randint(
                        0, self.config.num_experts, (len(s.tokens), *shape), generator=self.draw, dtype=torch.uint8
                    ),
                )
                for s in sequences
            ]
        )


# --- measuring ------------------------------------------------------------------------------------


def random_prompts(num: int, length: int, seed: int) -> list[list[int]]:
    return torch.randint(5, 200_000, (num, length), generator=torch.Generator().manual_seed(seed)).tolist()


def median_ms(seconds: Sequence[float]) -> float:
    return round(1e3 * statistics.median(seconds), 3)


def read_speed(tensor: Tensor) -> list[float]:
    """Bytes a second at which all threads read a tensor, three times."""
    library = build.inference().library
    assert library is not None
    library.cpu_read.restype = ctypes.c_double
    threads, size = torch.get_num_threads(), min(tensor.nbytes, 1 << 30)
    address, count = ctypes.c_void_p(tensor.data_ptr()), ctypes.c_int64(size)
    return [size / library.cpu_read(threads, address, count) for _ in range(3)]


def our_intervals(engine: Engine, prompts: list[list[int]], new_tokens: int) -> tuple[float, list[float]]:
    """Time to the first token of all, and the times between the last prompt's tokens once all are running."""
    params = SamplingParams(temperature=0, max_new_tokens=new_tokens, ignore_eos=True)
    times: list[list[float]] = [[] for _ in prompts]
    ended = threading.Semaphore(0)

    def watch(index: int) -> Callable[[Any], None]:
        def on_delta(piece: Any) -> None:
            if isinstance(piece, Delta):
                times[index].append(time.perf_counter())
                if piece.finish_reason is not None:
                    ended.release()

        return on_delta

    start = time.perf_counter()
    for index, prompt in enumerate(prompts):
        engine.submit(prompt, params, on_delta=watch(index))
    for _ in prompts:
        ended.acquire()
    last = times[-1]
    first = max(moments[0] for moments in times)
    steady = [moment for moment in last if moment >= first]
    return first - start, [after - before for before, after in itertools.pairwise(steady)]


def our_round(config: ZayaConfig, format: str, model: Zaya, seed: int) -> dict[str, float]:
    """One round through the engine."""
    blocks = PROMPT // BLOCK_TOKENS + 3 * BATCH  # candidates share those of their prompt
    runner = UniformExperts(model, blocks, BATCH)
    with Engine(model, runner=runner, max_running=BATCH) as engine:
        our_intervals(engine, random_prompts(1, 64, seed + 1), 2)  # warm
        first, intervals = our_intervals(engine, random_prompts(1, PROMPT, seed + 2), 1 + NEW_TOKENS)
        _, batched = our_intervals(engine, random_prompts(BATCH, SHORT_PROMPT, seed + 3), 4 + NEW_TOKENS)
        start = time.perf_counter()
        # Random weights give flat distributions, which no real model has and sampling is slow with: both sides take
        # the most likely token.
        params = SamplingParams(temperature=0, max_new_tokens=NEW_TOKENS, ignore_eos=True)
        engine.generate(random_prompts(1, PROMPT, seed + 4), params, n=BATCH)
        candidates = time.perf_counter() - start
    return {
        "prefill_ms": round(1e3 * first, 3),
        "decode_1_ms": median_ms(intervals),
        "decode_16_ms": median_ms(batched),
        "candidates_ms": round(1e3 * candidates, 3),
    }


@torch.inference_mode()
def peer_round(model: Any, seed: int) -> dict[str, float]:
    """The same with transformers."""

    def run(prompts: list[list[int]], steps: int) -> tuple[float, list[float]]:
        ids, times = torch.tensor(prompts), [time.perf_counter()]
        output = model(ids, use_cache=True, logits_to_keep=1)
        for _ in range(steps):
            token = output.logits[:, -1:].argmax(-1)
            times.append(time.perf_counter())
            output = model(token, past_key_values=output.past_key_values, use_cache=True)
        output.logits[:, -1:].argmax(-1)
        times.append(time.perf_counter())
        return times[1] - times[0], [after - before for before, after in itertools.pairwise(times[1:])]

    run(random_prompts(1, 64, seed + 1), 1)  # warm
    first, intervals = run(random_prompts(1, PROMPT, seed + 2), NEW_TOKENS)
    _, batched = run(random_prompts(BATCH, SHORT_PROMPT, seed + 3), NEW_TOKENS // 2)
    start = time.perf_counter()
    run(random_prompts(1, PROMPT, seed + 4) * BATCH, NEW_TOKENS - 1)
    return {
        "prefill_ms": round(1e3 * first, 3),
        "decode_1_ms": median_ms(intervals),
        "decode_16_ms": median_ms(batched),
        "candidates_ms": round(1e3 * (time.perf_counter() - start), 3),
    }


def context_round(config: ZayaConfig, model: Zaya, seed: int) -> dict[str, float]:
    """Time a token at several lengths of the context and both types of keys and values, all of them in turn."""
    num_blocks = max(CONTEXTS) // BLOCK_TOKENS + 1
    blocks = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed)).tolist()
    runners = {}
    for dtype in ("bfloat16", "int8"):
        runners[dtype] = runner = UniformExperts(model, num_blocks, 1, cache_dtype=dtype)
        for store in (runner.keys, runner.values):
            store.random_(0, 127) if dtype == "int8" else store.fill_(0.1)
        runner.key_scales.fill_(0.01)
        runner.value_scales.fill_(0.01)
    times: dict[str, list[float]] = {f"{dtype}_{context}_ms": [] for dtype in runners for context in CONTEXTS}
    for step in range(12):
        for dtype, runner in runners.items():
            for context in CONTEXTS:
                start = time.perf_counter()
                runner.step([StepSequence([7], context + step, 0, blocks)])
                times[f"{dtype}_{context}_ms"].append(time.perf_counter() - start)
    return {key: median_ms(values) for key, values in times.items()}


def one_round(config: ZayaConfig, format: str, seed: int) -> dict[str, Any]:
    """What a child process does: one round of one format."""
    peer = peer_model(config) if format == "bf16" else None
    model = our_model(config, format, None if peer is None else dict(peer.state_dict()))
    region = model.model.embed_tokens.weight
    region = model.lm_head.packed if isinstance(model.lm_head, QuantisedMatrix) else region
    result: dict[str, Any] = {"read_bytes_s": read_speed(region)}
    if peer is not None:
        result["peer"] = peer_round(peer, seed)
        result["read_bytes_s"] += read_speed(region)
    result["ours"] = our_round(config, format, model, seed)
    result["read_bytes_s"] += read_speed(region)
    result["peak_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if format == "int8":
        result["context"] = context_round(config, model, seed)
    result["bytes_a_token"] = bytes_a_step(config, model, 1)
    result["bytes_16_tokens"] = bytes_a_step(config, model, BATCH)
    return result


def bytes_a_step(config: ZayaConfig, model: Zaya, batch: int) -> float:
    """Weights that a decoding step reads: all but the embedding table, and of the experts those that are visited."""
    stacks = others = 0
    for name, tensor in model.state_dict().items():
        if ".experts." in name:
            stacks += tensor.nbytes
        elif name != "model.embed_tokens.weight" or model.lm_head is None:
            others += tensor.nbytes
    visited = 1 - (1 - 1 / config.num_experts) ** batch
    return others + stacks * visited


# --- the whole run --------------------------------------------------------------------------------


def summarise(rounds: dict[str, list[dict[str, Any]]], config: ZayaConfig) -> dict[str, Any]:
    """Medians over rounds, ratios to transformers, and the roofline beside each time a token."""

    def medians(records: list[dict[str, float]]) -> dict[str, float]:
        return {key: statistics.median(record[key] for record in records) for key in records[0]}

    summary: dict[str, Any] = {}
    if "bf16" in rounds:
        summary["transformers"] = medians([entry["peer"] for entry in rounds["bf16"]])
    for format, entries in rounds.items():
        ours: dict[str, Any] = medians([entry["ours"] for entry in entries])
        # Medians on both sides: of the times a token, and of the readings around them.
        speed = statistics.median(statistics.median(entry["read_bytes_s"]) for entry in entries)
        ours["read_gb_s"] = speed / 1e9
        ours["roofline_1_ms"] = 1e3 * entries[0]["bytes_a_token"] / speed
        ours["roofline_16_ms"] = 1e3 * entries[0]["bytes_16_tokens"] / speed
        # Each round's own reading speed: the machine is not equally fast at all times.
        shares = [
            1e3 * entry["bytes_a_token"] / statistics.median(entry["read_bytes_s"]) / entry["ours"]["decode_1_ms"]
            for entry in entries
        ]
        ours["share_of_read_speed_1"] = statistics.median(shares)
        ours["peak_gb"] = statistics.median(entry["peak_bytes"] for entry in entries) / 1e9
        if "transformers" in summary:
            keys = ("prefill_ms", "decode_1_ms", "decode_16_ms", "candidates_ms")
            ours["ratios"] = {key[:-3]: summary["transformers"][key] / ours[key] for key in keys}
        if "context" in entries[0]:
            ours["context"] = medians([entry["context"] for entry in entries])
            ours["context_growth"] = context_growth(config, ours["context"], entries[0]["bytes_a_token"])
        summary[format] = ours
    return summary


def context_growth(config: ZayaConfig, times: dict[str, float], weights: float) -> dict[str, list[float]]:
    """From 1K to each longer context: how many times longer a token takes, and how many times more bytes it reads."""
    result = {}
    for dtype in ("bfloat16", "int8"):
        of_token = (block_bytes(config, getattr(torch, dtype)) - slot_bytes(config)) / BLOCK_TOKENS
        for context in CONTEXTS[1:]:
            slower = times[f"{dtype}_{context}_ms"] / times[f"{dtype}_{CONTEXTS[0]}_ms"]
            more = (weights + of_token * context) / (weights + of_token * CONTEXTS[0])
            result[f"{dtype}_{context}"] = [slower, more]
    return result


def table(summary: dict[str, Any]) -> str:
    lines = [f"{'':<14}{'prefill 512':>16}{'decode 1':>22}{'decode 16':>22}{'16 candidates':>18}{'peak':>9}"]
    for name, row in summary.items():
        ratios = row.get("ratios", {})

        def cell(key: str, tokens: int, roof: str = "", row: Any = row, ratios: Any = ratios) -> str:
            text = f"{1e3 * tokens / row[key + '_ms']:.1f}/s"
            if roof in row:
                text += f" (of {1e3 * tokens / row[roof]:.0f})"
            return text + (f" {ratios[key]:.2f}x" if key in ratios else "")

        peak = f"{row['peak_gb']:.1f} GB" if "peak_gb" in row else ""
        candidates = f"{row['candidates_ms'] / 1e3:.1f} s" + (f" {ratios['candidates']:.1f}x" if ratios else "")
        lines.append(
            f"{name:<14}{cell('prefill', PROMPT):>16}{cell('decode_1', 1, 'roofline_1_ms'):>22}"
            f"{cell('decode_16', BATCH, 'roofline_16_ms'):>22}{candidates:>18}{peak:>9}"
        )
    lines.append("tokens a second; in brackets what the measured reading speed would allow; x: times transformers")
    for name, row in summary.items():
        if "share_of_read_speed_1" in row:
            share = row["share_of_read_speed_1"]
            lines.append(f"{name}: reads {row['read_gb_s']:.1f} GB/s; one sequence reaches {share:.0%} of it")
        for key, (slower, more) in row.get("context_growth", {}).items():
            dtype, context = key.split("_")
            lines.append(f"  {dtype} cache, {context} tokens: {slower:.2f}x the time of 1024, {more:.2f}x the bytes")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent)
    return {
        "date": datetime.date.today().isoformat(),
        "commit": git.stdout.strip(),
        "processor": processor or platform.processor(),
        "tier": build.inference_tier(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": __import__("transformers").__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    parser.add_argument("--only", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--quick", action="store_true", help="2 layers, one round")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    parser.add_argument("--child", choices=FORMATS, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    layers, num_rounds = (2, 1) if arguments.quick else (arguments.layers, arguments.rounds)
    config = preset("zaya1-8b").with_changes(num_hidden_layers=layers)
    if arguments.child:
        print(json.dumps(one_round(config, arguments.child, arguments.seed)))
        return
    rounds: dict[str, list[dict[str, Any]]] = {format: [] for format in arguments.only}
    for index in range(num_rounds):
        for format in arguments.only:
            command = [sys.executable, __file__, "--child", format, "--seed", str(10 * index)]
            command += ["--layers", str(layers), "--threads", str(arguments.threads)]
            output = subprocess.run(command, capture_output=True, text=True)
            if output.returncode:
                sys.exit(f"the {format} process failed:\n{output.stderr[-2000:]}")
            rounds[format].append(json.loads(output.stdout.splitlines()[-1]))
            if not arguments.json:
                print(f"round {index + 1}/{num_rounds} {format}: {rounds[format][-1]['ours']}", file=sys.stderr)
    summary = summarise(rounds, config)
    result = {"layers": layers, "rounds": num_rounds, **machine(), "summary": summary, "all_rounds": rounds}
    if not arguments.json:
        print(table(summary))
    if layers == 40 and len(arguments.only) == len(FORMATS):
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "decode.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "all_rounds"}))


if __name__ == "__main__":
    main()
