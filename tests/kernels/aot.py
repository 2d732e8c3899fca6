"""Ahead-of-time builds of the kernels that the launchers launch, and a report on their machine code; needs no GPU."""

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import triton
from bq_kernels.gpu import Gpu
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# target, bytes of shared memory that a program may have, whether it has programmatic dependent launch
TARGETS = {
    "sm80": (GPUTarget("cuda", 80, 32), 163 * 1024, False),
    "sm90": (GPUTarget("cuda", 90, 32), 227 * 1024, True),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024, False),
}
# without lines of their own in launch.json: they must fit those of the nearest capability
BORROWING_TARGETS = {
    "sm89": (GPUTarget("cuda", 89, 32), 99 * 1024, False),
    "sm100": (GPUTarget("cuda", 100, 32), 227 * 1024, True),
    "sm120": (GPUTarget("cuda", 120, 32), 99 * 1024, True),
}
ALL_TARGETS = TARGETS | BORROWING_TARGETS
TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.int8: "*i8",
}
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")


@dataclass
class Report:
    """Resources of a build.

    Attributes:
        registers: per thread.
        spilled: bytes per thread.
        shared: bytes of shared memory that a launch allocates.
        static_shared: bytes that the code itself declares, and that the system keeps (NVIDIA only).
        loop: instructions of the hottest loop by name (NVIDIA only).
        code: names of all instructions in their order (NVIDIA only).
    """

    registers: int
    spilled: int
    shared: int
    static_shared: int
    loop: Counter
    code: list[str]

    def programs(self, threads: int, shared_per_multiprocessor: int) -> int:
        """Programs that a multiprocessor of 65,536 registers and 2,048 threads holds at a time."""
        by_registers = 65536 // (-(-self.registers // 8) * 8 * threads)
        by_shared = shared_per_multiprocessor // max(self.shared + self.static_shared, 1)
        return min(by_registers, by_shared, 2048 // threads)

    def count(self, *names: str) -> int:
        """Instructions of the loop whose name starts with one of `names`."""
        return sum(number for name, number in self.loop.items() if name.startswith(names))


@dataclass
class Launched:
    """A launch that was recorded instead of made."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple
    config: dict[str, Any]

    @property
    def source(self) -> tuple:
        """What `build` and `inspect` take."""
        return self.kernel, self.arguments, self.config

    def tensors(self) -> list[torch.Tensor]:
        """The tensors among the arguments."""
        return [value for value in self.arguments if isinstance(value, torch.Tensor)]


@dataclass
class Recorder:
    """Stands in for a kernel and keeps its launches."""

    kernel: Any
    launches: list[Launched]

    def __getitem__(self, grid):
        return lambda *arguments, **config: self.launches.append(Launched(self.kernel, grid, arguments, config))


def record_launches(monkeypatch, target, kernels, launcher_module, launcher, *arguments):
    """The launches that a call makes on a GPU like an H100, and what it returns; `kernels`: (module, name) of all."""
    launches = []
    with monkeypatch.context() as patch:
        for module, name in kernels:
            patch.setattr(module, name, Recorder(getattr(module, name), launches))
        patch.setattr(launcher_module, "gpu_of", lambda tensor: Gpu("", target, 132, ALL_TARGETS[target][2]))
        result = getattr(launcher_module, launcher)(*arguments)
    assert launches
    return launches, result


def record(monkeypatch, target, kernel_module, kernel, launcher_module, launcher, *arguments):
    """Kernel, arguments and options of every launch that a call on `meta` tensors makes on a GPU like an H100."""
    kernels = [(kernel_module, kernel)]
    launches, _ = record_launches(monkeypatch, target, kernels, launcher_module, launcher, *arguments)
    return [launch.source for launch in launches]


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
        if isinstance(value, float):
            signature[name] = "fp32"
            continue
        signature[name] = TYPES[value.dtype] if isinstance(value, torch.Tensor) else "i32"
        if (value.data_ptr() if isinstance(value, torch.Tensor) else value) % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options)


def _hottest_loop(sass: str) -> Counter:
    """Instructions of the loop with the most matrix instructions, then the longest, among those without inner loops."""
    lines, labels, loops = sass.splitlines(), {}, []
    for i, line in enumerate(lines):
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = i
        jump = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
        if jump and jump[1] in labels:
            loops.append((labels[jump[1]], i))
    inner = [(a, b) for a, b in loops if b > a + 1 and not any(a < c and d < b for c, d in loops)]
    counts = [Counter(found[1] for line in lines[a:b] if (found := INSTRUCTION.search(line))) for a, b in inner]
    weight = [(sum(n for name, n in c.items() if "MMA" in name), c.total()) for c in counts]
    return counts[weight.index(max(weight))] if counts else Counter()


def inspect(kernel, arguments, config, target, tmp_path) -> Report:
    """Build for a target and read the result; fails where registers spill or shared memory does not suffice."""
    gpu, shared_limit, _ = ALL_TARGETS[target]
    built = build(kernel, arguments, config, gpu)
    loop, code, static = Counter(), [], 0
    if gpu.backend == "cuda":
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(built.asm["cubin"])

        def ask(tool, *flags):
            return subprocess.run([tool.path, *flags, cubin], capture_output=True, text=True, check=True).stdout

        usage = ask(triton.knobs.nvidia.cuobjdump, "--dump-resource-usage")
        keys = "REG", "STACK", "LOCAL", "SHARED"
        registers, stack, local, static = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in keys)
        spilled = stack + local
        sass = ask(triton.knobs.nvidia.nvdisasm, "-c")
        loop, code = _hottest_loop(sass), INSTRUCTION.findall(sass)
    else:
        assembly = built.asm["amdgcn"]
        registers, spills, private = (
            int(re.search(rf"\.{key}:\s+(\d+)", assembly)[1])
            for key in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
        )
        spilled = spills + private
    report = Report(registers, spilled, built.metadata.shared, static, loop, code)
    top = ", ".join(f"{name} {number}" for name, number in loop.most_common(6))
    print(f"{target}: {registers} registers, {report.shared} bytes of shared memory; loop {loop.total()}: {top}")
    assert report.spilled == 0
    assert report.shared <= shared_limit
    return report
