"""What running a model here would take: memory by part, whether it fits, speed, download and quantising.

The bytes come from costs.py, the machine's side from facts.py. Speeds are what memory bandwidth allows, times the share
of it that the kernels are expected to reach; quantising time is extrapolated from a small matrix quantised here.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from openzaya.errors import CheckpointError, ConfigError
from openzaya.infer.setup import SHARE_OF_MEMORY
from openzaya.machine.costs import PROGRAM_BYTES, Costs, costs_of
from openzaya.machine.facts import Machine
from openzaya.machine.sizes import bytes_text, seconds_text, tokens_text
from openzaya.model.config import PRESETS, ZayaConfig
from openzaya.model.hf_config import layout_of_config, read_config
from openzaya.model.hf_quantised import read_scheme
from openzaya.model.hf_survey import empty_model
from openzaya.model.quantised import QuantisedMatrix, QuantScheme, quantised_slots

KERNEL_SHARE = 0.85
"""Share of the bandwidth that decoding with kernels is expected to use; ``benchmarks/decode.py`` measures it."""
PYTORCH_SHARE = 0.4
"""The same for plain PyTorch with float weights: about sixty small operations a layer stand between the reads."""
SMALL_STEP_BYTES = 128e6
_HUB_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*/[A-Za-z0-9_][A-Za-z0-9._-]*")
DOWNLOAD_BITS_PER_SECOND = 100e6
"""An assumption to set sizes against; it is written beside the time."""


@dataclass(frozen=True)
class Source:
    """The model to plan for."""

    name: str
    config: ZayaConfig
    dtype: torch.dtype
    """Of the weights as stored; of those in float, if quantised."""
    scheme: QuantScheme | None = None
    """How the checkpoint is quantised already."""
    must_download: bool = True


@dataclass(frozen=True)
class Speed:
    """Tokens a second, all sequences together, from one batch size on."""

    batch: int
    context: int
    """Tokens already in each sequence."""
    step_bytes: float
    ceiling: float
    """If reading memory were all."""
    expected: float | None
    """None where it was never measured: quantised weights without kernels."""


@dataclass(frozen=True)
class Plan:
    """Sizes in bytes."""

    model: str
    quantise: str
    context: int
    batch: int
    cache_dtype: str
    weights: dict[str, int]
    """By kind, as held in memory."""
    table: int
    """The embedding table in its mapped file, not counted into the peak."""
    cache: int
    state: int
    activations: int
    program: int
    peak: int
    available: int | None
    """Memory that is free now."""
    total: int | None
    fits: bool | None
    remedies: tuple[str, ...]
    bandwidth: float
    speeds: tuple[Speed, ...]
    download: int
    download_seconds: float
    disk: int
    """Download and quantised copy."""
    disk_free: int | None
    quantise_seconds: float | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for ``json.dumps``."""
        return asdict(self)


def find_model(name: str) -> Source:
    """A preset, a checkpoint directory, or a hub id, of which only config.json is fetched.

    Raises:
        CheckpointError, ConfigError: none of the three, or a configuration that cannot be read.
    """
    path = Path(name).expanduser()
    if name in PRESETS and not path.is_dir():
        return Source(name, PRESETS[name], torch.bfloat16)
    if path.is_dir():
        config_path, is_local = path / "config.json", True
        if not config_path.is_file():
            raise CheckpointError(f"{path}: config.json is missing; pass a checkpoint directory")
    elif _HUB_ID.fullmatch(name) and not path.exists():
        config_path, is_local = _fetch_config(name), False
    else:
        raise ConfigError(
            f"model '{name}' is no directory, no hub id (owner/name) and no preset ({', '.join(PRESETS)}); give one"
        )
    try:
        raw = json.loads(config_path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{config_path}: cannot be read as JSON ({error}); take an intact checkpoint") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{config_path}: holds no JSON object; take an intact checkpoint")
    config = read_config(raw, layout_of_config(raw))
    dtypes = {"float32": torch.float32, "float16": torch.float16}
    dtype = dtypes.get(str(raw.get("dtype", raw.get("torch_dtype"))), torch.bfloat16)
    return Source(name, config, dtype, read_scheme(raw), must_download=not is_local)


