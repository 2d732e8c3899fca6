"""QuaRot's own 4-bit linear as a row: quantize x, multiply, dequantize, by the CUDA kernels of its repository.

Nothing of QuaRot is here. `kernels.py build-quarot` compiles three functions of a copy of github.com/spcl/QuaRot, which
the user gives together with CUTLASS's headers, into a library without any dependence on Python or torch; BQ_QUAROT
names the library. Its kernels are launched on the default stream, which no CUDA graph can capture; compiled with
`--default-stream per-thread` they go to a stream of the calling thread, which can be.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import torch

from benchmarks.packed_linear.cases import LinearCase

VARIABLE = "BQ_QUAROT"
SOURCES = ("gemm.cu", "quant.cu")
LARGEST = 7  # of 4-bit codes, with sign; QuaRot's scales are |x|'s maximum over 7
PER_THREAD_STREAM = 2  # cudaStreamPerThread of CUDA's runtime
# matmul_host(A, B, M, N, K, C), sym_quant_host(x, scale, rows, colsSrc, colsDst, q),
# sym_dequant_host(q, scale_row, scale_col, rows, cols, x), as C++ names them in the library
MATMUL = "_Z11matmul_hostPKhS0_jjjPi"
QUANTIZE = "_Z14sym_quant_hostPK6__halfS1_jjjPh"
DEQUANTIZE = "_Z16sym_dequant_hostPKiPK6__halfS3_jjPS1_"


def build_command(source: Path, cutlass: Path, out: Path, arch: str, nvcc: str = "nvcc") -> list[str]:
    """nvcc's call that compiles QuaRot's quantization and GEMM.

    Args:
        source: a copy of QuaRot's repository.
        cutlass: a copy of CUTLASS's repository.
        out: shared library to write.
        arch: `sm_90`, `sm_80`, …
        nvcc: the compiler.
    """
    kernels = source / "quarot" / "kernels"
    folders = (kernels / "include", cutlass / "include", cutlass / "tools" / "util" / "include")
    target = f"arch={arch.replace('sm', 'compute')},code={arch}"
    return [
        *(nvcc, "-shared", "-Xcompiler", "-fPIC", "-std=c++17", "-O3", "-w", "-gencode", target),
        *("--default-stream", "per-thread"),
        *(f"-I{folder}" for folder in folders),
        *(str(kernels / name) for name in SOURCES),
        *("-o", str(out)),
    ]


@functools.cache
def _library() -> ctypes.CDLL:
    path = os.environ.get(VARIABLE)
    if not path:
        raise ImportError(f"{VARIABLE} names no library; build-quarot makes one")
    library = ctypes.CDLL(path)
    pointer, number = ctypes.c_void_p, ctypes.c_uint32
    library[MATMUL].argtypes = [pointer, pointer, number, number, number, pointer]
    library[QUANTIZE].argtypes = [pointer, pointer, number, number, number, pointer]
    library[DEQUANTIZE].argtypes = [pointer, pointer, pointer, number, number, pointer]
    return library


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to 4 bits with one scale per row.

    Args:
        weight: [N, K], K even.

    Returns:
        codes in two's complement, two per byte, low half first, uint8 [N, K/2]; scales float16 [N].
    """
    scales = (weight.abs().amax(dim=1) / LARGEST).half()
    codes = (weight / scales.float()[:, None]).round().clamp(-LARGEST - 1, LARGEST).to(torch.int8).view(torch.uint8)
    return (codes[:, 0::2] & 15) | (codes[:, 1::2] << 4), scales


class QuarotLinear:
    """The linear of one layer, with several sets of weights.

    Args:
        case: the layer; its first set of weights is rounded, the others are random codes.
    """

    def __init__(self, case: LinearCase) -> None:
        self.library, self.stream = _library(), torch.cuda.ExternalStream(PER_THREAD_STREAM)
        self.out_features, self.in_features = case.out_features, case.in_features
        codes, self.scales = quantize_rows(case.weight)
        more = case.sets(codes.nbytes) - 1
        self.codes = [codes, *(torch.randint_like(codes, 256) for _ in range(more))]

    def __call__(self, x: torch.Tensor, i: int) -> torch.Tensor:
        """y [M, N] of x [M, K], float16, with the i-th set; safe in a CUDA graph."""
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            out = self._launch(x, self.codes[i])
        current.wait_stream(self.stream)
        return out

    def _launch(self, x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        rows, n, k = x.shape[0], self.out_features, self.in_features
        scales = (x.abs().amax(dim=1, keepdim=True) / LARGEST).half()
        packed = torch.empty(rows, k // 2, dtype=torch.uint8, device=x.device)
        sums = torch.empty(rows, n, dtype=torch.int32, device=x.device)
        out = torch.empty(rows, n, dtype=torch.float16, device=x.device)
        self.library[QUANTIZE](x.data_ptr(), scales.data_ptr(), rows, k, k // 2, packed.data_ptr())
        self.library[MATMUL](packed.data_ptr(), codes.data_ptr(), rows, n, k, sums.data_ptr())
        self.library[DEQUANTIZE](sums.data_ptr(), scales.data_ptr(), self.scales.data_ptr(), rows, n, out.data_ptr())
        return out
