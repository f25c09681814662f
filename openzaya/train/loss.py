"""Cross-entropy of a tied or separate LM head, without ever holding all logits.

    loss = -sum_t log softmax(W h_t)[target_t]     over supervised tokens, in nats

Only supervised tokens reach the head. Logits are made for a block of tokens at a time and turned into their
own gradient at once, so memory is one block of logits instead of three copies of all of them; the gradient of
a sum needs no knowledge of what comes later. The caller divides by the true number of supervised tokens of the
global batch: best by passing its inverse as ``scale``, which spares a pass over the head's gradient (2 GB for
ZAYA1-8B) in the backward pass. ``plain_cross_entropy`` is the twin.

Shape suffixes: N tokens, M supervised tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from openzaya.kernels import functions as kernels
from openzaya.kernels.calls import first_order_only
from openzaya.kernels.host import recycled_empty

BLOCK_BYTES = 1 << 29
"""Largest block of fp32 logits."""
BLOCK_TOKENS = 512
"""Largest block in tokens: a small vocabulary's logits then stay in the cache."""


def linear_cross_entropy(
    hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, loss_mask_N: Tensor, *, scale: float = 1.0
) -> Tensor:
    """``scale`` times the summed cross-entropy in nats (fp32 scalar) of the tokens where ``loss_mask_N`` is set.

    ``targets_N`` are int64 token ids; logits, softmax and the sum are fp32 whatever the inputs' dtype.
    """
    rows_M = loss_mask_N.nonzero()[:, 0]
    if rows_M.numel() < loss_mask_N.numel():
        hidden_ND, targets_N = hidden_ND[rows_M], targets_N[rows_M]
    return _LinearCrossEntropy.apply(hidden_ND, head_VD, targets_N, scale)


def plain_cross_entropy(hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, loss_mask_N: Tensor) -> Tensor:
    """The same sum by the textbook; the twin of :func:`linear_cross_entropy`."""
    logits_NV = F.linear(hidden_ND.float(), head_VD.float())
    return F.cross_entropy(logits_NV[loss_mask_N], targets_N[loss_mask_N], reduction="sum")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_MD, head_VD, targets_M, scale):  # type: ignore[no-untyped-def]
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        hidden, head = hidden_MD.float(), head_VD.float()
        d_hidden = torch.empty_like(hidden) if wants_hidden or wants_head else None
        d_head = None
        if wants_head:
            # The memory of the previous step's gradient, where the head is large.
            on_cpu = head.device.type == "cpu"
            d_head = recycled_empty(*head.shape) if on_cpu else torch.empty_like(head)
            if not hidden.shape[0]:
                d_head.zero_()
        total = hidden.new_zeros(())
        largest = _largest_block(head)
        run: Callable[..., Tensor] = _block_cross_entropy
        if kernels.suits(hidden, head):
            # Logits of a large vocabulary take the same memory however many tokens a step supervises.
            run = functools.partial(kernels.cross_entropy, logits_width=largest)
        for start, end in _blocks(hidden.shape[0], largest):
            d_part = None if d_hidden is None else d_hidden[start:end]
            losses = run(hidden[start:end], head, targets_M[start:end], scale, d_part, d_head, add=start > 0)
            total += losses.sum()
        ctx.gradients = (d_hidden if wants_hidden else None, d_head, hidden_MD.dtype, head_VD.dtype)
        return total * scale

    @staticmethod
    @first_order_only
    def backward(ctx, factor: Tensor):  # type: ignore[no-untyped-def]
        d_hidden, d_head, hidden_dtype, head_dtype = ctx.gradients
        ctx.gradients = None
        if float(factor) != 1:
            d_hidden = None if d_hidden is None else d_hidden.mul_(factor)
            d_head = None if d_head is None else d_head.mul_(factor)
        d_hidden = None if d_hidden is None else d_hidden.to(hidden_dtype)
        d_head = None if d_head is None else d_head.to(head_dtype)
        return d_hidden, d_head, None, None


