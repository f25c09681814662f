"""The router: which expert each token goes to, and how much its output counts (arXiv 2605.05365).

    r_l = W_down h + b_down;  for l > 0:  r_l <- r_l + gamma_l * r_(l-1)      Exponential Depth Averaging (EDA)
    s   = softmax(W3 gelu(W2 gelu(W1 RMSNorm(r) + b1) + b2))                   over E experts and the skip class
    choice = argmax(stopgrad(s) + b),  gate = s[choice]                        top-1, gate not renormalised

b are the balancing biases (balancing.py), a buffer in fp32 at any model dtype. Class E is *skip*: its output
is 0. r_l is passed on before the norm. Kinds: ``mlp+eda`` (ZAYA), ``mlp`` (without EDA), ``linear``.

Shape suffixes: N tokens, D hidden, R router width, E experts, X = E + 1 classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openzaya.model.config import ZayaConfig
from openzaya.model.layers import Linear, RMSNorm, at_least_float

SKIP_BIAS = -1.0
"""The skip class's balancing bias: fixed, and low enough that it cannot win once some expert's bias is positive."""


@dataclass(frozen=True)
class Route:
    """Where N tokens go in one layer."""

    choice_N: Tensor
    """int64 expert index; E is the skip class."""
    gate_N: Tensor
    """fp32 softmax share of the choice, 0 for the skip class."""
    shares_NX: Tensor
    """fp32 softmax over all classes."""


class RouterMLP(nn.Module):
    """RMSNorm and three layers with exact GELU; (N, R) to logits (N, X)."""

    def __init__(self, config: ZayaConfig):
        super().__init__()
        width = config.router_hidden_size
        self.norm = RMSNorm(width, config.rms_norm_eps)
        self.fc1 = Linear(width, width, bias=True)
        self.fc2 = Linear(width, width, bias=True)
        self.out_proj = Linear(width, config.num_router_classes)

    def forward(self, state_NR: Tensor) -> Tensor:
        return self.out_proj(F.gelu(self.fc2(F.gelu(self.fc1(self.norm(state_NR))))))


class Router(nn.Module):
    """Base of all kinds: subclasses turn hidden states into logits, this class decides."""

    balancing_biases: Tensor

    def __init__(self, config: ZayaConfig):
        super().__init__()
        self.register_buffer("balancing_biases", torch.empty(config.num_router_classes, dtype=torch.float32))
        self.reset_balancing_biases()

    def reset_balancing_biases(self) -> None:
        """Before any balancing: 0 for the experts, the fixed bias for the skip class."""
        self.balancing_biases.zero_()
        self.balancing_biases[-1] = SKIP_BIAS

    def logits(self, hidden_ND: Tensor, previous_NR: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Logits (N, X) and the state handed to the next layer's router."""
        raise NotImplementedError

    def forward(
        self, hidden_ND: Tensor, previous_NR: Tensor | None, forced_N: Tensor | None = None
    ) -> tuple[Route, Tensor | None]:
        """Route N tokens; ``forced_N`` (integers) replays recorded choices, the gates stay the router's own."""
        logits_NX, state_NR = self.logits(hidden_ND, previous_NR)
        shares_NX = at_least_float(logits_NX).softmax(dim=-1)
        if forced_N is None:
            choice_N = (shares_NX.detach() + self.balancing_biases).argmax(dim=-1)
        else:
            choice_N = forced_N.long()
        gate_N = shares_NX.gather(1, choice_N[:, None])[:, 0]
        gate_N = gate_N.masked_fill(choice_N == shares_NX.shape[1] - 1, 0)
        return Route(choice_N, gate_N, shares_NX), state_NR

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        # model.to(bfloat16) must not round the biases: their small differences decide the balance.
        biases = self.balancing_biases
        super()._apply(fn, recurse)
        if self.balancing_biases.dtype != torch.float32:
            self.balancing_biases = biases.to(self.balancing_biases.device)
        return self


class MLPRouter(Router):
    """A down-projection and an MLP, without a state between layers."""

    def __init__(self, config: ZayaConfig, layer_index: int):
        super().__init__(config)
        self.down_proj = Linear(config.hidden_size, config.router_hidden_size, bias=True)
        self.router_mlp = RouterMLP(config)

    def logits(self, hidden_ND: Tensor, previous_NR: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.router_mlp(self.down_proj(hidden_ND)), None


class EDARouter(MLPRouter):
    """ZAYA's router: as above, on the running average over depth."""

    def __init__(self, config: ZayaConfig, layer_index: int):
        super().__init__(config, layer_index)
        if layer_index > 0:
            self.router_states_scale = nn.Parameter(torch.ones(config.router_hidden_size))

    def logits(self, hidden_ND: Tensor, previous_NR: Tensor | None) -> tuple[Tensor, Tensor | None]:
        state_NR = self.down_proj(hidden_ND)
        if previous_NR is not None:
            state_NR = state_NR + previous_NR * self.router_states_scale
        return self.router_mlp(state_NR), state_NR


class LinearRouter(Router):
    """One matrix from hidden states to logits."""

    def __init__(self, config: ZayaConfig, layer_index: int):
        super().__init__(config)
        self.out_proj = Linear(config.hidden_size, config.num_router_classes)

    def logits(self, hidden_ND: Tensor, previous_NR: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.out_proj(hidden_ND), None


ROUTERS = {"mlp+eda": EDARouter, "mlp": MLPRouter, "linear": LinearRouter}
