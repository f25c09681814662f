"""OpenZAYA: the ZAYA1 system, open and runnable from one repository.

An independent implementation of the architecture in arXiv 2605.05365, not affiliated with Zyphra.

    model = openzaya.load("path/or/hub-id")
    logits = model(tokens)                     # int64 (B, T) -> fp32 (B, T, V)
    openzaya.save(model, "directory", layout="native")
    result = await openzaya.markovian_rsa("How many ...?", openzaya.EngineCompleter(engine), openzaya.RSAConfig(n=8))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from openzaya.errors import EngineError, OpenZayaError, QueueFull, RSAError
    from openzaya.infer.engine import Engine, EngineStats
    from openzaya.infer.generate import generate
    from openzaya.infer.outputs import Completion, Delta, RequestOutput, TokenLogprob
    from openzaya.infer.sampling import SamplingParams
    from openzaya.model.config import ZayaConfig, preset
    from openzaya.model.hf import convert, inspect, load, save
    from openzaya.model.transformer import ForwardRecord, Zaya
    from openzaya.ttc.config import RSAConfig
    from openzaya.ttc.endpoint import EndpointCompleter
    from openzaya.ttc.engine_completer import EngineCompleter
    from openzaya.ttc.results import RSAResult
    from openzaya.ttc.rsa import markovian_rsa

_HOMES = {
    "EngineError": "openzaya.errors",
    "OpenZayaError": "openzaya.errors",
    "QueueFull": "openzaya.errors",
    "RSAError": "openzaya.errors",
    "Engine": "openzaya.infer.engine",
    "EngineStats": "openzaya.infer.engine",
    "generate": "openzaya.infer.generate",
    "Completion": "openzaya.infer.outputs",
    "Delta": "openzaya.infer.outputs",
    "RequestOutput": "openzaya.infer.outputs",
    "TokenLogprob": "openzaya.infer.outputs",
    "SamplingParams": "openzaya.infer.sampling",
    "ZayaConfig": "openzaya.model.config",
    "preset": "openzaya.model.config",
    "convert": "openzaya.model.hf",
    "inspect": "openzaya.model.hf",
    "load": "openzaya.model.hf",
    "save": "openzaya.model.hf",
    "ForwardRecord": "openzaya.model.transformer",
    "Zaya": "openzaya.model.transformer",
    "EndpointCompleter": "openzaya.ttc.endpoint",
    "EngineCompleter": "openzaya.ttc.engine_completer",
    "RSAConfig": "openzaya.ttc.config",
    "RSAResult": "openzaya.ttc.results",
    "markovian_rsa": "openzaya.ttc.rsa",
}

__all__ = [
    "Completion",
    "Delta",
    "EndpointCompleter",
    "Engine",
    "EngineCompleter",
    "EngineError",
    "EngineStats",
    "ForwardRecord",
    "OpenZayaError",
    "QueueFull",
    "RSAConfig",
    "RSAError",
    "RSAResult",
    "RequestOutput",
    "SamplingParams",
    "TokenLogprob",
    "Zaya",
    "ZayaConfig",
    "__version__",
    "convert",
    "generate",
    "inspect",
    "load",
    "markovian_rsa",
    "preset",
    "save",
]


def __getattr__(name: str) -> Any:
    # Imported on first use: `openzaya --help` must not wait for torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'openzaya' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
