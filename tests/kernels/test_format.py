import json
import subprocess
import sys

import pytest
import torch
from bq_kernels.format import (
    FormatError,
    QuantConfig,
    RotationConfig,
    TensorSpec,
    largest_code,
    midrise_zero,
    num_angles,
    split_block,
)

VALID = {
    "quant_method": "butterfly",
    "format_version": 1,
    "bits": 2,
    "group_size": 64,
    "zero_point": "midrise",
    "rotation": {"kind": "butterfly", "block_size": {"default": 64, "down_proj": 512}},
    "modules_to_not_convert": ["lm_head"],
}


def changed(**changes):
    return {key: value for key, value in (VALID | changes).items() if value is not ...}


@pytest.mark.parametrize(
    "data",
    [
        VALID,
        changed(bits=3, zero_point="float"),
        changed(bits=4, group_size=-1),
        changed(module_bits={"model.layers.0.mlp.down_proj": 4}),
        changed(rotation={"kind": "hadamard", "block_size": {"default": 576}}),
        changed(rotation={"kind": "none"}),
        changed(modules_to_not_convert=[]),
    ],
)
def test_round_trip(data):
    parsed = QuantConfig.from_dict(json.loads(json.dumps(data)))
    assert parsed.to_dict() == data
    assert QuantConfig.from_dict(parsed.to_dict()) == parsed


def test_import_without_torch():
    code = "import sys, bq_kernels.format; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("bits", "largest", "zero"), [(2, 3, 1.5), (3, 7, 3.5), (4, 15, 7.5)])
def test_codes(bits, largest, zero):
    assert (largest_code(bits), midrise_zero(bits)) == (largest, zero)


def test_modules_to_not_convert_may_be_left_out():
    assert QuantConfig.from_dict(changed(modules_to_not_convert=...)).modules_to_not_convert == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": "red"}, "unknown key 'colour'"),
        ({"quant_method": "gptq"}, "quant_method: expected 'butterfly', found 'gptq'"),
        ({"quant_method": ...}, "quant_method"),
        ({"format_version": 2}, "reads version 1, the checkpoint says 2"),
        ({"format_version": ...}, "format_version"),
        ({"bits": 5}, r"bits: expected one of \[2, 3, 4\], found 5"),
        ({"bits": True}, "bits"),
        ({"bits": 2.0}, "bits"),
        ({"bits": "2"}, "bits"),
        ({"bits": ...}, "bits is missing"),
        ({"module_bits": {"a.q_proj": 5}}, r"module_bits.a.q_proj: expected one of \[2, 3, 4\], found 5"),
        ({"module_bits": [3]}, "module_bits: expected a table"),
        ({"zero_point": "int"}, "zero_point: expected one of .*, found 'int'"),
        ({"zero_point": ...}, "zero_point is missing"),
        ({"group_size": 48}, "group_size: expected a multiple of 32"),
        ({"group_size": 0}, "group_size"),
        ({"group_size": -2}, "group_size"),
        ({"group_size": 64.0}, "group_size"),
        ({"group_size": True}, "group_size"),
        ({"group_size": ...}, "group_size is missing"),
        ({"rotation": ...}, "rotation is missing"),
        ({"rotation": "butterfly"}, "rotation: expected a table"),
        ({"rotation": {"block_size": {"default": 64}}}, "rotation.kind is missing"),
        (
            {"rotation": {"kind": "dct", "block_size": {"default": 64}}},
            "rotation.kind: expected one of .*, found 'dct'",
        ),
        ({"rotation": {"kind": "butterfly"}}, "rotation.block_size is missing"),
        ({"rotation": {"kind": "butterfly", "block_size": 64}}, "expected a table with a 'default'"),
        ({"rotation": {"kind": "butterfly", "block_size": {"down_proj": 64}}}, "expected a table with a 'default'"),
        ({"rotation": {"kind": "butterfly", "block_size": {"default": 0}}}, "must be a positive integer, not 0"),
        ({"rotation": {"kind": "butterfly", "block_size": {"default": 64.0}}}, "must be a positive integer"),
        ({"rotation": {"kind": "butterfly", "block_size": {"default": 64}, "sign": 1}}, "rotation: unknown key 'sign'"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert: expected a list of names"),
        ({"modules_to_not_convert": [1]}, "modules_to_not_convert: expected a list of names"),
    ],
)
def test_refuses(changes, message):
    with pytest.raises(FormatError, match=message):
        QuantConfig.from_dict(changed(**changes))


@pytest.mark.parametrize("data", [None, 10**30, "butterfly", []])
def test_refuses_what_is_no_table(data):
    with pytest.raises(FormatError, match="quantization_config: expected a table, found"):
        QuantConfig.from_dict(data)


