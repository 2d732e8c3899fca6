"""Checkpoints with a random fault: a reader refuses it in one line that names the fault, or reads what it stands for.

Readers are `bq-inspect`, transformers, and the vLLM plugin with its layers. What a checkpoint stands for is decoded
independently. BQ_FUZZ is the number of mutants, BQ_TEST_SEED gives others than those of every run:

    BQ_FUZZ=2000 BQ_TEST_SEED=7 pytest tests/test_fuzz.py -m "not slow" --timeout 3600
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import bq_calibration.hf  # noqa: F401 teaches transformers the format
import pytest
import tiny
import torch
from bq_calibration import inspect
from bq_calibration.errors import UserError
from bq_calibration.export import GUARD
from bq_calibration.files import write_tensors
from bq_kernels.checksums import write_sums
from bq_kernels.format import FormatError
from bq_kernels.packing import pack
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from .calibration.conftest import save_tokenizer
from .calibration.test_calibrate import dense_logits
from .calibration.test_mutations import change_bytes, change_json

HAS_VLLM = find_spec("vllm") is not None
if HAS_VLLM:
    from .vllm import test_embedding as vllm_embedding
    from .vllm import test_linear as vllm_linear
    from .vllm.test_linear import cpu, distributed  # noqa: F401  fixtures

IDS = torch.tensor([[3, 4, 5, 200, 9, 17]])
EMBED, HEAD = "model.embed_tokens", "lm_head"
INDEX, SUMS = "model.safetensors.index.json", "SHA256SUMS"
FORMATS = {
    "2 bits": {},
    "3 bits, zeros, hadamard": {"bits": 3, "zero_point": "float", "kind": "hadamard", "group_size": 64},
    "4 bits, one scale per row": {"bits": 4, "kind": "none", "group_size": -1},
    "mixed bits": {"module_bits": {f"model.layers.0.mlp.{n}_proj": 3 for n in ("gate", "up", "down")}},
    "packed embedding": {"skip": (), "module_bits": {EMBED: 4}, "zero_point": "float"},
    "packed embedding and head": {"skip": (), "module_bits": {EMBED: 3, HEAD: 4}, "block_size": {"default": 64}},
    "kept rows": {"skip": (), "kind": "hadamard", "module_bits": {EMBED: 4}, "kept_tokens": {EMBED: 40}},
}
TIED, SHARDED = ("packed embedding", "kept rows"), ("2 bits", "packed embedding and head")


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints of every format, with checksums and a tokenizer; some in two shards."""
    made = {}
    for name, options in FORMATS.items():
        made[name] = folder = tmp_path_factory.mktemp("sound") / "checkpoint"
        tiny.write_checkpoint(folder, tiny.quant_config(**options), tied=name in TIED)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": GUARD}))
        save_tokenizer(folder)
        write_weights(folder, load_file(folder / "model.safetensors"), sharded=name in SHARDED)
        write_sums(folder)
    return made


def write_weights(folder: Path, tensors: dict[str, torch.Tensor], sharded: bool) -> None:
    """In place of the folder's weights; every other tensor in a second file, and an index, if `sharded`."""
    for file in (*folder.glob("*.safetensors"), folder / INDEX):
        file.unlink(missing_ok=True)
    if not sharded:
        write_tensors(folder / "model.safetensors", tensors, record_sums=True)
        return
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weight_map = {name: shards[i % 2] for i, name in enumerate(sorted(tensors))}
    for shard in shards:
        own = {name: tensor for name, tensor in tensors.items() if weight_map[name] == shard}
        write_tensors(folder / shard, own, record_sums=True)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# ---- faults


@dataclass(frozen=True)
class Fault:
    """What has been done to a checkpoint.

    Attributes:
        what: in words.
        files: names of those that have changed, or come, or gone.
    """

    what: str
    files: tuple[str, ...]


def of_config(folder: Path, chooser: random.Random) -> Fault:
    file = chooser.choice([file for file in (folder / "config.json", folder / INDEX) if file.exists()])
    return Fault(change_json(file, chooser), (file.name,))