def make_plan(
    source: Source,
    machine: Machine,
    *,
    quantise: str | None = None,
    context: int | None = None,
    batch: int = 1,
    cache_dtype: str = "auto",
    weights_per_second: float | None = None,
) -> Plan:
    """The plan for ``batch`` sequences of up to ``context`` tokens each (None: at most 8,192).

    Args:
        cache_dtype: of keys and values: auto (as the weights in float), float32, bfloat16 or int8.
        quantise: a scheme such as ``int4``; None keeps the weights as stored.
        weights_per_second: rate of quantising; None measures it, which takes a moment.

    Raises:
        ConfigError: a context beyond the model, a checkpoint that is quantised already, an unknown scheme or type.
    """
    config = source.config
    limit = config.max_position_embeddings
    context = min(8192, limit) if context is None else context
    if not 1 <= context <= limit:
        raise ConfigError(f"context={context}, but {source.name} has positions for 1 to {limit} tokens; lower it")
    if batch < 1:
        raise ConfigError(f"batch={batch}, expected at least 1")
    if quantise is not None and source.scheme is not None:
        raise ConfigError(f"{source.name} is quantised already ({source.scheme}); leave --quantize out")
    scheme = source.scheme if quantise is None else QuantScheme.parse(quantise)
    costs = costs_of(config, scheme, source.dtype, _cache_type(cache_dtype, source.dtype))
    peak = costs.peak_bytes(context, batch)
    available, total = machine.memory.available, machine.memory.total
    known = total if available is None else available
    fits = None if known is None else peak <= known

    original = costs_of(config, source.scheme, source.dtype)
    makes_copy = quantise is not None
    download = original.file_bytes if source.must_download else 0
    quantise_seconds = None
    if makes_copy and scheme is not None:
        rate = weights_per_second or quantising_rate("int4" if "int4" in str(scheme) else "int8")
        quantise_seconds = num_quantised_weights(config, scheme) / rate
    return Plan(
        model=source.name,
        quantise=str(scheme) if scheme is not None else str(source.dtype).removeprefix("torch."),
        context=context,
        batch=batch,
        cache_dtype=str(costs.cache_dtype).removeprefix("torch."),
        weights={weight.kind: weight.num_bytes for weight in costs.weights if not weight.is_table},
        table=costs.file_bytes - costs.weight_bytes,
        cache=costs.cache_bytes(context, batch),
        state=costs.state_bytes(batch),
        activations=costs.activation_bytes(batch),
        program=PROGRAM_BYTES,
        peak=peak,
        available=available,
        total=total,
        fits=fits,
        remedies=() if fits is not False or known is None else _remedies(source, costs, scheme, context, batch, known),
        bandwidth=machine.read_bandwidth,
        speeds=_speeds(costs, machine, scheme, context, batch),
        download=download,
        download_seconds=8 * download / DOWNLOAD_BITS_PER_SECOND,
        disk=download + (costs.file_bytes if makes_copy else 0),
        disk_free=machine.cache_free_bytes,
        quantise_seconds=quantise_seconds,
        notes=_notes(machine, costs, scheme, context, batch),
    )


def expected_speed(costs: Costs, machine: Machine, is_quantised: bool, context: int, batch: int) -> Speed:
    """Decoding speed with ``context`` tokens in each of ``batch`` sequences."""
    ceiling = costs.tokens_per_second(context, batch, machine.read_bandwidth)
    share: float | None = KERNEL_SHARE
    if not kernels_run(costs.config, machine):
        share = None if is_quantised else PYTORCH_SHARE
    return Speed(batch, context, costs.step_bytes(context, batch), ceiling, None if share is None else share * ceiling)


def kernels_run(config: ZayaConfig, machine: Machine) -> bool:
    """Whether the inference kernels are there and know this architecture."""
    return machine.inference_kernels.built and config.is_released_architecture


def num_quantised_weights(config: ZayaConfig, scheme: QuantScheme) -> int:
    """Weights that quantising has to go through."""
    return sum(slot.num_weights for slot in quantised_slots(empty_model(config), scheme))


def quantising_rate(format: Literal["int8", "int4"]) -> float:
    """Weights a second that this machine quantises, from one matrix of four million; the better of two rounds."""
    weights = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0))
    best = float("inf")
    for _ in range(2):
        start = time.perf_counter()
        QuantisedMatrix.from_matrix(weights, format)
        best = min(best, time.perf_counter() - start)
    return weights.numel() / best


def plan_text(plan: Plan) -> str:
    """The plan for people."""
    lines = [
        f"{plan.model}, {plan.quantise} weights; {plan.batch} x {tokens_text(plan.context)} tokens, "
        f"keys and values in {plan.cache_dtype}",
        "",
        "memory",
    ]
    rows = [(f"weights, {kind}", size) for kind, size in plan.weights.items()]
    rows += [("keys and values", plan.cache), ("CCA state", plan.state), ("activations, about", plan.activations)]
    rows += [("program, about", plan.program), ("together", plan.peak)]
    lines += [f"  {name:<22}{bytes_text(size):>10}" for name, size in rows]
    if plan.table:
        lines.append(f"  {'embedding table':<22}{bytes_text(plan.table):>10}  in its file; a token reads one row")
    lines += ["", _verdict(plan), *(f"  - {remedy}" for remedy in plan.remedies)]
    lines += ["", f"speed, at {bytes_text(plan.bandwidth)}/s read from memory (measured)"]
    lines.append(f"  {'batch':>5}  {'tokens so far':>13}  {'read a step':>11}  {'at most':>9}  expected")
    for speed in plan.speeds:
        expected = "unknown" if speed.expected is None else f"{speed.expected:.3g} tokens/s"
        lines.append(
            f"  {speed.batch:>5}  {tokens_text(speed.context):>13}  {bytes_text(speed.step_bytes):>11}  "
            f"{speed.ceiling:>9.3g}  {expected}"
        )
    work = []
    if plan.download:
        rate = f"{DOWNLOAD_BITS_PER_SECOND / 1e6:.0f} Mbit/s"
        work.append(f"  download   {bytes_text(plan.download)}, {seconds_text(plan.download_seconds)} at {rate}")
    if plan.quantise_seconds is not None:
        work.append(f"  quantise   about {seconds_text(plan.quantise_seconds)}, once")
    if plan.disk:
        free = "" if plan.disk_free is None else f" ({bytes_text(plan.disk_free)} free in the cache directory)"
        work.append(f"  disk       {bytes_text(plan.disk)}{free}")
    lines += ["", "before the first start", *work] if work else []
    lines += ["", *(f"note: {note}" for note in plan.notes)] if plan.notes else []
    return "\n".join(lines)


