"""Every shipped launch compiles, stays in registers and shared memory, and keeps its loop short enough.

`pytest -s` prints the report.
"""

import itertools
from collections import Counter

import pytest
import torch

pytest.importorskip("triton")

from bq_kernels import (
    ops,
    triton_arrange,
    triton_decode,
    triton_dequantize,
    triton_divergence,
    triton_gemm,
    triton_gemm_int8,
    triton_linear,
    triton_mma,
    triton_norm,
    triton_rotate,
    triton_rotate_int8,
)
from bq_kernels.format import split_block
from bq_kernels.triton_linear import Launch

from .aot import BORROWING_TARGETS, TARGETS, inspect, record, record_launches

pytestmark = pytest.mark.skipif(ops.interpreted(), reason="an interpreted kernel cannot be compiled")

HALF, BRAIN = torch.float16, torch.bfloat16
FEATURES = 8192  # enough for a decode program to get several tiles
# thread instructions that an H100 issues while a packed word arrives: 132 multiprocessors × 4 × 32 lanes × 1.755 GHz
# over 3.0 TB/s ÷ 4 bytes. A loop with more is held back by arithmetic, not by memory.
ROOFLINE = 39.5
SLACK = 1.15  # float zeros and groups of 32 take a little more, and may


def meta(*shape, dtype=HALF):
    return torch.empty(*shape, dtype=dtype, device="meta")


def on_targets(*combinations, slow=()):
    """Every combination for every target: on Hopper always, on the others and for those in `slow` as a slow test."""
    for case, target in itertools.product((*combinations, *slow), TARGETS):
        yield pytest.param(*case, target, marks=[pytest.mark.slow] * (target != "sm90" or case in slow))


@pytest.mark.parametrize(("vocabulary", "dtype", "target"), on_targets((49152, BRAIN), (128256, BRAIN), (32000, HALF)))
def test_divergence(vocabulary, dtype, target, monkeypatch, tmp_path):
    module, logits = triton_divergence, meta(8192, vocabulary, dtype=dtype)
    (launch,) = record(monkeypatch, target, module, "_divergence_kernel", module, "divergence_", logits, logits)
    inspect(*launch, target, tmp_path)


