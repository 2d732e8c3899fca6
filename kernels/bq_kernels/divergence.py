"""KL divergence of two next-token distributions and its gradient, in the memory of the logits.

Training a model against another one needs both for every token over the whole vocabulary: logits that are kept for a
backward pass would be gigabytes.
"""

from __future__ import annotations

import torch


def divergence_(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """KL(target ‖ logits) per row in nats; `logits` becomes its gradient, softmax(logits) − softmax(target).

    Args:
        logits: [M, V], contiguous, any float dtype; overwritten.
        target: logits of the other distribution, [M, V], contiguous, of the same dtype.

    Returns:
        float32 [M].
    """
    if logits.is_cuda:
        from .triton_divergence import divergence_ as triton_divergence_

        return triton_divergence_(logits, target)
    return reference_divergence_(logits, target)


def reference_divergence_(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """`divergence_` in plain torch, in float32."""
    wanted = target.float().log_softmax(-1)
    found = logits.float().log_softmax(-1)
    probability = wanted.exp()
    loss = torch.linalg.vecdot(probability, wanted.sub_(found))
    logits.copy_(found.exp_().sub_(probability))
    return loss
