"""The loss of end-to-end training: KL(16-bit ‖ quantized) over the next token.

Its gradient is taken in the forward pass, some rows at a time, because the logits of a step would be gigabytes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from bq_kernels.divergence import divergence_
from torch import nn

from .quantized_linear import QuantizedLinear, level_gradients
from .student import Student

# Of one model's logits that are in memory at a time. On a CPU every part reads the whole head: 85 rows at a time took
# 2.1 s of a step of SmolLM2-135M on two AVX2 cores, 128 and more 1.6 to 1.7 s
LOGIT_BYTES = {"cpu": 2**25, "cuda": 2**30}


def divergence(student: Student, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Sum of KL(16-bit ‖ quantized) over tokens in nats, a float32 scalar on the device; differentiable.

    Args:
        student: its LM head takes the states of the quantized model, its 16-bit one those of the other.
        output: states of the quantized model, [..., hidden].
        target: those of the 16-bit model.
    """
    head, dtype = student.head, student.source.training_dtype
    if isinstance(head, QuantizedLinear):
        inputs, trained = head.rotation(output).flatten(0, -2), head.rounded()
        plain = None if head.kept_tokens is None else output.to(dtype).flatten(0, -2)
    else:
        inputs, plain, trained = output.to(dtype).flatten(0, -2), None, (None, None)
    return _Divergence.apply(inputs, plain, *trained, head, student.original_head, target.flatten(0, -2))


class _Divergence(torch.autograd.Function):
    """Gradients of the head's inputs, and of its scales and zeros where it is packed.

    The inputs of a packed head come rotated, for its packed rows, and plain, for those that are kept in 16 bits.
    """

    @staticmethod
    def forward(
        ctx,
        inputs: torch.Tensor,
        plain: torch.Tensor | None,
        scales: torch.Tensor | None,
        zeros: torch.Tensor | None,
        head: nn.Linear | QuantizedLinear,
        original_head: nn.Linear,
        target: torch.Tensor,
    ) -> torch.Tensor:
        weight = head.weight if scales is None else head.weight(inputs.dtype)
        kept, kept_rows = (None, None) if plain is None else (head.kept_tokens, head.kept_rows.to(inputs.dtype))
        rows = max(1, LOGIT_BYTES[inputs.device.type] // (weight.element_size() * len(weight)))
        total = torch.zeros((), device=inputs.device)
        gradients = [None if values is None else torch.zeros_like(values) for values in (inputs, plain, scales, zeros)]
        for start in range(0, len(inputs), rows):
            part = slice(start, start + rows)
            x = inputs[part]
            logits = F.linear(x, weight, head.bias)
            if kept is not None:
                logits.index_add_(-1, kept, plain[part] @ kept_rows.T)
            total += divergence_(logits, original_head(target[part].to(x.dtype))).sum()
            if ctx.needs_input_grad[0]:
                gradients[0][part] = logits @ weight
            if kept is not None and ctx.needs_input_grad[1]:
                gradients[1][part] = logits[:, kept] @ kept_rows
            if ctx.needs_input_grad[2]:
                by_weight = logits.T @ x
                if kept is not None:
                    by_weight.index_fill_(0, kept, 0)
                by_scale, by_zero = level_gradients(by_weight, weight, scales, zeros)
                gradients[2] += by_scale
                if zeros is not None:
                    gradients[3] += by_zero
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx, factor: torch.Tensor):
        gradients = [None if gradient is None else gradient * factor for gradient in ctx.saved_tensors]
        return *gradients, None, None, None
