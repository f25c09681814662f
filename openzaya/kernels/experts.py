"""Kernels of the experts: y = gate * W2_e (silu(g) * u), [g, u] = W1_e x, one expert a token.

Small experts go through cpp/train/experts.hpp, which packs every matrix; large ones through PyTorch's products, written
straight into their places. fp32 on the CPU; callers ask :func:`openzaya.kernels.calls.suits` first.

Shape suffixes: N tokens, D hidden, E experts. ``gate_up`` is (E, 2F, D), gate first, ``down`` (E, D, F).
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from openzaya.kernels.calls import call, first_order_only
from openzaya.kernels.host import recycled_empty

LARGE_EXPERT = 1 << 20
"""Experts with this many weights in a matrix are multiplied by PyTorch: few tokens visit each, and packing a
matrix would cost as much as using it."""


def experts(hidden_ND: Tensor, choice_N: Tensor, gate_N: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Each token through its expert, (N, D); twins: ``grouped_experts`` and ``loop_experts``."""
    function = _LargeExperts if down[0].numel() >= LARGE_EXPERT else _Experts
    return function.apply(hidden_ND, choice_N, gate_N, gate_up, down)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, choice, gate, gate_up, down):  # type: ignore[no-untyped-def]
        hidden, gate, gate_up, down = hidden.contiguous(), gate.contiguous(), gate_up.contiguous(), down.contiguous()
        num_experts, hidden_size, width = down.shape
        order, ends = _sort_by_expert(choice, num_experts)
        visits = int(ends[-1])
        sizes = (num_experts, hidden_size, width, visits)
        output = torch.empty_like(hidden) if visits == hidden.shape[0] else torch.zeros_like(hidden)
        inside = hidden.new_empty(visits, 2 * width)
        call("experts_forward", *sizes, order, ends, hidden, gate, gate_up, down, output, inside)
        ctx.save_for_backward(hidden, gate, gate_up, down, order, ends, inside)
        ctx.sizes = sizes
        return output

    @staticmethod
    @first_order_only
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        hidden, gate, gate_up, down, order, ends, inside = ctx.saved_tensors
        _, hidden_size, width, visits = ctx.sizes
        make = torch.empty_like if visits == hidden.shape[0] else torch.zeros_like
        d_hidden, d_gate = make(hidden), make(gate)
        d_gate_up, d_down = torch.empty_like(gate_up), torch.empty_like(down)
        room = hidden.new_empty(visits * (2 * hidden_size + 3 * width))
        inputs = (order, ends, hidden, gate, gate_up, down, inside, gradient.contiguous())
        call("experts_backward", *ctx.sizes, *inputs, d_hidden, d_gate, d_gate_up, d_down, room)
        return d_hidden, None, d_gate, d_gate_up, d_down


def _sort_by_expert(choice_N: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Tokens sorted by expert, the skip class last (N), and the end of each expert's run (E); both int64."""
    ends_E = torch.bincount(choice_N, minlength=num_experts + 1)[:num_experts].cumsum(0)
    return choice_N.argsort(stable=True), ends_E


class _LargeExperts(torch.autograd.Function):
    """The same expert by expert with PyTorch's products, written straight into their places."""

    @staticmethod
    def forward(ctx, hidden, choice, gate, gate_up, down):  # type: ignore[no-untyped-def]
        num_experts, _, width = down.shape
        order, ends = _sort_by_expert(choice, num_experts)
        bounds = [0, *ends.tolist()]
        order = order[: bounds[-1]]
        sorted_hidden, sorted_gate = hidden[order], gate[order][:, None]
        inside = hidden.new_empty(bounds[-1], 2 * width)
        for expert, (start, end) in enumerate(itertools.pairwise(bounds)):
            torch.mm(sorted_hidden[start:end], gate_up[expert].T, out=inside[start:end])
        active = F.silu(inside[:, :width]).mul_(inside[:, width:])
        sorted_output = torch.empty_like(sorted_hidden)
        for expert, (start, end) in enumerate(itertools.pairwise(bounds)):
            torch.mm(active[start:end], down[expert].T, out=sorted_output[start:end])
        ctx.save_for_backward(sorted_hidden, sorted_gate, gate_up, down, order, inside)
        ctx.bounds, ctx.num_tokens = bounds, hidden.shape[0]
        return torch.zeros_like(hidden).index_copy_(0, order, sorted_output.mul_(sorted_gate))

    @staticmethod
    @first_order_only
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        sorted_hidden, sorted_gate, gate_up, down, order, inside = ctx.saved_tensors
        width = down.shape[2]
        d_output = gradient[order]
        d_active = inside.new_empty(len(order), width)
        for expert, (start, end) in enumerate(itertools.pairwise(ctx.bounds)):
            torch.mm(d_output[start:end], down[expert], out=d_active[start:end])
        gate_part, up_part = inside[:, :width], inside[:, width:]
        sigmoid = gate_part.sigmoid()
        silu = gate_part * sigmoid
        active = silu * up_part
        d_gate = inside.new_zeros(ctx.num_tokens).index_copy_(0, order, torch.linalg.vecdot(d_active, active))
        d_active.mul_(sorted_gate)
        active.mul_(sorted_gate)
        d_inside = torch.empty_like(inside)
        torch.mul(d_active, silu, out=d_inside[:, width:])
        d_silu = sigmoid.addcmul_(silu, 1 - sigmoid)
        torch.mul(d_active.mul_(up_part), d_silu, out=d_inside[:, :width])
        d_hidden = torch.empty_like(sorted_hidden)
        d_gate_up, d_down = recycled_empty(*gate_up.shape), recycled_empty(*down.shape)
        for expert, (start, end) in enumerate(itertools.pairwise(ctx.bounds)):
            # Products over no tokens are zeros: an expert that nobody visits still gets its gradient.
            torch.mm(d_inside[start:end], gate_up[expert], out=d_hidden[start:end])
            torch.mm(d_inside[start:end].T, sorted_hidden[start:end], out=d_gate_up[expert])
            torch.mm(d_output[start:end].T, active[start:end], out=d_down[expert])
        d_hidden = torch.zeros_like(gradient).index_copy_(0, order, d_hidden)
        return d_hidden, None, d_gate, d_gate_up, d_down