@pytest.mark.parametrize(
    ("block_size", "k", "m", "angles"),
    [
        (1, 0, 1, 0),
        (64, 6, 1, 192),
        (576, 6, 9, 1764),
        (1536, 9, 3, 6915),
        (11008, 8, 43, 44935),
        (14336, 11, 7, 78869),
        (15, 0, 15, 105),
    ],
)
def test_blocks(block_size, k, m, angles):
    assert split_block(block_size) == (k, m)
    assert num_angles(block_size) == angles


def test_block_of_a_module_is_found_by_the_last_part_of_its_name():
    rotation = RotationConfig("butterfly", {"default": 64, "down_proj": 512})
    assert rotation.block("model.layers.3.mlp.down_proj") == 512
    assert rotation.block("down_proj") == 512
    assert rotation.block("model.down_proj.q_proj") == 64


def test_tensors_of_a_layer():
    config = QuantConfig.from_dict(changed(zero_point="float"))
    assert config.tensors("mlp.down_proj", 1536, 576) == {
        "qweight": TensorSpec((576, 96), torch.int32),
        "scales": TensorSpec((576, 24), torch.float16, positive=True),
        "zeros": TensorSpec((576, 24), torch.float16),
        "angles": TensorSpec((3, 9 * 256), torch.float16),
    }
    assert set(QuantConfig().tensors("q_proj", 576, 192)) == {"qweight", "scales", "angles"}
    hadamard = QuantConfig(rotation=RotationConfig("hadamard"))
    assert set(hadamard.tensors("q_proj", 576, 192)) == {"qweight", "scales"}
    mixed = QuantConfig(module_bits={"model.layers.1.q_proj": 3})
    assert mixed.tensors("model.layers.1.q_proj", 576, 192)["qweight"].shape == (192, 54)
    assert mixed.tensors("model.layers.0.q_proj", 576, 192)["qweight"].shape == (192, 36)
    plain = QuantConfig(bits=3, group_size=-1, rotation=RotationConfig("none", {})).tensors("q_proj", 576, 192)
    assert plain == {
        "qweight": TensorSpec((192, 54), torch.int32),
        "scales": TensorSpec((192, 1), torch.float16, positive=True),
    }


@pytest.mark.parametrize(
    ("config", "in_features", "message"),
    [
        (QuantConfig(group_size=128), 576, "x.q_proj: 576 input features cannot be cut into groups of 128"),
        (QuantConfig(group_size=-1), 100, "x.q_proj: 100 input features cannot be cut into groups of 100"),
        (QuantConfig(rotation=RotationConfig("butterfly", {"default": 512})), 576, "block size 512 does not divide"),
        (QuantConfig(rotation=RotationConfig("hadamard", {"default": 512})), 576, "block size 512 does not divide"),
    ],
)
def test_refuses_layers_that_do_not_fit(config, in_features, message):
    with pytest.raises(FormatError, match=message):
        config.tensors("x.q_proj", in_features, 8)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(2, 4, dtype=torch.float16), r"x.scales: expected torch.float16 \[2, 3\], found .* \[2, 4\]"),
        (torch.zeros(6, dtype=torch.float16), r"found torch.float16 \[6\]"),
        (torch.zeros(2, 3), r"x.scales: expected torch.float16 \[2, 3\], found torch.float32 \[2, 3\]"),
        (torch.full((2, 3), float("nan"), dtype=torch.float16), "x.scales: holds NaN or infinity"),
        (torch.full((2, 3), float("-inf"), dtype=torch.float16), "x.scales: holds NaN or infinity"),
    ],
)
def test_refuses_tensors(tensor, message):
    with pytest.raises(FormatError, match=message):
        TensorSpec((2, 3), torch.float16).check("x.scales", tensor)


@pytest.mark.parametrize("value", [0.0, -0.5])
def test_scales_are_positive(value):
    tensor = torch.full((2, 3), 0.25, dtype=torch.float16)
    scales = QuantConfig(rotation=RotationConfig("none", {})).tensors("x", 64 * 3, 2)["scales"]
    scales.check("x.scales", tensor)
    tensor[1, 2] = value
    with pytest.raises(FormatError, match=r"x\.scales: holds zero or a negative number"):
        scales.check("x.scales", tensor)
    TensorSpec((2, 3), torch.float16).check("x.zeros", tensor)


def test_accepts_tensors():
    TensorSpec((2, 3), torch.float16).check("x.scales", torch.ones(2, 3, dtype=torch.float16))
    TensorSpec((0,), torch.int32).check("x.qweight", torch.ones(0, dtype=torch.int32))
