"""What the model calls: the kernels as differentiable functions, fp32 on the CPU.

Each function computes what its plain twin in openzaya/model computes; callers ask :func:`suits` first and take
the twin where it says no (other dtypes and devices, no compiler, too few tokens to pay). Backward passes are
written by hand: they keep little and recompute what is cheap. They cannot be differentiated again, and say so.
"""

from __future__ import annotations

from openzaya.kernels.attention import attend, cca_mix, suits_attention
from openzaya.kernels.calls import disabled, suits
from openzaya.kernels.dense import cross_entropy, embedding, linear, merge, rms_norm
from openzaya.kernels.experts import experts

__all__ = [
    "attend",
    "cca_mix",
    "cross_entropy",
    "disabled",
    "embedding",
    "experts",
    "linear",
    "merge",
    "rms_norm",
    "suits",
    "suits_attention",
]
