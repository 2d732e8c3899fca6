"""Kernels compiled ahead: those that the launch table selects, side by side, and once."""

import functools
import json
import threading
import time

import pytest
import torch

pytest.importorskip("triton")

from bq_kernels import ops, triton_linear, triton_rotate, warming
from triton import knobs

pytestmark = pytest.mark.skipif(ops.interpreted(), reason="an interpreted kernel cannot be compiled")

LAYERS = {"qkv": (12288, 4096), "o": (4096, 4096), "down": (4096, 11008)}  # of LLaMA-2-7B; N, K
GROUP = 128


meta = functools.partial(torch.empty, device="meta", dtype=torch.float16)


def tables(blocks, block_size):
    layers = block_size.bit_length() - 1
    shapes = (blocks, 2, layers, block_size // 2), (blocks, 1, 1)
    return [meta(*shape, dtype=torch.float32) for shape in shapes]


def linear(rows, out_features, in_features, bits=2, block=GROUP):
    """A packed linear on tensors without memory."""
    tiles = meta(-(-out_features // 64), in_features // 128, 256 * bits, dtype=torch.int32)
    scales = meta(in_features // GROUP, -(-out_features // 64) * 64)
    layer = tiles, scales, None, None, out_features, *tables(in_features // block, block)
    return triton_linear.packed_linear(meta(rows, in_features), *layer)


def record(rows):
    with warming.recording() as found:
        for count in rows:
            for shape in LAYERS.values():
                linear(count, *shape)
    return found


def constant(specialization, name):
    """Value of a compile-time argument."""
    data = json.loads(specialization.data)
    place = [specialization.kernel.arg_names.index(name)]
    return dict(zip(map(tuple, data["constant_keys"]), data["constant_vals"], strict=True))[tuple(place)]


def test_kernels_are_those_of_the_launch_table(gpu):
    multiply = {"decode": "_decode_kernel", "gemm": "_gemm_kernel", "dense": "_dequantize_kernel"}
    for rows in (1, 2, 16, 64, 4096):
        line, found = triton_linear.choose(gpu, rows), record([rows])
        expected = {multiply[line.kernel]} | (set() if line.fuse else {"_rotate_kernel"})
        assert {wanted.kernel.__name__ for wanted in found} == expected
        if line.kernel == "gemm":
            blocks = {constant(wanted, "BLOCK_M") for wanted in found if wanted.kernel.__name__ == "_gemm_kernel"}
            assert blocks == {line.block_m}


def test_few_numbers_of_rows_stand_for_all(gpu):
    every = record(range(1, 600))
    most = 2048
    representative = warming.representative_rows(most)
    assert len(representative) < 100 and representative[0] == 1 and representative[-1] == most
    assert record(representative).keys() == every.keys() | record([most, most - 1]).keys()
    lines = [line for name in ("sm80", "sm90", "gfx942") for line in triton_linear.launches("", name)]
    assert max(line.max_rows for line in lines if line.kernel == "gemm") <= warming.MOST_SPLIT_ROWS
    assert warming.representative_rows(1) == [1] and warming.representative_rows(3) == [1, 2, 3]


def test_compiled_once_and_side_by_side(gpu, monkeypatch):
    hits, threads = [], set()
    monkeypatch.setattr(warming.os, "cpu_count", lambda: 2)

    def listen(*, cache_hit, **_):
        hits.append(cache_hit)
        threads.add(threading.get_ident())
        time.sleep(0.05)  # so that one thread cannot do it all

    with warming.recording() as found:
        triton_rotate.apply_rotation(meta(1, 256), *tables(2, 128))
        triton_rotate.apply_rotation(meta(16, 256), *tables(4, 64))
        triton_rotate.apply_rotation(meta(32, 256), *tables(4, 64))
    assert len(found) > 1
    with knobs.compilation.scope():
        knobs.compilation.listener = listen
        assert warming.compile_kernels([*found, *found]) == {}
        assert hits == [False] * len(found) and len(threads) == 2
        kernel = triton_rotate._rotate_kernel
        assert len(kernel.device_caches[0][0]) == len(found)  # its launch finds them
        kernel.device_caches.clear()  # as in a second process
        assert warming.compile_kernels(found) == {}
        assert hits[len(found) :] == [True] * len(found)


def test_a_kernel_that_cannot_be_compiled_is_named(gpu):
    with warming.recording() as found:
        triton_rotate.apply_rotation(meta(1, 256), *tables(2, 128))
    [good] = found
    broken = good._replace(data=good.data.replace('"num_warps": 1', '"num_warps": 3'))
    assert broken != good
    [(named, problem)] = warming.compile_kernels([broken]).items()
    assert named is broken and isinstance(problem, Exception)


def test_a_kernel_that_fails_beside_others_is_compiled_alone(gpu, monkeypatch):
    """`ast.parse` is not made for two threads at once in every Python; here it fails in every thread but this one."""
    with warming.recording() as found:
        triton_rotate.apply_rotation(meta(1, 256), *tables(2, 128))
        triton_rotate.apply_rotation(meta(16, 256), *tables(4, 64))
    parse = triton_rotate.butterfly.parse

    def parse_here():
        if threading.current_thread() is not threading.main_thread():
            raise SystemError("AST constructor recursion depth mismatch")
        return parse()

    monkeypatch.setattr(triton_rotate.butterfly, "parse", parse_here)
    compilation = warming.Compilation()
    compilation.add(found)
    assert compilation.wait() == {}
    assert all(build.exception() for build in compilation.builds.values())
    assert len(triton_rotate._rotate_kernel.device_caches[0][0]) == len(found)


def test_other_threads_are_not_recorded(gpu):
    compiled = []
    with warming.recording() as found:
        triton_rotate.apply_rotation(meta(1, 256), *tables(2, 128))
        [wanted] = found
        thread = threading.Thread(target=lambda: compiled.append(wanted.kernel.preload(wanted.data)))
        thread.start()
        thread.join()
    assert len(found) == 1 and compiled[0] is not None
