"""Deterministic choices: seeds of the parts of a run, a spread of rows, the order of training samples."""

from __future__ import annotations

import functools

import torch

_PRIME = 1_000_003  # places of one run stay far apart


def derive_seed(seed: int, *places: int) -> int:
    """Seed of one part of a run, by the run's seed and the part's place in it (block, group of layers, epoch, …)."""
    for place in places:
        seed = seed * _PRIME + place
    return seed % 2**63  # as large as torch takes


def spread_rows(x: torch.Tensor, most: int) -> torch.Tensor:
    """At most `most` rows of x [rows, …], evenly spread over all of them."""
    return x if len(x) <= most else x[torch.arange(most, device=x.device) * len(x) // most]


def sample_at(position: int, samples: int, seed: int) -> int:
    """The sample at a position of an endless sequence that is shuffled anew in every epoch."""
    epoch, place = divmod(position, samples)
    return int(_order(samples, derive_seed(seed, epoch))[place])


@functools.lru_cache(maxsize=2)  # a step may reach into the next epoch
def _order(samples: int, seed: int) -> torch.Tensor:
    return torch.randperm(samples, generator=torch.Generator().manual_seed(seed))


def batch_of(step: int, batch: int, samples: int, seed: int) -> torch.Tensor:
    """Samples of one training step, int64 [batch]."""
    return torch.tensor([sample_at(step * batch + i, samples, seed) for i in range(batch)])
