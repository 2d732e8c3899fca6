"""The pass that fuses an RMSNorm into the packed linear behind it, on graphs that torch.compile has traced."""

from types import SimpleNamespace

import pytest
import torch
from bq_kernels import ops, reference
from bq_kernels.format import num_angles
from bq_kernels.packing import pack
from bq_kernels.tiles import tile
from torch._dynamo.backends.common import aot_autograd

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = pytest.mark.skipif(ops.interpreted(), reason="the operators are the reference without TRITON_INTERPRET")

FEATURES, BLOCK, OUT, EPSILON = 96, 48, 7, 1e-5


@pytest.fixture(autouse=True)
def norms():
    """vLLM's norms as they are in a graph."""
    import vllm.ir.ops  # noqa: F401  registers them

    return torch.ops.vllm_ir


@pytest.fixture
def layer():
    """Arguments of a packed linear behind x, with a rotation."""
    scales = torch.rand(OUT, 3).half()
    packed = tile(pack(torch.randint(4, (OUT, FEATURES)), 2), scales, None, FEATURES)
    angles = torch.randn(FEATURES // BLOCK, num_angles(BLOCK))
    return [*packed, torch.randn(OUT), OUT, *reference.givens_tables(angles, BLOCK)]


def linear(x, layer):
    return torch.ops.bq.packed_linear(x, *layer)


def fused(function, *tensors) -> int:
    """Norms that the pass fuses in the graph of a function, whose results it must not change."""
    from bq_vllm.fuse_norm import fuse_norms

    counts = []

    def compiler(module, inputs):
        fuse_norms(module.graph)
        module.graph.lint()
        module.recompile()
        targets = [node.target for node in module.graph.nodes]
        counts.append(targets.count(torch.ops.bq.norm_linear.default))
        return module

    with torch.inference_mode():
        want = function(*tensors)
        torch._dynamo.reset()
        backend = aot_autograd(fw_compiler=compiler, inference_compiler=compiler)
        got = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)(*tensors)
    torch.testing.assert_close(got, want)
    (count,) = counts
    return count


def test_decoder_layer(norms, layer):
    """As in Llama: the first norm has no residual, the sum of the second goes on."""

    def decoder(x, weight):
        q = linear(norms.rms_norm(x, weight, EPSILON), layer)
        rows, residual = norms.fused_add_rms_norm(q.repeat(1, 14)[:, :FEATURES], x, weight, EPSILON)
        return linear(rows, layer).relu(), residual * 2

    assert fused(decoder, torch.randn(5, FEATURES), torch.rand(FEATURES)) == 2


def test_gemma(norms, layer):
    """1 + weight in float32, in the graph: the product with it is rounded once, in both ways."""

    def decoder(x, residual, weight):
        rows, residual = norms.fused_add_rms_norm(x, residual, weight.float() + 1.0, EPSILON)
        return linear(rows, layer), residual

    x, residual = torch.randn(2, 5, FEATURES).half()
    assert fused(decoder, x, residual, torch.rand(FEATURES).half()) == 1


def test_what_is_left_alone(norms, layer):
    """All in one graph, by different ε, or equal norms would be one."""

    def decoder(x, weight):
        read_twice = norms.rms_norm(x, weight, 0.1)
        read_by_two, _ = norms.fused_add_rms_norm(x, x, weight, 0.2)
        before_its_bias, residual = norms.fused_add_rms_norm(x, x, weight, 0.3)
        return (
            *(linear(read_twice, layer), read_twice + 1),
            *(linear(read_by_two, layer), linear(read_by_two, [*layer[:3], None, *layer[4:]])),
            linear(before_its_bias, [*layer[:3], residual[0, :OUT], *layer[4:]]),
            linear(norms.fused_add_rms_norm(x, x, weight, 0.4)[1], layer),  # the sum
            linear(norms.rms_norm(x, weight, 0.5), [*layer[:5], None, None]),  # no rotation
            linear(norms.rms_norm(x, None, 0.6), layer),
            linear(norms.rms_norm(x, weight, 0.7, FEATURES // 2), layer),  # the mean of half the row
            linear(norms.rms_norm(x, weight, 0.8).view(1, -1, FEATURES), layer),
            linear(x * weight, layer),
        )

    assert fused(decoder, torch.randn(5, FEATURES), torch.rand(FEATURES)) == 0


@pytest.fixture
def compilation(monkeypatch):
    """The compilation config of an engine that is being built."""
    import vllm.config

    config = SimpleNamespace(mode=vllm.config.CompilationMode.VLLM_COMPILE, inductor_compile_config={})
    engine = SimpleNamespace(compilation_config=config)
    monkeypatch.setattr(vllm.config, "get_current_vllm_config_or_none", lambda: engine)
    return config


def test_install(compilation, monkeypatch):
    """Once, however many layers ask for it; not where nothing compiles, nor where a vLLM has other norms."""
    from vllm.config import CompilationMode

    from bq_vllm import fuse_norm

    for _ in "12":
        fuse_norm.install()
    (found,) = compilation.inductor_compile_config.values()
    assert found.callable is fuse_norm.fuse_norms
    compilation.inductor_compile_config.clear()
    for mode in (CompilationMode.NONE, CompilationMode.DYNAMO_TRACE_ONCE):
        compilation.mode = mode
        fuse_norm.install()
    compilation.mode = CompilationMode.VLLM_COMPILE
    monkeypatch.setattr(torch.ops, "vllm_ir", SimpleNamespace(rms_norm=None))
    fuse_norm.install()
    assert not compilation.inductor_compile_config


def test_another_pass_is_not_replaced(compilation):
    from vllm.compilation.passes.inductor_pass import CallableInductorPass
    from vllm.platforms import current_platform

    from bq_vllm import fuse_norm

    compilation.inductor_compile_config[current_platform.pass_key] = CallableInductorPass(len, uuid="theirs")
    with pytest.raises(ValueError, match="BQ_VLLM_FUSE_NORM=1 needs its own"):
        fuse_norm.install()
