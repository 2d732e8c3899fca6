"""Ahead-of-time builds, no GPU needed: what the launchers launch compiles, and stays in registers and shared memory."""

import itertools
import re
import subprocess

import pytest
import torch

pytest.importorskip("triton")

import triton
from bq_kernels import ops, triton_linear, triton_rotate
from bq_kernels.format import split_block
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

pytestmark = pytest.mark.skipif(ops.interpreted(), reason="an interpreted kernel cannot be compiled")

HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32
TARGETS = {
    "sm80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}
TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
}


class Recorder:
    """Stands in for a kernel and keeps what it is launched with."""

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *arguments, **config):
        self.arguments, self.config = arguments, config


def record(monkeypatch, module, kernel, launcher, *tensors):
    recorder = Recorder()
    monkeypatch.setattr(module, kernel, recorder)
    getattr(module, launcher)(*tensors)
    monkeypatch.undo()
    return getattr(module, kernel), recorder.arguments, recorder.config


def build(kernel, arguments, config, target):
    """Compile for the arguments of a launch, specialised as Triton does on one: None, 1 and multiples of 16."""
    names = kernel.arg_names
    constants = {name: value for name, value in config.items() if name in names}
    options = {name: value for name, value in config.items() if name not in names}
    signature, attributes = dict.fromkeys(names, "constexpr"), {}
    for i, (name, value) in enumerate(zip(names, arguments, strict=False)):
        if value is None or (isinstance(value, int) and value == 1):
            constants[name] = value
            continue
        signature[name] = TYPES[value.dtype] if isinstance(value, torch.Tensor) else "i32"
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options)


def check(kernel, arguments, config, target, tmp_path):
    gpu, shared_limit = TARGETS[target]
    built = build(kernel, arguments, config, gpu)
    if gpu.backend == "cuda":
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(built.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
        assert (stack, local) == (0, 0), usage
        assert registers <= 255
    else:
        code = built.asm["amdgcn"]
        registers, spills, private = (
            int(re.search(rf"\.{key}:\s+(\d+)", code)[1])
            for key in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
        )
        assert (spills, private) == (0, 0)
    assert built.metadata.shared <= shared_limit
    print(f"{target}: {registers} registers, {built.metadata.shared} bytes of shared memory, {config}")


def cases(*combinations):
    """Every combination for every target: on Hopper always, on the others as a slow test."""
    for case, target in itertools.product(combinations, TARGETS):
        yield pytest.param(*case, target, marks=[pytest.mark.slow] * (target != "sm90"))


@pytest.mark.parametrize(
    ("block_size", "rows", "dtype", "target"),
    cases((64, 1, HALF), (64, 256, BRAIN), (512, 64, HALF), (4096, 64, BRAIN), (11008, 1, HALF), (13824, 64, HALF)),
)
def test_rotation(block_size, rows, dtype, target, monkeypatch, tmp_path):
    k, m = split_block(block_size)
    blocks = max(4096 // block_size, 1)
    launch = record(
        monkeypatch,
        triton_rotate,
        "_rotate_kernel",
        "apply_rotation",
        torch.empty(rows, blocks * block_size, dtype=dtype, device="meta"),
        torch.empty(blocks, 2, k, block_size // 2, device="meta"),
        torch.empty(blocks, m, m, device="meta"),
    )
    check(*launch, target, tmp_path)


@pytest.mark.parametrize(
    ("bits", "float_zero", "group", "rows", "dtype", "target"),
    cases(
        *itertools.product((2, 3), (False, True), (128,), (1,), (HALF,)),
        *itertools.product((2, 3), (False, True), (128,), (64,), (BRAIN,)),
        (4, False, 128, 1, BRAIN),
        (4, True, 128, 64, HALF),
        (2, False, 64, 1, BRAIN),
        (2, True, 64, 32, HALF),
        (3, True, 64, 8, FLOAT),
    ),
)
def test_linear(bits, float_zero, group, rows, dtype, target, monkeypatch, tmp_path):
    in_features, out_features = 4096, 4096
    groups = torch.empty(out_features, in_features // group, dtype=HALF, device="meta")
    launch = record(
        monkeypatch,
        triton_linear,
        "_linear_kernel",
        "packed_linear",
        torch.empty(rows, in_features, dtype=dtype, device="meta"),
        torch.empty(out_features, in_features * bits // 32, dtype=torch.int32, device="meta"),
        groups,
        groups if float_zero else None,
        torch.empty(out_features, dtype=dtype, device="meta") if float_zero else None,
    )
    check(*launch, target, tmp_path)
