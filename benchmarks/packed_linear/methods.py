"""What kernels.py times on each layer: the packed linear by rotation, cuBLAS, and the peers that are installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from bq_kernels import ops, reference
from bq_kernels.format import midrise_zero
from bq_kernels.packing import unpack

from benchmarks.packed_linear.cases import BITS, DTYPE, LinearCase
from benchmarks.packed_linear.quarot import QuarotLinear

WIDE_BLOCK = 512
EPSILON = 1e-5  # of an RMSNorm
MOST_PEER_LAYERS = 8  # gemlite compiles for each of its layers


class Prepared(NamedTuple):
    """A method on one layer.

    Attributes:
        run: gives the output for x [M, K] and the number of a set.
        sets: how many sets there are.
        rotation: tables by which it rotates x; None for no rotation.
    """

    run: Callable[[torch.Tensor, int], torch.Tensor]
    sets: int
    rotation: tuple[torch.Tensor, torch.Tensor] | None = None


Method = Callable[[LinearCase], Prepared]


def cublas(case: LinearCase) -> Prepared:
    """The 16-bit layer."""
    return Prepared(lambda x, i: F.linear(x, case.dense[i]), len(case.dense))


def packed(block_size_of: Callable[[LinearCase], int | None], hadamard: bool = False) -> Method:
    """The packed linear behind a rotation of that block size; None for no rotation."""

    def prepare(case: LinearCase) -> Prepared:
        block_size, tables = block_size_of(case), None
        if block_size:
            angles = reference.hadamard_angles(case.in_features, block_size, case.device) if hadamard else None
            tables = case.rotation_tables(block_size, angles)

        def run(x, i):
            return ops.packed_linear(x, *case.packed[i], None, case.out_features, *(tables or (None, None)))

        return Prepared(run, len(case.packed), tables)

    return prepare


def normed(inside: bool) -> Method:
    """The packed linear behind a rotation in blocks of a group and an RMSNorm: in one operator, or before it."""

    def prepare(case: LinearCase) -> Prepared:
        tables, weight = case.rotation_tables(case.group_size), torch.ones(case.in_features, device=case.device)
        weight = weight.to(DTYPE)
        # as vLLM has it: by Inductor, in one kernel
        norm = torch.compile(reference.rms_norm, dynamic=False) if torch.cuda.is_available() else reference.rms_norm

        def run(x, i):
            layer = (*case.packed[i], None, case.out_features, *tables)
            if inside:
                return ops.norm_linear(x, x, weight, EPSILON, *layer)[0]
            return ops.packed_linear(norm(x, x, weight, EPSILON)[0], *layer)

        return Prepared(run, len(case.packed), tables)

    return prepare


def humming(case: LinearCase) -> Prepared:
    """Humming W2A16, JIT-compiled CUDA: what vLLM picks for 2-bit weights."""
    from humming.layer import HummingLayer

    layers = []
    for weight in case.dense[: case.sets(case.packed_bytes)]:
        config = {"dtype": "uint2", "group_size": case.group_size, "has_zero_point": False}
        layer = HummingLayer(case.out_features, case.in_features, config, torch_dtype=DTYPE).to(case.device)
        layer.load_from_unquantized(weight)
        layer.transform()
        layers.append(layer)
    return Prepared(lambda x, i: layers[i](x), len(layers))


def gemlite(case: LinearCase) -> Prepared:
    """gemlite A16W2, Triton."""
    from gemlite import DType, GemLiteLinear

    words, scales = case.plain
    codes = unpack(words, BITS)
    zeros = torch.full_like(scales, midrise_zero(BITS))
    layers = []
    for _ in range(min(case.sets(case.packed_bytes), MOST_PEER_LAYERS)):
        layer = GemLiteLinear(BITS, case.group_size, case.in_features, case.out_features, DType.FP16, DType.FP16)
        layer.pack(codes, scales.reshape(-1, 1), zeros.reshape(-1, 1), None)
        layers.append(layer)
    return Prepared(lambda x, i: layers[i](x), len(layers))


def quarot(case: LinearCase) -> Prepared:
    """QuaRot's 4-bit CUDA linear, from a library that the user has built; activations are 4 bits, too."""
    layer = QuarotLinear(case)
    return Prepared(layer, len(layer.codes))


BASELINE, ROTATED = "cuBLAS fp16", "ours, block = group"
METHODS: dict[str, Method] = {
    BASELINE: cublas,
    "ours, no rotation": packed(lambda case: None),
    ROTATED: packed(lambda case: case.group_size),
    f"ours, block {WIDE_BLOCK}": packed(
        lambda case: WIDE_BLOCK if case.in_features % WIDE_BLOCK == 0 else case.group_size
    ),
    "ours, full width": packed(lambda case: case.in_features),
    "ours, Hadamard = group": packed(lambda case: case.group_size, hadamard=True),
    "Humming W2": humming,
    "gemlite A16W2": gemlite,
    "QuaRot W4A4": quarot,
}
NORMED: dict[str, Method] = {"ours, norm before": normed(inside=False), "ours, norm inside": normed(inside=True)}
PEERS = ("Humming W2", "gemlite A16W2", "QuaRot W4A4")  # may be missing, or not take a shape