@pytest.mark.parametrize(
    ("block_size", "rows", "dtype", "target"),
    on_targets(
        (64, 1, HALF),
        (128, 4096, BRAIN),
        (512, 64, HALF),
        (4096, 64, BRAIN),
        (8192, 1, HALF),
        (11008, 1, HALF),
        (13824, 64, HALF),
        slow=[(28672, 64, HALF)],
    ),
)
def test_rotation(block_size, rows, dtype, target, monkeypatch, tmp_path):
    k, m = split_block(block_size)
    blocks = max(FEATURES // block_size, 1)
    tables = meta(blocks, 2, k, block_size // 2, dtype=torch.float32), meta(blocks, m, m, dtype=torch.float32)
    x = meta(rows, blocks * block_size, dtype=dtype)
    module = triton_rotate
    for launch in record(monkeypatch, target, module, "_rotate_kernel", module, "apply_rotation", x, *tables):
        inspect(*launch, target, tmp_path)


@pytest.mark.parametrize(
    ("features", "block_size", "rows", "dtype", "target"),
    on_targets(
        (8192, 128, 1, HALF),
        (5120, 5120, 16, BRAIN),
        slow=[(1536, 1536, 4, HALF), (11008, None, 4096, BRAIN)],
    ),
)
def test_norm(features, block_size, rows, dtype, target, monkeypatch, tmp_path):
    tables, x = (), meta(rows, features, dtype=dtype)
    if block_size:
        k, m = split_block(block_size)
        blocks = features // block_size
        tables = meta(blocks, 2, k, block_size // 2, dtype=torch.float32), meta(blocks, m, m, dtype=torch.float32)
    arguments = x, x, meta(features, dtype=torch.float32), 1e-5, *tables
    kernels = [(triton_norm, "_norm_kernel"), (triton_rotate, "_rotate_kernel")]
    launches, _ = record_launches(monkeypatch, target, kernels, triton_norm, "rms_norm", *arguments)
    for launch in launches:
        inspect(*launch.source, target, tmp_path)


def layer(bits, group, float_zero, in_features=FEATURES):
    tiles = meta(FEATURES // 64, in_features // 128, 256 * bits, dtype=torch.int32)
    scales = meta(in_features // group, FEATURES)
    return tiles, scales, scales if float_zero else None


KINDS = [  # bits, group, float zero, dtype
    (2, 128, False, HALF),
    (2, 64, False, BRAIN),
    (2, 64, True, HALF),
    (3, 128, False, HALF),
    (4, 64, True, BRAIN),
]
MORE = [(2, 32, False, HALF), (2, 128, True, BRAIN), (4, 128, False, HALF)]  # on Hopper


def shipped():
    """Every line of launch.json for every kind of weight and target; the first kind on Hopper is not slow."""
    borrowed = itertools.product(BORROWING_TARGETS, KINDS[:1])
    for target, kind in [*itertools.product(TARGETS, KINDS), *itertools.product(["sm90"], MORE), *borrowed]:
        slow = target != "sm90" or kind != KINDS[0]
        for line in triton_linear.launches("", target):
            if line.kernel != "dense":
                zero = "float" if kind[2] else "midrise"
                name = f"{line.kernel}{line.max_rows}-{target}-{kind[0]}bit-g{kind[1]}-{zero}"
                yield pytest.param(line, *kind, target, marks=[pytest.mark.slow] * slow, id=name)


def check_decode_loop(report, line, bits, group, float_zero):
    """Of sm90: a thread reads its words straight from memory, 16 bytes at a time (third bits of a code 8 at a time).

    The codes never pass through shared memory.
    """
    words = triton_decode.kept_columns(line.slice, bits, group, float_zero) // 128 * 2 * bits
    wide = words if bits != 3 else words * 2 // 3
    assert report.count("LDG.E.128") == wide // 4
    assert report.count("LDS", "LDSM") <= 8
    instructions = report.loop.total() / words
    allowed = ROOFLINE * (bits + (32 if float_zero else 16) / group) / bits
    print(f"{instructions:.1f} instructions per packed word, {allowed:.1f} are hidden by its load from memory")
    assert instructions <= allowed * SLACK


@pytest.mark.parametrize(("line", "bits", "group", "float_zero", "dtype", "target"), shipped())
def test_linear(line, bits, group, float_zero, dtype, target, monkeypatch, tmp_path):
    module = {"decode": triton_decode, "gemm": triton_gemm}[line.kernel]
    tables = (None, None)
    if line.fuse:
        tables = meta(FEATURES // group, 2, 6, 32, dtype=torch.float32), meta(FEATURES // group, 1, 1)
    arguments = (
        meta(line.max_rows, FEATURES, dtype=dtype),
        *layer(bits, group, float_zero),
        None,
        FEATURES,
        *tables,
        line,
    )
    kernel = f"_{line.kernel}_kernel"
    [launch] = record(monkeypatch, target, module, kernel, triton_linear, "packed_linear", *arguments)
    report = inspect(*launch, target, tmp_path)
    if target != "sm90":
        return
    assert report.count("HGMMA") > 0
    assert report.count("LDL", "STL") == 0
    if line.kernel == "decode":
        check_decode_loop(report, line, bits, group, float_zero)
    else:
        assert report.count("LDGSTS.E.BYPASS.128", "LDGSTS.E.128", "LDG.E.128") > 0


def normed():
    for target, kind in itertools.product(TARGETS, KINDS):
        yield pytest.param(*kind, target, marks=[pytest.mark.slow] * (target != "sm90" or kind != KINDS[0]))


@pytest.mark.parametrize(("bits", "group", "float_zero", "dtype", "target"), normed())
def test_decode_behind_a_norm(bits, group, float_zero, dtype, target, monkeypatch, tmp_path):
    """The decode kernel that normalizes its row stays in registers as well, and its loop over weights is as short."""
    line, x = triton_linear.launches("", target)[0], meta(1, FEATURES, dtype=dtype)
    assert line.kernel == "decode" and line.fuse
    tables = meta(FEATURES // group, 2, group.bit_length() - 1, group // 2, dtype=torch.float32), meta(1, 1, 1)
    arguments = x, x, meta(FEATURES, dtype=dtype), 1e-5, *layer(bits, group, float_zero), None, FEATURES, *tables, line
    [launch] = record(monkeypatch, target, triton_decode, "_decode_kernel", triton_linear, "norm_linear", *arguments)
    report = inspect(*launch, target, tmp_path)
    if target == "sm90":
        check_decode_loop(report, line, bits, group, float_zero)


# bytes per multiprocessor that an H100's memory moves while a request waits: 3.35 TB/s (data sheet) × 0.7 µs (assumed)
# over 132. With fewer under way it idles.
BYTES_IN_FLIGHT = 17.8e3
KIB_PER_MULTIPROCESSOR = {"sm80": 164, "sm89": 100, "sm90": 228, "sm100": 228, "sm120": 100}  # of shared memory


def mma_launches():
    """Rows of x, kind of weight and launch; the first two on Hopper are not slow."""
    wide, narrow = Launch(16, "mma", 2, outputs=64, warps=8, stages=2), Launch(16, "mma", outputs=32, warps=8, stages=2)
    single = Launch(16, "mma", outputs=48, warps=8, stages=1)
    exact, many = (Launch(16, "mma", 2, outputs=64, warps=n, stages=2, exact=n == 8) for n in (8, 16))
    cases = [(1, *KINDS[0], wide), (16, *KINDS[0], single), (8, *KINDS[0], wide), (1, *KINDS[0], many)]
    cases += [(16, *KINDS[2], wide), (16, *KINDS[0], wide), (16, *KINDS[4], single), (8, *KINDS[3], many)]
    cases += [(8, *kind, launch) for kind in (*KINDS[1:], *MORE) for launch in (wide, narrow, exact)]
    borrowed = itertools.product(BORROWING_TARGETS, [(0, cases[0])])
    for target, (i, case) in [*itertools.product(("sm90", "sm80"), enumerate(cases)), *borrowed]:
        marks = [pytest.mark.slow] * (target != "sm90" or i > 1)
        yield pytest.param(*case, target, marks=marks, id=f"{target}-{i}")


def check_mma_loads(code, config, bits, float_zero):
    """Of sm90: a thread reads words 16 bytes at a time (third bits 8 at a time), scales and zeros by packets.

    Those of the first tiles are asked for before the wait for the kernel in front, and of later ones before the
    products of the tile that then comes: the compiler has not moved them behind those.
    """
    strips, stages = config["STRIPS"], config["STAGES"]
    wide, packets = strips * (2 if bits == 4 else 1), -(-strips * config["UNITS"] // 4) * (2 if float_zero else 1)
    tile = Counter({"LDG.E.NA.128": wide, "LDG.E.NA.64": strips * (bits == 3), "LDG.E.NA": packets})
    early = [name for name in code[: code.index("ACQBULK")] if name.startswith(("LDG", "STG", "ATOM", "RED"))]
    assert Counter(early) == Counter({name: number * stages for name, number in tile.items()})
    tiles, loads, products = code.count("LDG.E.NA.128") // wide, 0, 0
    for name in code:
        loads += name == "LDG.E.NA.128"
        if name.startswith("HMMA"):
            assert loads >= wide * min(stages + products // (8 * strips * config["BLOCKS"]), tiles)
            products += 1
    assert products > 0


@pytest.mark.parametrize(("rows", "bits", "group", "float_zero", "dtype", "launch", "target"), mma_launches())
def test_mma(rows, bits, group, float_zero, dtype, launch, target, monkeypatch, tmp_path):
    tables = meta(FEATURES // group, 2, group.bit_length() - 1, group // 2, dtype=torch.float32), meta(1, 1, 1)
    arguments = meta(rows, FEATURES, dtype=dtype), *layer(bits, group, float_zero), None, FEATURES, *tables, launch
    kernels = [(triton_arrange, "_arrange_kernel"), (triton_mma, "_mma_kernel")]
    (arrange, multiply), _ = record_launches(monkeypatch, target, kernels, triton_linear, "packed_linear", *arguments)
    before = inspect(*arrange.source, target, tmp_path)
    x, *packed = arguments
    norm = x, meta(FEATURES, dtype=dtype), 1e-5
    (arrange, _), _ = record_launches(monkeypatch, target, kernels, triton_linear, "norm_linear", x, *norm, *packed)
    inspect(*arrange.source, target, tmp_path)
    report = inspect(*multiply.source, target, tmp_path)
    config = multiply.config
    strips, stages = config["STRIPS"], config["STAGES"]
    # the sums lie in memory that the code itself declares; the loop, where one is left of few steps, stores nothing
    assert len(multiply.grid) == 1 and report.shared == 0 and report.count("BAR", "ST", "ATOM") == 0
    looped = report.count("HMMA") > 0
    words = 2 * bits * strips * (stages if looped else config["STEPS"])
    instructions = (report.loop.total() if looped else len(report.code)) / words
    allowed = ROOFLINE * (bits + (32 if float_zero else 16) / group) / bits
    in_flight = report.programs(32 * config["WARPS"], KIB_PER_MULTIPROCESSOR[target] * 1024)
    in_flight *= config["WARPS"] * stages * strips * (256 * bits + 32 * config["UNITS"] * (2 if float_zero else 1))
    print(f"{instructions:.1f} instructions per packed word of {allowed:.1f}, {in_flight} bytes in flight")
    assert instructions <= allowed * SLACK
    assert in_flight >= BYTES_IN_FLIGHT
    if target == "sm90":
        check_mma_loads(report.code, config, bits, float_zero)
        # of the kernel in front, tables of the rotation
        early = before.code[: before.code.index("ACQBULK")]
        assert sum(name.startswith("LDG") for name in early) > 0


@pytest.mark.parametrize(
    ("bits", "group", "float_zero", "dtype", "block_size", "target"),
    on_targets(
        (2, 128, False, HALF, None),
        (2, 128, False, HALF, 128),
        (2, 64, True, BRAIN, 64),
        (3, 32, False, HALF, 128),
        (2, 128, False, HALF, 8192),
        (4, 128, True, BRAIN, 11008),
        (3, 64, False, HALF, 512),
    ),
)
def test_dequantize(bits, group, float_zero, dtype, block_size, target, monkeypatch, tmp_path):
    """W′, W′ Q in tiles, and W′ Q by rows."""
    features, tables = FEATURES, (None, None)
    if block_size:
        k, m = split_block(block_size)
        blocks = max(FEATURES // block_size, 1)
        features = blocks * block_size
        tables = meta(blocks, 2, k, block_size // 2, dtype=torch.float32), meta(blocks, m, m, dtype=torch.float32)
    arguments = *layer(bits, group, float_zero, features), features, FEATURES, dtype, *tables
    module = triton_dequantize
    kernel = "_dequantize_kernel" if block_size is None or block_size <= 128 else "_dequantize_rows_kernel"
    [launch] = record(monkeypatch, target, module, kernel, module, "dequantize", *arguments)
    inspect(*launch, target, tmp_path)


@pytest.mark.parametrize(
    ("features", "block_size", "unit", "dtype", "target"),
    on_targets(
        (8192, 128, 128, HALF),
        (11008, 128, 32, BRAIN),
        (8192, 8192, 128, HALF),
        (28672, 64, 128, HALF),
        (13824, 13824, 128, BRAIN),
        slow=[(11008, 11008, 64, HALF), (14336, 14336, 64, HALF), (17408, 17408, 128, HALF)],
    ),
)
def test_rotate_to_int8(features, block_size, unit, dtype, target, monkeypatch, tmp_path):
    k, m = split_block(block_size)
    blocks = features // block_size
    tables = meta(blocks, 2, k, block_size // 2, dtype=torch.float32), meta(blocks, m, m, dtype=torch.float32)
    arguments = meta(2048, features, dtype=dtype), *tables, unit
    kernels = [(triton_rotate, "_rotate_kernel"), (triton_rotate_int8, "_rotate_to_int8_kernel")]
    launches, _ = record_launches(monkeypatch, target, kernels, triton_rotate_int8, "rotate_to_int8", *arguments)
    for launch in launches:
        inspect(*launch.source, target, tmp_path)


@pytest.mark.parametrize(
    ("bits", "group", "float_zero", "target"),
    on_targets(
        *((2, 128, False), (2, 64, False), (2, 128, True), (3, 32, False), (4, 128, False)),
        slow=[(3, 64, False), (4, 32, False), (4, 32, True), (4, 64, False), (4, 64, True)],
    ),
)
def test_gemm_int8(bits, group, float_zero, target, monkeypatch, tmp_path):
    x, x_scales = meta(2048, FEATURES, dtype=torch.int8), meta(FEATURES // group, 2048, dtype=torch.float32)
    arguments = x, x_scales, *layer(bits, group, float_zero), None, FEATURES, HALF
    module = triton_gemm_int8
    [launch] = record(monkeypatch, target, module, "_gemm_int8_kernel", module, "int8_linear", *arguments)
    report = inspect(*launch, target, tmp_path)
    if target == "sm90":
        assert report.count("IGMMA") > 0
