"""The plugin compiles a model's kernels while its weights are loaded."""

import logging
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("vllm", reason="vLLM is not installed")

import vllm.config as vllm_config
from bq_kernels import ops, triton_rotate
from triton import knobs

pytestmark = pytest.mark.skipif(ops.interpreted(), reason="an interpreted kernel cannot be compiled")

IN = 256


class Layer(torch.nn.Module):
    """A layer after loading, without memory; of its kernels only the rotation, which is compiled quickly."""

    params_dtype = torch.float16

    def __init__(self, block_size=64):
        super().__init__()
        layers, blocks = block_size.bit_length() - 1, IN // block_size
        shapes = {"qweight": (1,), "cos_sin": (blocks, 2, layers, block_size // 2), "mix": (blocks, 1, 1)}
        for name, shape in shapes.items():
            data = torch.empty(shape, device="meta")
            self.register_parameter(name, torch.nn.Parameter(data, requires_grad=False))


def apply(layer, x, bias):
    return triton_rotate.apply_rotation(x, layer.cos_sin, layer.mix)


@pytest.fixture
def engine(monkeypatch):
    """An engine that captures graphs of 1 and 2 tokens and reads at most 3 at once."""
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_batched_tokens=3),
        compilation_config=SimpleNamespace(cudagraph_capture_sizes=[1, 2]),
    )
    monkeypatch.setattr(vllm_config, "get_current_vllm_config_or_none", lambda: config)
    return config


@pytest.fixture
def warm_up(gpu):
    from bq_vllm.warming import KernelWarmUp

    return KernelWarmUp()


@pytest.fixture
def compiled():
    """Whether each kernel that is built comes from Triton's cache."""
    hits = []
    with knobs.compilation.scope():
        knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
        yield hits


def test_rows_are_those_of_the_graphs_and_of_any_prefill(engine):
    from bq_vllm.warming import rows_of

    engine.compilation_config.cudagraph_capture_sizes = [1, 24, 40]
    engine.scheduler_config.max_num_batched_tokens = 64
    assert {1, 15, 16, 24, 40, 63, 64} <= set(rows_of(engine))
    engine.compilation_config.cudagraph_capture_sizes = None  # eager
    assert max(rows_of(engine)) == 64


def test_layers_of_a_kind_are_compiled_once(engine, warm_up, compiled, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    layers = [Layer(), Layer(), Layer(block_size=128)]
    for layer in layers:
        warm_up.expect(layer)
    with caplog.at_level(logging.INFO, "vllm.bq_vllm"):
        warm_up.loaded(layers[0], IN, apply)
        warm_up.loaded(layers[1], IN, apply)
        assert "kernels are compiled" not in caplog.text
        warm_up.loaded(layers[2], IN, apply)
    assert f"{len(compiled)} kernels are compiled" in caplog.text
    assert compiled and not any(compiled)
    count = len(compiled)
    assert len(triton_rotate._rotate_kernel.device_caches[0][0]) == count  # launches find them
    for layer in layers:  # weights that are loaded again
        warm_up.loaded(layer, IN, apply)
    assert len(compiled) == count


def test_a_second_start_takes_kernels_from_the_cache(engine, warm_up, compiled):
    from bq_vllm.warming import KernelWarmUp

    for start in (warm_up, KernelWarmUp()):
        layer = Layer()
        start.expect(layer)
        start.loaded(layer, IN, apply)
        triton_rotate._rotate_kernel.device_caches.clear()  # as in a second process
    half = len(compiled) // 2
    assert half and compiled == [False] * half + [True] * half


def test_a_failure_does_not_stop_the_engine(engine, warm_up, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)

    def fail(layer, x, bias):
        raise RuntimeError("out of memory")

    layer = Layer()
    warm_up.expect(layer)
    warm_up.loaded(layer, IN, fail)
    assert "each when it is first launched" in caplog.text and "out of memory" in caplog.text
    assert knobs.runtime.jit_cache_hook is None


def test_layers_outside_an_engine_are_left_alone(warm_up, compiled):
    layer = Layer()
    warm_up.expect(layer)
    warm_up.loaded(layer, IN, apply)
    assert compiled == []


def test_graphs_of_other_formats_have_other_keys(tmp_path, monkeypatch):
    """vLLM keys its cache of compiled graphs by the config of the model, our table in it included."""
    import tiny
    from vllm.engine.arg_utils import EngineArgs

    for name, value in {"HF_HUB_OFFLINE": "1", "VLLM_PLUGINS": "butterfly", "VLLM_CPU_KVCACHE_SPACE": "1"}.items():
        monkeypatch.setenv(name, value)

    def key(**options):
        # always the same folder: its name is part of the key, too
        path = tiny.write_checkpoint(tmp_path, tiny.quant_config(**options))
        args = EngineArgs(model=str(path), skip_tokenizer_init=True, dtype="float32", max_model_len=128)
        return args.create_engine_config().compute_hash()

    formats = [
        {},
        {"bits": 3},
        {"module_bits": {"model.layers.0.mlp.down_proj": 3}},
        {"group_size": 64},
        {"zero_point": "float"},
        {"block_size": {"default": 32}},
        {"kind": "hadamard"},
        {"kind": "none"},
    ]
    keys = [key(**options) for options in formats]
    assert len(set(keys)) == len(formats)
    assert key() == keys[0]