def of_format(folder: Path, chooser: random.Random) -> Fault:
    """An entry of `quantization_config`: another value that the format knows, or nearly so."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    table = config["quantization_config"]
    modules = [EMBED, HEAD, "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj", "q_proj", "layers.0"]
    values: dict[str, Callable] = {
        "bits": lambda: chooser.choice((1, 2, 3, 4, 8)),
        "group_size": lambda: chooser.choice((-1, 16, 32, 64, 96, 128)),
        "zero_point": lambda: chooser.choice(("midrise", "float")),
        "rotation": lambda: {
            "kind": chooser.choice(("butterfly", "hadamard", "none")),
            "block_size": {
                chooser.choice(("default", "down_proj", "q_proj")): 2 ** chooser.randrange(8),
                "default": 64,
            },
        },
        "module_bits": lambda: {name: chooser.choice((2, 3, 4)) for name in chooser.sample(modules, 2)},
        "kept_tokens": lambda: {chooser.choice(modules): chooser.choice((0, 1, 40, 500, 501, True))},
        "modules_to_not_convert": lambda: chooser.sample([*modules, "k_proj"], chooser.randrange(3)),
        "prefill_activation_bits": lambda: chooser.choice((4, 8, 16)),
        "format_version": lambda: chooser.choice((0, 1, 2, "1")),
    }
    key = chooser.choice(list(values))
    table[key] = values[key]()
    file.write_text(json.dumps(config))
    return Fault(f"config.json: {key} = {table[key]!r}", (file.name,))


def of_bytes(folder: Path, chooser: random.Random) -> Fault:
    files = [file for file in sorted(folder.iterdir()) if file.is_file()]
    weights = [file for file in files if file.suffix == ".safetensors"]
    file = chooser.choice(weights if chooser.random() < 0.6 else files)
    if file in weights and chooser.random() < 0.5:
        data = bytearray(file.read_bytes())
        place = chooser.randrange(len(data))
        data[place] ^= 1 << chooser.randrange(8)
        file.write_bytes(data)
        return Fault(f"{file.name}: flip at {place}", (file.name,))
    return Fault(change_bytes(file, chooser), (file.name,))


def of_header(folder: Path, chooser: random.Random) -> Fault:
    """An entry of a safetensors header; the bytes stay."""
    file = chooser.choice(sorted(folder.glob("*.safetensors")))
    data = file.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    name, other = chooser.sample([name for name in header if name != "__metadata__"], 2)
    entry, kind = header[name], chooser.choice(("offsets", "swap", "dtype", "shape", "name", "remove", "metadata"))
    if kind == "offsets":
        entry["data_offsets"][chooser.randrange(2)] += chooser.choice((-4, 2, 64, -(10**6), 2**63))
    elif kind == "swap":
        entry["data_offsets"], header[other]["data_offsets"] = header[other]["data_offsets"], entry["data_offsets"]
    elif kind == "dtype":
        entry["dtype"] = chooser.choice(("F16", "BF16", "I16", "U16", "F32", "I32", "F8_E4M3", "F4", "X", 3))
    elif kind == "shape":
        entry["shape"] = chooser.choice(
            (entry["shape"][::-1], [math.prod(entry["shape"])], [*entry["shape"], 1], [-1], [1.5], None)
        )
    elif kind == "name":
        header[chooser.choice((f"{name}x", other, "", "model.layers.7" + name))] = header.pop(name)
    elif kind == "remove":
        del header[name]
    else:
        header["__metadata__"] = chooser.choice((None, [], {}, {"format": 1}, {"format": "tf"}, {"bq_sha256": "{}"}))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[begin:])
    return Fault(f"{file.name}: {kind} of {name}", (file.name,))


def of_tensor(folder: Path, chooser: random.Random) -> Fault:
    """A tensor's values, shape, dtype or name, in files that are whole otherwise."""
    files = sorted(folder.glob("*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    name = chooser.choice(sorted(tensors))
    tensor, generator = tensors[name], torch.Generator().manual_seed(chooser.randrange(2**31))
    place = tuple(chooser.randrange(size) for size in tensor.shape)

    def one(value: float) -> torch.Tensor:
        changed = tensor.clone()
        changed[place] = value
        return changed

    kinds: dict[str, Callable[[], dict[str, torch.Tensor | None]]] = {
        "remove": lambda: {name: None},
        "rename": lambda: {name: None, chooser.choice((f"{name}x", name.replace("q_proj", "x"), "y")): tensor},
        "copy": lambda: {chooser.choice((f"x.{name}", f"{name}.weight", f"{HEAD}.weight")): tensor.clone()},
        "swap": lambda: dict(zip((name, other), (tensors[other], tensor), strict=True)),
        "transpose": lambda: {name: tensor.T.contiguous() if tensor.dim() == 2 else tensor[:, None].clone()},
        "slice": lambda: {name: tensor[:-1].clone()},
        "empty": lambda: {name: tensor[:0].clone()},
        "dtype": lambda: {name: tensor.to(chooser.choice((torch.float16, torch.float32, torch.bfloat16, torch.int64)))},
        "value": lambda: {
            name: one(chooser.choice((0, -1, math.nan, math.inf, 6e-8, 30)) if tensor.is_floating_point() else -1)
        },
        "random": lambda: {name: _random_like(name, tensor, generator)},
    }
    other = chooser.choice(sorted(tensors))
    kind = chooser.choice(list(kinds))
    tensors |= kinds[kind]()
    write_weights(folder, {key: value for key, value in tensors.items() if value is not None}, len(files) > 1)
    changed = tuple(file.name for file in (*files, folder / INDEX) if file.exists())
    return Fault(f"{kind} {name} ({other})", changed)


def _random_like(name: str, tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Other values that the format allows, but for angles that layers share."""
    if name.endswith("kept_tokens"):
        return torch.randperm(tiny.VOCABULARY, generator=generator)[: len(tensor)].sort().values.int()
    if not tensor.is_floating_point():
        return pack(torch.randint(0, 4, (len(tensor), tensor.shape[1] * 16), generator=generator), 2)
    return (tensor * (0.5 + torch.rand(tensor.shape, generator=generator))).to(tensor.dtype)


def of_files(folder: Path, chooser: random.Random) -> Fault:
    """A file too many, too few, or in the place of another."""
    weights = sorted(file.name for file in folder.glob("*.safetensors"))
    name = chooser.choice([file.name for file in sorted(folder.iterdir()) if file.is_file()])
    kind = chooser.choice(("remove", "empty", "folder", "surplus", "surplus", "surplus", "swap"))
    if kind == "surplus":
        source = load_file(folder / chooser.choice(weights))
        key = chooser.choice(sorted(source))
        value = source[key] if not source[key].is_floating_point() else source[key] * 2
        surplus = chooser.choice(("a", "z", "model", "consolidated", "adapter_model", "model-00003-of-00003"))
        surplus += ".safetensors"
        if not (folder / surplus).exists():
            write_tensors(folder / surplus, {chooser.choice((key, "x")): value.clone()}, record_sums=True)
            return Fault(f"{surplus} with {key}", (surplus,))
    if kind == "swap" and len(weights) == 1:
        kind = "remove"
    if kind == "swap":
        for source, target in ((weights[0], "t"), (weights[1], weights[0]), ("t", weights[1])):
            os.rename(folder / source, folder / target)
        return Fault("shards swapped", tuple(weights))
    (folder / name).unlink()
    if kind == "empty":
        (folder / name).touch()
    elif kind == "folder":
        (folder / name).mkdir()
    return Fault(f"{name}: {kind}", (name,))


FAULTS = (
    of_config,
    of_format,
    of_format,
    of_bytes,
    of_bytes,
    of_header,
    of_header,
    of_tensor,
    of_tensor,
    of_tensor,
    of_files,
)


# ---- readers


def by_inspect(folder: Path) -> None:
    inspect(str(folder))


def by_transformers(folder: Path) -> torch.Tensor:
    """Logits."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


def by_vllm(folder: Path) -> dict[str, torch.Tensor]:
    """Dense weights of the packed modules, as the plugin's layers hold them, by vLLM's name."""
    from vllm.model_executor.model_loader.weight_utils import filter_duplicate_safetensors_files

    from bq_vllm.config import ButterflyConfig
    from bq_vllm.embedding import TiedHeadMethod

    table = json.loads((folder / "config.json").read_text())
    config = ButterflyConfig.from_config(table["quantization_config"])
    config.maybe_update_config(str(folder))
    files = [str(file) for file in sorted(folder.glob("*.safetensors"))]
    files = filter_duplicate_safetensors_files(files, str(folder), INDEX)
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    layers = {name: vllm_embedding.build(config.quant, name) for name in (EMBED, HEAD)}
    for prefix in (f"model.layers.{index}." for index in range(tiny.LAYERS)):
        for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"):
            layers[prefix + name] = vllm_linear.build(config.quant, name, prefix=prefix)
    if table["tie_word_embeddings"]:
        layers[HEAD].tie_weights(layers[EMBED])
    refuse_unknown(layers, tensors)
    found = {}
    for name, layer in layers.items():
        if isinstance(layer.quant_method, TiedHeadMethod):
            layer.quant_method.process_weights_after_loading(layer)
        elif name not in (EMBED, HEAD):
            prefix = name[: len(vllm_linear.LAYER)]
            vllm_linear.load(layer, name.removeprefix(prefix), tensors, prefix)
            found[name] = dense(layer, layer.input_size)
        elif config.quant.packs(name):
            vllm_embedding.load(layer, name, tensors)
            found[name] = dense(layer, tiny.HIDDEN)[: tiny.VOCABULARY]
    return found


def refuse_unknown(layers: dict[str, torch.nn.Module], tensors: dict[str, torch.Tensor]) -> None:
    """As vLLM's model does, where a layer is not packed or there is none."""
    fused = {part: name for name, parts in vllm_linear.FUSED.items() for part in parts}
    for full in tensors:
        module, _, suffix = full.rpartition(".")
        parent, _, last = module.rpartition(".")
        layer = layers.get(".".join(filter(None, (parent, fused.get(last, last)))))
        if layer is None and not last.endswith("norm"):
            raise FormatError(f"{full}: no such module")
        if layer is not None and not hasattr(layer, "butterfly") and not hasattr(layer, suffix):
            raise FormatError(f"{full}: no such parameter")


def dense(layer: torch.nn.Module, columns: int) -> torch.Tensor:
    """The weight [N, K] with which a layer multiplies."""
    return layer.quant_method.apply(layer, torch.eye(columns)).T


@dataclass(frozen=True)
class Answer:
    """What a reader gives: what it has read, or its refusal."""

    read: object = None
    refusal: str | None = None


def ask(reader: Callable, folder: Path, allowed: tuple[type[Exception], ...]) -> Answer:
    try:
        return Answer(read=reader(folder))
    except allowed as error:
        return Answer(refusal=f"{type(error).__name__}: {error}")


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    bound = 1e-3 * expected.abs().max()  # float32 sums in another order
    assert found.shape == expected.shape and bool((found - expected).abs().max() <= bound), "another number"


def check(folder: Path, fault: Fault, damaged: bool, same_model: bool) -> bool:
    """Hold the readers of a mutant against each other and against its decoding; returns whether it was read.

    Args:
        folder: the mutant.
        fault: that it has.
        damaged: whether checksums of the sound checkpoint are there.
        same_model: whether config.json describes the model of the vLLM layers.
    """
    inspected = ask(by_inspect, folder, (UserError,))
    # transformers itself reads config and index, and looks for the files, before it asks the package
    present = all((folder / name).is_file() for name in fault.files)
    itself = {"config.json", INDEX} & set(fault.files) or not present
    loaded = ask(by_transformers, folder, (Exception,) if itself else (UserError, FormatError))
    served = ask(by_vllm, folder, (FormatError,)) if HAS_VLLM and same_model else Answer(refusal="not asked")
    if damaged:
        assert inspected.refusal, "damage is not found"
        assert not present or (loaded.refusal and served.refusal), "damage is not found in loading"
    for answer in (inspected, served):
        refusal = answer.refusal or ""
        assert "\n" not in refusal.strip(), f"not one line: {refusal}"
    if inspected.refusal is None:
        assert loaded.refusal is None, f"transformers refuses: {loaded.refusal}"
        assert not (HAS_VLLM and same_model) or served.refusal is None, f"vLLM refuses: {served.refusal}"
    weights = {} if loaded.read is None and served.read is None else tiny.decode(folder)
    if loaded.read is not None:
        assert_near(loaded.read, dense_logits(folder, IDS))
    for name, weight in (served.read or {}).items():
        parent, _, last = name.rpartition(".")
        parts = vllm_linear.FUSED.get(last, [last])
        assert_near(weight, torch.cat([weights[f"{parent}.{part}.weight".lstrip(".")] for part in parts]))
    return inspected.refusal is None


def mutate(sound: dict[str, Path], folder: Path, chooser: random.Random) -> tuple[Fault, bool, bool]:
    """Copy a sound checkpoint and do something to it; returns what, and the arguments of `check`."""
    source = sound[chooser.choice(list(sound))]
    shutil.copytree(source, folder)
    fault = chooser.choice(FAULTS)(folder, chooser)
    sums = chooser.choice(("kept", "written anew", "removed"))
    if sums != "kept":
        with contextlib.suppress(OSError):
            (folder / SUMS).unlink()
    if sums == "written anew" and not (folder / SUMS).exists():
        write_sums(folder)

    def content(base: Path, name: str) -> bytes | None:
        return (base / name).read_bytes() if (base / name).is_file() else None

    listed = (source / SUMS).read_text()
    changed = [name for name in fault.files if content(source, name) != content(folder, name)]
    damaged = sums == "kept" and any(f"  {name}\n" in listed for name in changed)
    return (
        Fault(f"{source.parent.name}: {fault.what}, checksums {sums}", fault.files),
        damaged,
        same_model(source, folder),
    )


def same_model(source: Path, folder: Path) -> bool:
    """Whether the mutant's config.json is the sound one's but for its `quantization_config`."""
    try:
        one, other = (json.loads((base / "config.json").read_text()) for base in (source, folder))
        return bool(other.pop("quantization_config")) and bool(one.pop("quantization_config")) and one == other
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False


@pytest.fixture
def quiet(monkeypatch):
    """Nothing that one mutant leaves in the environment reaches the next."""
    monkeypatch.setenv("BQ_VERIFY", "1")
    monkeypatch.setenv("_BQ_VERIFIED", "")


def test_sound_checkpoints(sound, quiet):
    for folder in sound.values():
        assert check(folder, Fault("none", ()), damaged=False, same_model=True)


@pytest.mark.parametrize("count", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_readers_agree(count, sound, quiet, tmp_path):
    seed, count = int(os.environ.get("BQ_TEST_SEED") or count), int(os.environ.get("BQ_FUZZ") or count)
    chooser, read, problems = random.Random(seed), 0, []
    for number in range(count):
        folder = tmp_path / str(number)
        fault, *arguments = mutate(sound, folder, chooser)
        try:
            read += check(folder, fault, *arguments)
        except (Exception, pytest.fail.Exception) as error:
            problems.append(f"mutant {number}, {fault.what}: {type(error).__name__}: {str(error)[:300]}")
        shutil.rmtree(folder)
    assert not problems, f"BQ_TEST_SEED={seed}: {len(problems)} of {count}\n" + "\n".join(problems)
    assert count / 20 < read < count / 2


@pytest.mark.slow
@pytest.mark.skipif(not HAS_VLLM or torch.cuda.is_available(), reason="this runs vLLM's CPU build")
def test_engines_agree(sound, quiet, tmp_path):
    """Whole engines, on a handful: the plugin's refusal reaches the user, or the tokens are those of the decoding."""
    from .vllm.test_engine import assert_same, expected, run_engines

    chooser, read, refused = random.Random(0), [], {}
    for number in range(200):
        folder = tmp_path / str(number)
        _, _, same = mutate(sound, folder, chooser)
        if not same:
            continue
        served = ask(by_vllm, folder, (FormatError,))
        if served.refusal is None and ask(by_inspect, folder, (UserError,)).refusal is None and len(read) < 1:
            read.append(folder)
        elif served.refusal is not None and len(refused) < 2:
            refused[folder] = served.refusal.removeprefix("FormatError: ")
    jobs = [{"model": str(folder), "fails": folder in refused} for folder in (*read, *refused)]
    answers, printed = run_engines(tmp_path, jobs, TORCHDYNAMO_DISABLE="1")
    for folder, answer in zip(read, answers, strict=False):
        assert_same(answer["base"], expected(tiny.decode(folder)))
    for (folder, refusal), answer in zip(refused.items(), answers[len(read) :], strict=True):
        told = answer["error"] + printed
        assert refusal in told or "no such" in refusal, f"{folder}: {refusal}"  # the latter is vLLM's own
