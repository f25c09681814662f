"""Cross-entropy of a tied or separate LM head, without ever holding all logits.

    loss = -sum_t log softmax(W h_t)[target_t]     over supervised tokens, in nats

Only supervised tokens reach the head. Logits are made for a block of tokens at a time and turned into their
own gradient at once, so memory is one block of logits instead of three copies of all of them; the gradient of
a sum needs no knowledge of what comes later, and the caller divides by the true number of supervised tokens of
the global batch. ``plain_cross_entropy`` is the twin.

Shape suffixes: N tokens, M supervised tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_BYTES = 1 << 28
"""Size of one block of fp32 logits."""


def linear_cross_entropy(hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, loss_mask_N: Tensor) -> Tensor:
    """Summed cross-entropy in nats (fp32 scalar) of the tokens where ``loss_mask_N`` (bool) is set.

    ``targets_N`` are int64 token ids; logits, softmax and the sum are fp32 whatever the inputs' dtype.
    """
    rows_M = loss_mask_N.nonzero()[:, 0]
    if rows_M.numel() < loss_mask_N.numel():
        hidden_ND, targets_N = hidden_ND[rows_M], targets_N[rows_M]
    return _LinearCrossEntropy.apply(hidden_ND, head_VD, targets_N)


def plain_cross_entropy(hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, loss_mask_N: Tensor) -> Tensor:
    """The same sum by the textbook; the twin of :func:`linear_cross_entropy`."""
    logits_NV = F.linear(hidden_ND.float(), head_VD.float())
    return F.cross_entropy(logits_NV[loss_mask_N], targets_N[loss_mask_N], reduction="sum")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_MD: Tensor, head_VD: Tensor, targets_M: Tensor) -> Tensor:  # type: ignore[override]
        wants_gradient = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        hidden, head = hidden_MD.float(), head_VD.float()
        block = max(1, BLOCK_BYTES // (4 * head.shape[0]))
        total = hidden.new_zeros(())
        hidden_gradient = torch.empty_like(hidden) if wants_gradient else None
        head_gradient = None
        for start in range(0, hidden.shape[0], block):
            part, targets = hidden[start : start + block], targets_M[start : start + block, None]
            logits = part @ head.T
            maximum = logits.amax(dim=1, keepdim=True)
            target_logit = logits.gather(1, targets)
            logits.sub_(maximum).exp_()
            normaliser = logits.sum(dim=1, keepdim=True)
            total += (normaliser.log() + maximum - target_logit).sum()
            if hidden_gradient is None:
                continue
            logits.div_(normaliser)
            logits.scatter_add_(1, targets, logits.new_full(targets.shape, -1.0))
            torch.mm(logits, head, out=hidden_gradient[start : start + block])
            if head_gradient is None:
                head_gradient = logits.T @ part
            else:
                head_gradient.addmm_(logits.T, part)
        if head_gradient is None and wants_gradient:
            head_gradient = torch.zeros_like(head)
        ctx.gradients = (hidden_gradient, head_gradient, hidden_MD.dtype, head_VD.dtype)
        return total

    @staticmethod
    def backward(ctx, scale: Tensor):  # type: ignore[no-untyped-def, override]
        hidden_gradient, head_gradient, hidden_dtype, head_dtype = ctx.gradients
        ctx.gradients = None
        if hidden_gradient is None:
            return None, None, None
        return hidden_gradient.mul_(scale).to(hidden_dtype), head_gradient.mul_(scale).to(head_dtype), None
