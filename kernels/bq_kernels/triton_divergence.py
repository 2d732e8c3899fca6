"""KL divergence and its gradient as one Triton kernel: one program per row, two passes over the vocabulary.

The first pass finds both normalisers, the second reads the logits again, from L2 where they fit, and writes the
gradient over them: 10 bytes per pair of 16-bit logits, where log-softmax, divergence and their backward pass take about
60. Not measured on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .gpu import gpu_of

MOST_COLUMNS = 4096  # of the vocabulary at a time
WARPS = 8


@triton.jit
def _divergence_kernel(
    logits_ptr,
    target_ptr,
    loss_ptr,
    V,
    BLOCK_V: tl.constexpr,
    PDL: tl.constexpr,  # this kernel may start early, and must not read before the previous one has ended
):
    row = tl.program_id(0).to(tl.int64)  # 64 bits: rows × vocabulary may pass 2³¹
    logits_ptr += row * V
    target_ptr += row * V
    offs = tl.arange(0, BLOCK_V)
    if PDL:
        tl.extra.cuda.gdc_wait()
    # running maximum and sum of exponentials, per lane (Milakov and Gimelshein, arXiv 1805.02867)
    found_max = tl.full([BLOCK_V], -1e30, tl.float32)
    wanted_max = tl.full([BLOCK_V], -1e30, tl.float32)
    found_sum = tl.zeros([BLOCK_V], tl.float32)
    wanted_sum = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, V, BLOCK_V):
        mask = start + offs < V
        found = tl.load(logits_ptr + start + offs, mask=mask, other=-1e30).to(tl.float32)
        wanted = tl.load(target_ptr + start + offs, mask=mask, other=-1e30).to(tl.float32)
        maximum = tl.maximum(found_max, found)
        found_sum = found_sum * tl.exp(found_max - maximum) + tl.where(mask, tl.exp(found - maximum), 0.0)
        found_max = maximum
        maximum = tl.maximum(wanted_max, wanted)
        wanted_sum = wanted_sum * tl.exp(wanted_max - maximum) + tl.where(mask, tl.exp(wanted - maximum), 0.0)
        wanted_max = maximum
    maximum = tl.max(found_max, 0)
    found_norm = maximum + tl.log(tl.sum(found_sum * tl.exp(found_max - maximum), 0))
    maximum = tl.max(wanted_max, 0)
    wanted_norm = maximum + tl.log(tl.sum(wanted_sum * tl.exp(wanted_max - maximum), 0))
    loss = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, V, BLOCK_V):
        mask = start + offs < V
        found = tl.load(logits_ptr + start + offs, mask=mask, other=0.0).to(tl.float32) - found_norm
        wanted = tl.load(target_ptr + start + offs, mask=mask, other=0.0).to(tl.float32) - wanted_norm
        probability = tl.exp(wanted)
        loss += tl.where(mask, probability * (wanted - found), 0.0)
        gradient = tl.exp(found) - probability
        tl.store(logits_ptr + start + offs, gradient.to(logits_ptr.dtype.element_ty), mask=mask)
    tl.store(loss_ptr + row, tl.sum(loss, 0))


def divergence_(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """`divergence.divergence_` by the kernel."""
    rows, vocabulary = logits.shape
    loss = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows == 0:
        return loss
    block = min(triton.next_power_of_2(vocabulary), MOST_COLUMNS)
    gpu = gpu_of(logits)
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        _divergence_kernel[(rows,)](
            logits, target, loss, vocabulary, BLOCK_V=block, num_warps=WARPS, PDL=gpu.pdl, **gpu.options
        )
    return loss