def _cache_type(name: str, dtype: torch.dtype) -> torch.dtype:
    types = {"auto": dtype, "float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
    if name not in types:
        raise ConfigError(f"cache dtype '{name}' is unknown; choose one of: {', '.join(types)}")
    return types[name]


def _speeds(costs: Costs, machine: Machine, scheme: QuantScheme | None, context: int, batch: int) -> tuple[Speed, ...]:
    batches, contexts = sorted({1, batch}), sorted({min(1024, context), context})
    return tuple(expected_speed(costs, machine, scheme is not None, n, b) for b in batches for n in contexts)


def _remedies(
    source: Source, costs: Costs, scheme: QuantScheme | None, context: int, batch: int, memory: int
) -> tuple[str, ...]:
    """Changes after which it fits, the gentlest first."""
    found = []
    for name, changed in _variants(source, costs, scheme):
        if changed.peak_bytes(context, batch) <= memory:
            found.append(f"{name}: {bytes_text(changed.peak_bytes(context, batch))}")
    for name, changed in [("these weights", costs), *_variants(source, costs, scheme)]:
        fewer, shorter = changed.largest_batch(context, memory), changed.largest_context(batch, memory)
        whole_blocks = shorter // 64 * 64 or shorter
        if 0 < fewer < batch:
            found.append(f"{name} with --batch {fewer}")
        if 0 < whole_blocks < context:
            found.append(f"{name} with --context {whole_blocks}")
        if found:
            return tuple(found)
    return ("not even one sequence of one token fits; take a smaller model or a machine with more memory",)


def _variants(source: Source, costs: Costs, scheme: QuantScheme | None) -> list[tuple[str, Costs]]:
    schemes: list[tuple[str, QuantScheme | None]] = [("", scheme)]
    if source.scheme is None:
        names = [name for name in ("int8", "int4") if scheme is None or (name == "int4" and name not in str(scheme))]
        schemes += [(f"--quantize {name}", QuantScheme.parse(name)) for name in names]
    result = []
    for name, chosen in schemes:
        for cache in dict.fromkeys((costs.cache_dtype, torch.int8)):
            words = [name] if name else []
            words += ["--cache-dtype int8"] if cache != costs.cache_dtype else []
            if words:
                result.append((" ".join(words), costs_of(source.config, chosen, source.dtype, cache)))
    return result


def _notes(machine: Machine, costs: Costs, scheme: QuantScheme | None, context: int, batch: int) -> tuple[str, ...]:
    notes = []
    if costs.step_bytes(0, 1) < SMALL_STEP_BYTES:
        notes.append("so small a model stays in the processor's caches: the speeds above do not hold for it")
    if not kernels_run(costs.config, machine):
        why = "no inference kernels" if not machine.inference_kernels.built else "no kernels for an ablation variant"
        cost = "quantised weights are slower than float ones then" if scheme else "about half the speed"
        notes.append(f"{why}, so PyTorch runs the model ({cost}); see 'openzaya doctor'")
    memory, peak, cache = machine.memory, costs.peak_bytes(context, batch), costs.cache_bytes(context, batch)
    if memory.available is not None and memory.total is not None and memory.available < peak <= memory.total:
        notes.append("it would fit if other programs gave their memory back")
    if memory.available is not None and peak <= memory.available < costs.weight_bytes + cache / SHARE_OF_MEMORY:
        notes.append(f"so many tokens need 'openzaya serve --cache-gb {cache / 1e9:.1f}': by default it takes less")
    return tuple(notes)


def _verdict(plan: Plan) -> str:
    if plan.fits is None:
        return "fits? unknown: this system does not say how much memory is free"
    free = plan.total if plan.available is None else plan.available
    return f"{'fits' if plan.fits else 'does NOT fit'}: {bytes_text(plan.peak)} of {bytes_text(free or 0)} free memory"


def _fetch_config(name: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json"))
    except Exception as error:  # the client raises its own, httpx and OS errors alike
        reason = (str(error).strip().splitlines() or [""])[0]
        raise CheckpointError(
            f"{name}: the hub could not give its config.json ({type(error).__name__}: {reason}); check the name, the "
            f"network and HF_TOKEN, or plan for a preset ({', '.join(PRESETS)})"
        ) from error
