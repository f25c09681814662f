"""What an engine is made of: the model with its tokenizer, and a runner with as much memory as it may have."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from openzaya.data.tokenizer import load_tokenizer
from openzaya.errors import ConfigError, DataError, EngineError
from openzaya.infer.blocks import num_blocks_for
from openzaya.infer.runner import BLOCK_TOKENS, CacheDtype, Runner, block_bytes, slot_bytes
from openzaya.infer.torch_runner import TorchRunner, resolve_cache_dtype
from openzaya.model import hf
from openzaya.model.hub import resolve
from openzaya.model.quantised import quantise_model
from openzaya.model.transformer import Zaya

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Backend = Literal["auto", "cpu", "torch"]
SHARE_OF_MEMORY = 0.5
"""Of the available memory, for the cache, where nothing is said."""


def load_model(
    path_or_model: str | os.PathLike[str] | Zaya,
    tokenizer: PreTrainedTokenizerFast | None,
    quantize: str | None,
    dtype: Any,
    device: str,
) -> tuple[Zaya, PreTrainedTokenizerFast | None]:
    """The model, quantised if asked for, and the tokenizer, which may be none."""
    if isinstance(path_or_model, Zaya):
        model = path_or_model
        if quantize is not None:
            model = quantise_model(copy.deepcopy(model), quantize)
        return model, tokenizer
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device '{device}' cannot be used here ({reason}); choose cpu, for example") from None
    path = resolve(os.fspath(path_or_model))
    # Reading weights from memory in large pages is faster than from a mapped file (docs/quantisation.md).
    model = hf.load(path, dtype=dtype, device=device, quantize=quantize, mapped=False)
    if tokenizer is None:
        try:
            tokenizer = load_tokenizer(path)
        except DataError:
            if (Path(path) / "tokenizer.json").exists():
                raise
    return model, tokenizer


def make_runner(
    model: Zaya,
    *,
    backend: Backend,
    cache_dtype: CacheDtype,
    cache_bytes: int | None,
    max_running: int,
    batch_invariant: bool,
) -> Runner:
    """The runner that suits; raises :class:`EngineError` where none does."""
    dtype = resolve_cache_dtype(cache_dtype, model)
    size = block_bytes(model.config, dtype)
    wanted = max_running * num_blocks_for(model.config.max_position_embeddings)
    free = int(available_bytes(model.device) * SHARE_OF_MEMORY)
    if max_running * slot_bytes(model.config) > free:
        raise EngineError(
            f"max_running={max_running:,} sequences need {max_running * slot_bytes(model.config):,} bytes for their "
            f"CCA states, and {free:,} may be used; lower max_running"
        )
    cache_bytes = free if cache_bytes is None else cache_bytes
    num_blocks = min(wanted, cache_bytes // size)
    if num_blocks < 1:
        raise EngineError(
            f"the cache may have {cache_bytes:,} bytes and one block of {BLOCK_TOKENS} tokens needs {size:,}; "
            "raise cache_bytes"
        )
    cpu_runner, reason = None, "backend='torch' was asked for"
    if backend != "torch":
        cpu_runner, reason = _find_cpu_runner(model)
        if backend == "cpu" and cpu_runner is None:
            raise EngineError(f"backend='cpu' cannot run this model: {reason}; choose backend='torch'")
    if cpu_runner is not None:
        return cpu_runner(model, num_blocks, max_running, cache_dtype=cache_dtype)
    return TorchRunner(model, num_blocks, max_running, cache_dtype, batch_invariant=batch_invariant)


def cache_bytes_for(model: Zaya, num_sequences: int, num_tokens: int, cache_dtype: CacheDtype = "auto") -> int:
    """Memory for so many sequences of so many tokens and a spare block each; at most the default's share of memory."""
    needed = (
        num_sequences
        * (num_blocks_for(num_tokens) + 1)
        * block_bytes(model.config, resolve_cache_dtype(cache_dtype, model))
    )
    return min(needed, int(available_bytes(model.device) * SHARE_OF_MEMORY))


def _find_cpu_runner(model: Zaya) -> tuple[Any, str]:
    """The kernels' runner, or None and why not."""
    try:
        from openzaya.infer.cpu_runner import CpuRunner
    except ImportError as error:
        return None, str(error)
    reason = CpuRunner.supports(model)
    return (CpuRunner, "") if reason is None else (None, reason)


def available_bytes(device: torch.device) -> int:
    """Memory that can still be used on a device, as far as it can be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, ValueError, OSError):
        return 4 * 2**30
