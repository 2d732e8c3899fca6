"""Runs the PTX of a compiled kernel on the CPU: what the machine code computes, without a GPU.

All threads of a program step together, program after program. Memory is checked: accesses lie within one allocation
and are aligned, loads read what was written, and what the kernel before writes (`late`) is unknown before
griddepcontrol.wait. Branches must be uniform within a program. Neither time nor races between warps are simulated, nor
how a matrix unit rounds: it sums up in float64.

It knows the instructions that the kernels under test use, and fails on others.
"""

import math
import operator
import re

import numpy as np
import torch

from .aot import ALL_TARGETS, Launched, build

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {16: np.int16, 32: np.int32, 64: np.int64}
LABEL = re.compile(r"\s*([$A-Za-z_.][\w$.]*):(?!:)")
COMPARE = {name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}
INTEGER = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "add": np.add,
    "sub": np.subtract,
    "min": np.minimum,
    "max": np.maximum,
}
FLOAT = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "fma": lambda a, b, c: a * b + c,
    "neg": np.negative,
    "abs": np.abs,
    "min": np.minimum,
    "max": np.maximum,
}


class Memory:
    """Bytes in allocations with gaps between them, and which of them have been written."""

    def __init__(self, size: int):
        self.data = np.zeros(size, np.uint8)
        self.known = np.zeros(size, bool)
        self.owner = np.zeros(size, np.int32)
        self.top, self.count = 4096, 0

    def allocate(self, size: int, content: bytes = b"") -> int:
        """Address of `size` new bytes; they are unknown where `content` does not fill them."""
        start = -(-self.top // 256) * 256
        self.count += 1
        self.owner[start : start + size] = self.count
        self.data[start : start + len(content)] = np.frombuffer(content, np.uint8)
        self.known[start : start + len(content)] = True
        self.top = start + size + 256
        return start

    def _places(self, address: np.ndarray, size: int) -> np.ndarray:
        assert not (address % size).any(), "misaligned"
        places = address[:, None] + np.arange(size)
        owner = self.owner[places]
        assert (owner > 0).all() and (owner == owner[:, :1]).all(), "out of bounds"
        return places

    def load(self, address: np.ndarray, size: int) -> np.ndarray:
        """Bytes [threads, size]."""
        places = self._places(address, size)
        assert self.known[places].all(), "reads what was never written, or not yet"
        return self.data[places]

    def store(self, address: np.ndarray, raw: np.ndarray) -> None:
        """Store bytes [threads, size]."""
        places = self._places(address, raw.shape[1])
        self.data[places] = raw
        self.known[places] = True


def _split(operands: str) -> list[str]:
    return [item.strip() for item in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", operands)]


class Parser:
    """Cuts the PTX of one kernel into instructions (guard, operation, operands); names of inner scopes get a number."""

    def __init__(self, ptx: str, name: str):
        entry = ptx[ptx.index(f".entry {name}") :]
        head = entry[: entry.index("\n{")]
        self.params = re.findall(rf"\b({name}_param_\d+)", head)
        self.threads = int(re.search(r"\.reqntid (\d+)", head)[1])
        self.extern = re.findall(r"\.extern \.shared \.align \d+ \.b8 (\w+)\[", ptx)
        self.program, self.labels, self.shared = [], {}, []
        self.scopes, self.fresh = [{}], 0
        body = re.sub(r"//[^\n]*", "", entry[entry.index("\n{") + 2 :])
        body = re.sub(r"^\s*\.(loc|file|section|pragma)[^\n;]*;?$", "", body, flags=re.M)
        self._parse(body)

    def _parse(self, body: str) -> None:
        place = 0
        while True:
            if body[place].isspace() or body[place] == ";":
                place += 1
            elif body[place] == "{":
                self.scopes.append({})
                place += 1
            elif body[place] == "}":
                if len(self.scopes) == 1:
                    return
                self.scopes.pop()
                place += 1
            elif label := LABEL.match(body, place):
                self.labels[label[1]] = len(self.program)
                place = label.end()
            else:
                end = body.index(";", place)
                self._statement(" ".join(body[place:end].split()))
                place = end + 1

    def _declare(self, name: str) -> str:
        self.fresh += 1
        self.scopes[-1][name] = name if len(self.scopes) == 1 else f"{name}#{self.fresh}"
        return self.scopes[-1][name]

    def _rename(self, match: re.Match) -> str:
        return next((scope[match[0]] for scope in reversed(self.scopes[1:]) if match[0] in scope), match[0])

    def _statement(self, text: str) -> None:
        if registers := re.match(r"\.reg \.\w+ (.*)", text):
            for item in registers[1].split(","):
                several = re.match(r"\s*(%?\w+)<(\d+)>", item)
                for name in [f"{several[1]}{i}" for i in range(int(several[2]))] if several else [item.strip()]:
                    self._declare(name)
        elif shared := re.match(r"\.shared \.align \d+ \.b8 (\w+)\[(\d+)\]", text):
            self.shared.append((self._declare(shared[1]), int(shared[2])))
        else:
            guard = None
            if guarded := re.match(r"@(!?)(%?\w+) (.*)", text):
                guard, text = (guarded[1] == "!", re.sub(r"%?\w+", self._rename, guarded[2])), guarded[3]
            operation, _, rest = text.partition(" ")
            operands = _split(re.sub(r"%?[A-Za-z_][\w.]*", self._rename, rest))
            self.program.append((guard, operation, operands))


class Simulator:
    """A compiled kernel. `executed` counts instructions of one thread over all programs.

    Args:
        ptx: text of the compiler.
        name: of the kernel.
        shared_size: bytes of shared memory that a launch allocates.
    """

    def __init__(self, ptx: str, name: str, shared_size: int):
        self.code, self.shared_size, self.executed = Parser(ptx, name), shared_size, 0
        self.threads = self.code.threads

    def run(self, memory: Memory, arguments: list[int], grid: tuple[int, ...], late: list[tuple[int, int]]) -> None:
        """Run the programs of a launch; `late`: (address, bytes) of what the kernel before writes."""
        self.memory, self.arguments = memory, dict(zip(self.code.params, arguments, strict=True))
        self.grid = (*grid, 1, 1)[:3]
        for self.block in range(math.prod(grid)):
            self.waited, self.late = not late, late
            for address, size in late:
                memory.known[address : address + size] = False
            self._run_program()
            assert self.waited, "never waits for the kernel before"

    def _run_program(self) -> None:
        code, self.registers, self.symbols = self.code, {}, {}
        self.own = Memory(8192 + self.shared_size + sum(size + 512 for _, size in code.shared))
        for name in code.extern:
            self.symbols[name] = self.own.allocate(self.shared_size)
        for name, size in code.shared:
            self.symbols[name] = self.own.allocate(size)
        place = 0
        while True:
            guard, operation, operands = code.program[place]
            place += 1
            self.executed += 1
            self.mask = None
            if guard:
                self.mask = ~self._predicate(guard[1]) if guard[0] else self._predicate(guard[1])
            if operation in ("bra", "bra.uni", "ret"):
                taken = self.mask is None or bool(self.mask.all())
                assert taken or not self.mask.any(), "divergent branch"
                if taken and operation == "ret":
                    return
                place = code.labels[operands[0]] if taken else place
                continue
            try:
                self._step(operation, operands)
            except Exception as problem:
                raise type(problem)(f"program {self.block}: {operation} {', '.join(operands)}: {problem}") from problem

    # ---- registers: unsigned integers of the width that was written last, or bool

    def _get(self, name: str, bits: int = 32) -> np.ndarray:
        if name in self.registers:
            value = self.registers[name]
            assert value.dtype == UNSIGNED[bits], f"{name} holds {value.dtype}"
            return value
        if name.startswith("0f"):
            number = int(name[2:], 16)
        elif re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)", name):
            number = int(name, 0) & ((1 << bits) - 1)
        elif name == "%tid.x":
            return np.arange(self.threads, dtype=np.uint32)
        elif place := re.fullmatch(r"%(n?)ctaid\.([xyz])", name):
            axis = "xyz".index(place[2])
            number = self.grid[axis] if place[1] else self.block // math.prod(self.grid[:axis]) % self.grid[axis]
        elif name in self.symbols:
            number = self.symbols[name]
        else:
            raise KeyError(f"{name} was never written")
        return np.full(self.threads, number, UNSIGNED[bits])

    def _float(self, name: str) -> np.ndarray:
        return self._get(name).view(np.float32).astype(np.float64)

    def _halves(self, name: str) -> np.ndarray:
        """[threads, 2]."""
        return np.ascontiguousarray(self._get(name)).view(np.float16).reshape(-1, 2).astype(np.float64)

    def _predicate(self, name: str) -> np.ndarray:
        if name in ("-1", "0", "1"):
            return np.full(self.threads, name != "0")
        return self.registers[name]

    def _put(self, name: str, value: np.ndarray) -> None:
        if self.mask is not None and not self.mask.all():
            value = np.where(self.mask, value, self.registers.get(name, np.zeros_like(value)))
        self.registers[name] = value

    def _put_float(self, name: str, value: np.ndarray) -> None:
        self._put(name, value.astype(np.float32).view(np.uint32))

    def _address(self, text: str) -> np.ndarray:
        base, offset = re.match(r"\[\s*([^+\]\s]+)\s*(?:\+\s*(-?\d+))?\s*\]", text).groups()
        value = self.registers[base] if base in self.registers else self._get(base)
        return value.astype(np.int64) + int(offset or 0)

    def _on(self) -> np.ndarray:
        return np.full(self.threads, True) if self.mask is None else self.mask

    # ---- instructions

    def _step(self, operation: str, operands: list[str]) -> None:
        part = operation.split(".")
        name, kind = part[0], part[-1]
        with np.errstate(all="ignore"):
            if name in ("ld", "st"):
                self._load_or_store(part, operands)
            elif name == "mma":
                assert operation == "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32" and self.mask is None
                self._multiply(*([item.strip() for item in group.strip("{}").split(",")] for group in operands))
            elif name == "movmatrix":
                assert operation == "movmatrix.sync.aligned.m8n8.trans.b16" and self.mask is None
                self._transpose(*operands)
            elif name == "griddepcontrol":
                if kind == "wait":
                    self.waited = True
                    for address, size in self.late:
                        self.memory.known[address : address + size] = True
            elif name == "shfl":
                self._shuffle(part[2], operands)
            elif name == "cvt":
                self._convert(part[-2], kind, operands)
            elif name == "mov":
                self._move(kind, operands)
            elif kind == "f16x2":
                values = [self._halves(item) for item in operands[1:]]
                result = FLOAT[name](*values).astype(np.float16)
                self._put(operands[0], np.ascontiguousarray(result).view(np.uint32)[:, 0])
            elif name == "setp":
                self._compare(part[1], kind, operands)
            elif name == "selp":
                bits = int(kind[1:])
                values = self._get(operands[1], bits), self._get(operands[2], bits)
                self._put(operands[0], np.where(self._predicate(operands[3]), *values))
            elif kind == "pred":
                self._put(operands[0], INTEGER[name](*(self._predicate(item) for item in operands[1:])))
            elif kind == "f32":
                self._put_float(operands[0], FLOAT[name](*(self._float(item) for item in operands[1:])))
            elif name != "bar":
                self._integer(name, part, operands)

    def _load_or_store(self, part: list[str], operands: list[str]) -> None:
        bits = int(part[-1][1:])
        if part[1] == "param":
            width = 64 if operands[0].startswith("%rd") else 32
            value = self.arguments[operands[1].strip("[]")] & ((1 << width) - 1)
            return self._put(operands[0], np.full(self.threads, value, UNSIGNED[width]))
        loads = part[0] == "ld"
        target, place = operands if loads else operands[::-1]
        memory, size = self.memory if part[1] == "global" else self.own, bits // 8
        names = [item.strip() for item in target.strip("{}").split(",")]
        address, on = self._address(place), self._on()
        assert not (address[on] % (size * len(names))).any(), "misaligned vector"
        assert loads or self.waited or memory is self.own, "stores before it waits"
        for i, name in enumerate(names):
            if loads:
                value = np.zeros(self.threads, UNSIGNED[bits])
                value[on] = memory.load(address[on] + i * size, size).view(UNSIGNED[bits])[:, 0]
                self._put(name, value)
            else:
                value = np.ascontiguousarray(self._get(name, bits)[on])
                memory.store(address[on] + i * size, value[:, None].view(np.uint8))
        return None

    def _multiply(self, d: list[str], a: list[str], b: list[str], c: list[str]) -> None:
        """D [16, 8] = A [16, 16] · B [16, 8] + C per warp, by the fragments of mma.m16n8k16."""
        lane, warps = np.arange(32), self.threads // 32
        g, t = lane // 4, lane % 4
        left, right, total = (np.zeros((warps, *shape)) for shape in ((16, 16), (16, 8), (16, 8)))
        for i, name in enumerate(a):
            halves = self._halves(name).reshape(warps, 32, 2)
            for side in range(2):
                left[:, g + i % 2 * 8, 2 * t + side + i // 2 * 8] = halves[:, :, side]
        for i, name in enumerate(b):
            halves = self._halves(name).reshape(warps, 32, 2)
            for side in range(2):
                right[:, 2 * t + side + i * 8, g] = halves[:, :, side]
        for i, name in enumerate(c):
            total[:, g + i // 2 * 8, 2 * t + i % 2] = self._float(name).reshape(warps, 32)
        total += left @ right
        for i, name in enumerate(d):
            self._put_float(name, total[:, g + i // 2 * 8, 2 * t + i % 2].reshape(-1))

    def _transpose(self, target: str, source: str) -> None:
        """An 8 × 8 matrix of halves per warp, of which lane 4g + t has columns 2t and 2t + 1 of row g."""
        matrix = np.ascontiguousarray(self._get(source)).view(np.uint16).reshape(-1, 8, 8)
        self._put(target, np.ascontiguousarray(matrix.transpose(0, 2, 1)).view(np.uint32).reshape(-1))

    def _shuffle(self, mode: str, operands: list[str]) -> None:
        value = self._get(operands[1]).reshape(-1, 32)
        number, limits = (self._get(item).reshape(-1, 32).astype(np.int64) for item in operands[2:4])
        lane, segment = np.arange(32), limits >> 8 & 31
        assert mode == "idx" and (limits & 31 == 31).all()
        source = lane & segment | number & 31 & ~segment
        self._put(operands[0], np.take_along_axis(value, source, 1).reshape(-1))

    def _convert(self, to: str, source: str, operands: list[str]) -> None:
        value = self._get(operands[1], 32 if source == "f32" else int(source.strip("bfsu")))
        if source == "f16":
            value = value.view(np.float16).astype(np.float32).view(np.uint32)
        elif source == "bf16":
            value = value.astype(np.uint32) << np.uint32(16)
        elif to == "f16":
            value = value.view(np.float32).astype(np.float16).view(np.uint16)
        elif to == "bf16":
            assert not np.isnan(value.view(np.float32)).any()
            rounded = value + np.uint32(0x7FFF) + (value >> np.uint32(16) & np.uint32(1))
            value = (rounded >> np.uint32(16)).astype(np.uint16)
        else:
            value = value.view(SIGNED[int(source[1:])]) if source[0] == "s" else value
            value = value.astype(SIGNED[int(to[1:])]).view(UNSIGNED[int(to[1:])])
        self._put(operands[0], value)

    def _move(self, kind: str, operands: list[str]) -> None:
        if kind == "pred":
            return self._put(operands[0], self._predicate(operands[1]).copy())
        bits = int(kind[1:])
        if operands[0].startswith("{"):
            names = [item.strip() for item in operands[0].strip("{}").split(",")]
            width, value = bits // len(names), self._get(operands[1], bits)
            for i, name in enumerate(names):
                self._put(name, (value >> value.dtype.type(i * width)).astype(UNSIGNED[width]))
        elif operands[1].startswith("{"):
            names = [item.strip() for item in operands[1].strip("{}").split(",")]
            width = bits // len(names)
            parts = [self._get(name, width).astype(UNSIGNED[bits]) for name in names]
            shifted = [part << UNSIGNED[bits](i * width) for i, part in enumerate(parts)]
            self._put(operands[0], np.bitwise_or.reduce(shifted))
        else:
            self._put(operands[0], self._get(operands[1], bits).copy())
        return None

    def _compare(self, relation: str, kind: str, operands: list[str]) -> None:
        if kind == "f32":
            values = [self._float(item) for item in operands[1:3]]
        else:
            bits = int(kind[1:])
            values = [self._get(item, bits) for item in operands[1:3]]
            values = [value.view(SIGNED[bits]) for value in values] if kind[0] == "s" else values
        self._put(operands[0], COMPARE[relation](*values))

    def _integer(self, name: str, part: list[str], operands: list[str]) -> None:
        kind = part[-1]
        bits = int(kind[1:])
        width = 2 * bits if "wide" in part or "hi" in part else bits
        values = [self._get(item, bits) for item in operands[1:3]]
        values = [value.view(SIGNED[bits]) for value in values] if kind[0] == "s" else values
        a, b = values[0], values[-1]
        if name in INTEGER:
            result = INTEGER[name](a, b)
        elif name in ("not", "neg"):
            result = ~a if name == "not" else -a
        elif name in ("mul", "mad"):
            result = a.astype(SIGNED[width]) * b.astype(SIGNED[width])
            if name == "mad":
                result = result + self._get(operands[3], width).view(SIGNED[width])
            elif "hi" in part:
                width, result = bits, result >> bits
        elif name in ("shl", "shr"):
            count = self._get(operands[2]).astype(a.dtype)
            assert (count < bits).all()
            result = a << count if name == "shl" else a >> count
        elif name == "shf":
            assert part[1:3] == ["r", "wrap"]
            both = b.astype(np.uint64) << np.uint64(32) | a
            result = both >> (self._get(operands[3]).astype(np.uint64) & np.uint64(31))
        elif name == "bfe":
            start, length = int(operands[2]), int(operands[3])
            up = a.dtype.type(bits - start - length)
            result = a << up >> a.dtype.type(bits - length)
        else:
            raise NotImplementedError(name)
        self._put(operands[0], result.astype(UNSIGNED[width]))


def simulate(launch: Launched, target: str, written_before: list[torch.Tensor]) -> None:
    """Run a launch on tensors on the CPU, which then hold what the machine code leaves there.

    With programmatic dependent launch, `written_before` must not be read before the wait for the kernel that writes it.
    """
    gpu, _, pdl = ALL_TARGETS[target]
    built = build(*launch.source, gpu)
    storages = {id(tensor): tensor.untyped_storage() for tensor in launch.tensors()}
    raw = {key: torch.tensor([], dtype=torch.uint8).set_(storage) for key, storage in storages.items()}
    memory = Memory(sum(len(content) + 1024 for content in raw.values()) + 8192)
    start = {key: memory.allocate(len(content), content.numpy().tobytes()) for key, content in raw.items()}
    arguments = []
    for value in launch.arguments:
        if isinstance(value, torch.Tensor):
            arguments.append(start[id(value)] + value.data_ptr() - storages[id(value)].data_ptr())
        elif value is not None and value != 1:  # those are compiled in
            arguments.append(value)
    late = [(start[id(tensor)], len(raw[id(tensor)])) for tensor in written_before] if pdl else []
    simulator = Simulator(built.asm["ptx"], launch.kernel.__name__, built.metadata.shared)
    simulator.run(memory, [*arguments, 0, 0], launch.grid, late)  # two of Triton's own come last
    for key, content in raw.items():
        content.copy_(torch.from_numpy(memory.data[start[key] : start[key] + len(content)]))
