"""The experts: E gated MLPs, each token visits one (arXiv 2605.05365).

    y = gate * W2_e (silu(g) * u),   [g, u] = W1_e h

``grouped`` sorts the tokens by expert and runs one grouped matrix product a layer (``F.grouped_mm``);
``loop`` is its slow, plain twin. The skip class (index E) sorts last, takes no part in the product and
gives 0, and so do experts without a token.

Shape suffixes: N tokens, M of them at an expert, D hidden, F expert width, E experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openzaya.kernels import functions as kernels
from openzaya.model.config import ZayaConfig
from openzaya.model.quantised import QuantisedMatrix
from openzaya.model.router import Route


class Experts(nn.Module):
    """Stacked expert weights: gate and up rows together (E, 2F, D), gate first; down (E, D, F)."""

    def __init__(self, config: ZayaConfig):
        super().__init__()
        shape = (config.num_experts, config.hidden_size, config.moe_intermediate_size)
        self.gate_up_proj: nn.Parameter | QuantisedMatrix = nn.Parameter(torch.empty(shape[0], 2 * shape[2], shape[1]))
        self.down_proj: nn.Parameter | QuantisedMatrix = nn.Parameter(torch.empty(shape))
        self.implementation = "grouped"
        """``grouped`` or ``loop``; same numbers, other speed."""

    def forward(self, hidden_ND: Tensor, route: Route) -> Tensor:
        if isinstance(self.gate_up_proj, QuantisedMatrix) or isinstance(self.down_proj, QuantisedMatrix):
            return quantised_experts(hidden_ND, route.choice_N, route.gate_N, self.gate_up_proj, self.down_proj)
        if self.implementation == "grouped" and kernels.suits(hidden_ND, self.gate_up_proj, self.down_proj):
            return kernels.experts(hidden_ND, route.choice_N, route.gate_N, self.gate_up_proj, self.down_proj)
        # The grouped product exists for fp32 and narrower types only.
        is_grouped = self.implementation == "grouped" and hidden_ND.dtype != torch.float64
        run = grouped_experts if is_grouped else loop_experts
        return run(hidden_ND, route.choice_N, route.gate_N, self.gate_up_proj, self.down_proj)


def grouped_experts(hidden_ND: Tensor, choice_N: Tensor, gate_N: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """All experts at once: (N, D) to (N, D) in the weights' dtype."""
    num_experts = gate_up.shape[0]
    order_N = choice_N.argsort(stable=True)
    # int32 ends of each expert's run; tokens of the skip class lie behind the last one.
    ends_E = torch.bincount(choice_N, minlength=num_experts + 1)[:num_experts].cumsum(0).to(torch.int32)
    order_M = order_N[: int(ends_E[-1])]
    gate_M, up_M = F.grouped_mm(hidden_ND[order_M], gate_up.transpose(1, 2), offs=ends_E).chunk(2, dim=-1)
    output_MD = F.grouped_mm(F.silu(gate_M) * up_M, down.transpose(1, 2), offs=ends_E)
    weighted_MD = output_MD * gate_N[order_M, None].to(output_MD.dtype)
    return torch.zeros_like(hidden_ND).index_copy(0, order_M, weighted_MD)


def loop_experts(hidden_ND: Tensor, choice_N: Tensor, gate_N: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """One expert after the other; the twin of :func:`grouped_experts`."""
    output_ND = torch.zeros_like(hidden_ND)
    for expert in range(gate_up.shape[0]):
        tokens_M = (choice_N == expert).nonzero()[:, 0]
        gate_M, up_M = (hidden_ND[tokens_M] @ gate_up[expert].T).chunk(2, dim=-1)
        output_MD = (F.silu(gate_M) * up_M) @ down[expert].T
        output_ND = output_ND.index_copy(0, tokens_M, output_MD * gate_N[tokens_M, None].to(output_MD.dtype))
    return output_ND


def quantised_experts(
    hidden_ND: Tensor,
    choice_N: Tensor,
    gate_N: Tensor,
    gate_up: Tensor | QuantisedMatrix,
    down: Tensor | QuantisedMatrix,
) -> Tensor:
    """:func:`loop_experts` where one or both stacks are quantised; only experts with tokens are looked at."""
    output_ND = torch.zeros_like(hidden_ND)
    num_experts = gate_up.leading[0] if isinstance(gate_up, QuantisedMatrix) else gate_up.shape[0]
    for expert in choice_N.unique().tolist():
        if expert == num_experts:
            continue  # the skip class gives 0
        tokens_M = (choice_N == expert).nonzero()[:, 0]
        gate_M, up_M = _product(hidden_ND[tokens_M], gate_up, expert).chunk(2, dim=-1)
        output_MD = _product(F.silu(gate_M) * up_M, down, expert)
        output_ND[tokens_M] = output_MD * gate_N[tokens_M, None].to(output_MD.dtype)
    return output_ND


def _product(x_MD: Tensor, stack: Tensor | QuantisedMatrix, expert: int) -> Tensor:
    return stack(x_MD, expert) if isinstance(stack, QuantisedMatrix) else x_MD @ stack[expert].T
