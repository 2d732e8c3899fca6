"""Times of one layer by method, checked against a float32 product, beside the device's ceilings."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from bq_kernels import ops, reference

from benchmarks.harness.provenance import versions
from benchmarks.harness.timing import median_seconds
from benchmarks.packed_linear.cases import DTYPE, LinearCase
from benchmarks.packed_linear.methods import METHODS, PEERS, Prepared

# relative to the size of the output; peers quantize the dense weight themselves
MOST_ERROR, MOST_PEER_ERROR = 2e-3, 0.8


@dataclass
class Ceilings:
    """What this device reaches.

    Attributes:
        bandwidth: bytes per second of a copy, read and written.
        operations: fp16 operations per second of a matrix product.
        cache: bytes of the L2 cache.
    """

    bandwidth: float
    operations: float
    cache: int


def environment() -> dict[str, str]:
    """The device and the versions that a measurement depends on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"device": device} | versions("torch", "triton", "gemlite", "humming-kernels", "vllm")


def measure_ceilings(device: str) -> Ceilings:
    """Measure a device copy and an fp16 product; both tiny on a CPU."""
    on_cpu = device == "cpu"
    source = torch.empty(1 << (20 if on_cpu else 30), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = median_seconds(lambda i: target.copy_(source), 2)
    size = 128 if on_cpu else 8192
    a, b = (torch.randn(size, size, device=device, dtype=DTYPE) for _ in "ab")
    product = median_seconds(lambda i: a @ b, 2)
    cache = 1 << 20 if on_cpu else torch.cuda.get_device_properties(0).L2_cache_size
    return Ceilings(2 * source.nbytes / copy, 2 * size**3 / product, cache)


def floor(case: LinearCase, tokens: int, ceilings: Ceilings) -> float:
    """Seconds that a packed linear takes at least: bytes over bandwidth, or operations over their rate."""
    moved = case.packed_bytes + tokens * (case.in_features + case.out_features) * 2
    return max(moved / ceilings.bandwidth, 2 * tokens * case.in_features * case.out_features / ceilings.operations)


def relative_error(prepared: Prepared, x: torch.Tensor, case: LinearCase, limit: float) -> float:
    """Relative error of the first set's output against a float32 product.

    Raises:
        ValueError: if it is not below the limit.
    """
    rotated = x if prepared.rotation is None else reference.apply_rotation(x, *prepared.rotation)
    target = rotated.float() @ case.weight.T
    output = prepared.run(x, 0).float()
    error = ((output - target).norm() / target.norm()).item()
    if not error < limit:  # NaN too
        raise ValueError(f"wrong result: relative error {error:.2e}")
    return error


def measure_rotation(case: LinearCase, tokens: int) -> dict[str, float]:
    """Seconds of the rotation alone, of copying its input, and of vLLM's Hadamard kernel where it is available."""
    nbytes = tokens * case.in_features * 4
    xs = [torch.randn(tokens, case.in_features, device=case.device, dtype=DTYPE) for _ in range(case.sets(nbytes))]
    times = {"copy": median_seconds(lambda i: xs[i].clone(), len(xs))}
    for name, block_size in (("block = group", case.group_size), ("full width", case.in_features)):
        tables = case.rotation_tables(block_size)
        times[name] = median_seconds(lambda i, tables=tables: ops.rotate(xs[i], *tables), len(xs))
    with contextlib.suppress(ImportError):
        import vllm._custom_ops  # noqa: F401 registers its Hadamard
    if hasattr(torch.ops._C, "hadacore_transform") and case.in_features & (case.in_features - 1) == 0:
        hadacore = torch.ops._C.hadacore_transform
        times["HadaCore, full width"] = median_seconds(lambda i: hadacore(xs[i], False), len(xs))
    return times


@dataclass
class Measurement:
    """A run over layers, up to a deadline.

    Attributes:
        ceilings: of the device.
        deadline: by time.monotonic().
        rows: one result per layer and number of tokens.
        left_out: reason by layer or by layer and method.
    """

    ceilings: Ceilings
    deadline: float
    rows: list[dict[str, Any]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def measure_layer(
        self, layer: str, out_features: int, in_features: int, group_size: int, device: str, tokens: list[int]
    ) -> bool:
        """Time all methods on a layer; returns whether there was time for it.

        Raises:
            ValueError: if one of our kernels gives a wrong result.
        """
        if time.monotonic() > self.deadline:
            self.left_out[layer] = "out of time"
            return False
        case = LinearCase(out_features, in_features, group_size, device, self.ceilings.cache)
        times: dict[int, dict[str, float]] = {count: {} for count in tokens}
        errors: dict[str, float] = {}
        for name in METHODS:
            try:
                self._measure_method(f"{layer}, {name}", name, case, times, errors)
            except Exception as problem:  # a peer may be missing, or not take a shape: the table goes on without it
                if name not in PEERS:
                    raise
                self.left_out[f"{layer}, {name}"] = f"{type(problem).__name__}: {problem}"[:200]
        for count in tokens:
            row = {
                "layer": layer,
                "outputs": case.out_features,
                "inputs": case.in_features,
                "rows": count,
                "packed_bytes": case.packed_bytes,
                "floor": floor(case, count, self.ceilings),
                "times": times[count],
                "rotation": measure_rotation(case, count),
                "errors": errors,
            }
            self.rows.append(row)
        return True

    def _measure_method(
        self,
        title: str,
        name: str,
        case: LinearCase,
        times: dict[int, dict[str, float]],
        errors: dict[str, float],
    ) -> None:
        prepared = METHODS[name](case)
        for count in times:
            if time.monotonic() > self.deadline:
                self.left_out.setdefault(title, "out of time")
                return
            x = torch.randn(count, case.in_features, device=case.device, dtype=DTYPE)
            errors[name] = relative_error(prepared, x, case, MOST_PEER_ERROR if name in PEERS else MOST_ERROR)
            times[count][name] = median_seconds(lambda i, x=x: prepared.run(x, i), prepared.sets)
