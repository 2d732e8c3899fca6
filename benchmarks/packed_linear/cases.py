"""The layers that kernels.py measures: shapes of real models, and tensors of one shape."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from bq_kernels import reference
from bq_kernels.format import num_angles
from bq_kernels.tiles import tile

# out_features and in_features of the linear layers, fused as vLLM fuses them
SHAPES = {
    "square": {"square": (8192, 8192)},
    "llama2-70b": {"qkv": (10240, 8192), "o": (8192, 8192), "gate_up": (57344, 8192), "down": (8192, 28672)},
    "llama2-7b": {"qkv": (12288, 4096), "o": (4096, 4096), "gate_up": (22016, 4096), "down": (4096, 11008)},
    "llama2-13b": {"qkv": (15360, 5120), "o": (5120, 5120), "gate_up": (27648, 5120), "down": (5120, 13824)},
    "smoke": {"smoke": (192, 256)},
}
# tokens and hidden features of embeddings and LM heads
VOCABULARIES = {"llama2-7b": (32000, 4096), "llama3-8b": (128256, 4096), "qwen3-1.7b": (151936, 2048)}
SMOKE_VOCABULARY = {"smoke": (200, 256)}
BITS = 2
DTYPE = torch.float16
MOST_SETS = 64


def _random_words(*shape: int, device: str | torch.device) -> torch.Tensor:
    """Random int32 words: any word is a sequence of codes."""
    return torch.randint(-(2**31), 2**31, shape, device=device).to(torch.int32)


class LinearCase:
    """One layer: several sets of packed weights, and the dense weight of the first.

    Args:
        out_features: N.
        in_features: K.
        group_size: columns that share a scale.
        device: where the tensors are.
        cache_bytes: size of the device's L2 cache.
        bits: per code.

    Attributes:
        packed_bytes: bytes of one set, scales included.
        plain: int32 words [N, K·bits/32] and float16 scales [N, K/group] of the first set.
        packed: the sets as kernels take them, tiles, scales and zeros (None).
    """

    def __init__(
        self, out_features: int, in_features: int, group_size: int, device: str, cache_bytes: int, bits: int = BITS
    ):
        self.out_features, self.in_features, self.group_size = out_features, in_features, group_size
        self.device, self.cache_bytes = device, cache_bytes
        groups = in_features // group_size
        self.packed_bytes = out_features * in_features * bits // 8 + out_features * groups * 2
        words = _random_words(out_features, in_features * bits // 32, device=device)
        scales = (torch.rand(out_features, groups, device=device) + 0.5).half() / in_features**0.5
        self.plain = words, scales
        first = tile(words, scales, None, in_features)
        more = self.sets(self.packed_bytes) - 1
        self.packed = [
            first,
            *((_random_words(*first[0].shape, device=device), first[1].clone(), None) for _ in range(more)),
        ]

    def sets(self, size: int) -> int:
        """Sets of `size` bytes that the cache cannot hold together."""
        return max(2, min(math.ceil(3 * self.cache_bytes / size), MOST_SETS))

    @cached_property
    def weight(self) -> torch.Tensor:
        """Dense weight of the first set, float32 [N, K]."""
        words, scales = self.plain
        parts = zip(words.split(4096), scales.split(4096), strict=True)
        return torch.cat([reference.dequantize(*part, None, self.in_features) for part in parts])

    @cached_property
    def dense(self) -> list[torch.Tensor]:
        """fp16 weights [N, K]; the first set is that of the packed weights."""
        first = self.weight.to(DTYPE)
        return [first, *(torch.randn_like(first) for _ in range(self.sets(first.nbytes) - 1))]

    def rotation_tables(self, block_size: int, angles: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Tables of the rotation with these angles, by default of a random one."""
        if angles is None:
            shape = self.in_features // block_size, num_angles(block_size)
            angles = (torch.rand(shape, device=self.device) * 2 - 1) * math.pi
        return reference.givens_tables(angles, block_size)