def _largest_block(head_VD: Tensor) -> int:
    """Tokens whose logits are made at once."""
    return max(1, min(BLOCK_TOKENS, BLOCK_BYTES // (4 * head_VD.shape[0])))


def _blocks(tokens: int, largest: int) -> list[tuple[int, int]]:
    """Bounds of blocks of up to ``largest`` tokens, as equal as can be."""
    count = -(-tokens // largest)
    return [(tokens * index // count, tokens * (index + 1) // count) for index in range(count)]


def _block_cross_entropy(
    hidden_ND: Tensor,
    head_VD: Tensor,
    targets_N: Tensor,
    scale: float,
    d_hidden_ND: Tensor | None,
    d_head_VD: Tensor | None,
    *,
    add: bool,
) -> Tensor:
    """Losses (N) and gradients of one block; the twin of :func:`openzaya.kernels.functions.cross_entropy`."""
    targets_N1 = targets_N[:, None]
    logits_NV = hidden_ND @ head_VD.T
    maximum = logits_NV.amax(dim=1, keepdim=True)
    target_logit = logits_NV.gather(1, targets_N1)
    logits_NV.sub_(maximum).exp_()
    normaliser = logits_NV.sum(dim=1, keepdim=True)
    losses_N = (normaliser.log() + maximum - target_logit)[:, 0]
    if d_hidden_ND is None:
        return losses_N
    logits_NV.mul_(scale / normaliser)
    logits_NV.scatter_add_(1, targets_N1, logits_NV.new_full(targets_N1.shape, -scale))
    torch.mm(logits_NV, head_VD, out=d_hidden_ND)
    if d_head_VD is not None:
        torch.addmm(d_head_VD, logits_NV.T, hidden_ND, beta=1 if add else 0, out=d_head_VD)
    return losses_N


def linear_token_logprobs(hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Log probability of each target and entropy of its distribution, both fp32 (N,) in nats, block by block.

    The log probabilities carry a gradient, weighted freely for each token (policy losses); the entropies carry none.
    Memory is one block of logits, which the backward pass makes again. Twin: ``log_softmax`` of all logits.
    """
    return _LinearTokenLogprobs.apply(hidden_ND, head_VD, targets_N)


class _LinearTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, head_VD, targets_N):  # type: ignore[no-untyped-def]
        hidden, head = hidden_ND.float(), head_VD.float()
        logprobs, entropies, normalisers = (hidden.new_empty(hidden.shape[0]) for _ in range(3))
        for start, end in _blocks(hidden.shape[0], _largest_block(head)):
            logits_NV = hidden[start:end] @ head.T
            normalisers[start:end] = logits_NV.logsumexp(dim=1)
            logits_NV.sub_(normalisers[start:end, None])
            logprobs[start:end] = logits_NV.gather(1, targets_N[start:end, None])[:, 0]
            entropies[start:end] = -(logits_NV.exp() * logits_NV).sum(dim=1)
        ctx.save_for_backward(hidden_ND, head_VD, targets_N, normalisers)
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @first_order_only
    def backward(ctx, d_logprobs_N: Tensor, _: Tensor):  # type: ignore[no-untyped-def]
        hidden_ND, head_VD, targets_N, normalisers = ctx.saved_tensors
        hidden, head = hidden_ND.float(), head_VD.float()
        d_hidden, d_head = torch.empty_like(hidden), torch.zeros_like(head)
        for start, end in _blocks(hidden.shape[0], _largest_block(head)):
            weights_N1 = d_logprobs_N[start:end, None]
            d_logits_NV = (hidden[start:end] @ head.T).sub_(normalisers[start:end, None]).exp_().mul_(-weights_N1)
            d_logits_NV.scatter_add_(1, targets_N[start:end, None], weights_N1)
            torch.mm(d_logits_NV, head, out=d_hidden[start:end])
            d_head.addmm_(d_logits_NV.T, hidden[start:end])
        return d_hidden.to(hidden_ND.dtype), d_head.to(head_VD.dtype), None
