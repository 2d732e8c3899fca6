"""Multimodal models: the text decoder is quantized, the rest stays; the checkpoint loads as the original class."""

import ast
import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import bq_calibration.hf  # noqa: F401 teaches transformers the format
import pytest
import tiny
import torch
from bq_calibration.checkpoint import read_config, verify
from bq_calibration.end_to_end import TrainingText, held_out
from bq_calibration.errors import UserError
from bq_calibration.evaluation import Evaluator
from bq_calibration.model import SourceModel
from bq_calibration.store import TensorStore
from bq_calibration.student import Student
from bq_calibration.teacher import ResidentTeacher
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText

from ..vllm.engine import ONE_PROCESS, run_engines
from ..vllm.test_engine import assert_same
from .conftest import MULTIMODAL_CONFIGS, make_model
from .test_calibrate import run

TEXT = torch.arange(3, 35)[None]
PARTS = {
    "gemma3": ["vision_tower", "multi_modal_projector"],
    "qwen2_5_vl": ["visual"],
    "qwen3_vl": ["visual"],
    "mistral3": ["vision_tower", "multi_modal_projector"],
}
# all stages of a run, mixed bits and training included
SETTINGS = dict(target_bpw=3.6, block_tokens=1024, train_tokens=4096, train_samples=4, held_out=2)


def hub_model(folder: Path, architecture: str) -> Path:
    """A model whose files are as those on the hub: names of older versions of transformers, keys left to defaults."""
    make_model(folder, architecture)
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    if architecture == "gemma3":
        tensors = {name.replace("vision_tower.", "vision_tower.vision_model."): t for name, t in tensors.items()}
        tensors["language_model.model.embed_tokens.weight"] *= 0.1  # tied: else it predicts what it has just seen
    if architecture == "mistral3":
        del config["tie_word_embeddings"]  # by default they are tied, but there is a head of its own
        assert "language_model.lm_head.weight" in tensors
    if architecture == "qwen2_5_vl":
        config |= config.pop("text_config") | {name: config[name] for name in ("model_type", "architectures")}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", params=MULTIMODAL_CONFIGS)
def architecture(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def source(architecture, tmp_path_factory) -> Path:
    return hub_model(tmp_path_factory.mktemp("multimodal") / architecture, architecture)


@pytest.fixture(scope="module")
def checkpoint(source, text, tmp_path_factory) -> Path:
    return run(source, tmp_path_factory.mktemp("checkpoint") / source.name, text, **SETTINGS)


@pytest.fixture(scope="module")
def dense(source, checkpoint, tmp_path_factory) -> Path:
    """The checkpoint decoded independently, as an ordinary model of the original class."""
    folder = tmp_path_factory.mktemp("dense") / checkpoint.name
    folder.mkdir()
    kept = {name: t for name, t in load_file(checkpoint / "model.safetensors").items() if name.endswith("_weight")}
    save_file(tiny.decode(checkpoint) | kept, folder / "model.safetensors", metadata={"format": "pt"})
    for file in source.glob("*.json"):
        shutil.copy(file, folder)
    return folder


def picture(architecture: str) -> dict[str, torch.Tensor]:
    """A text with a random picture of 32 x 32 pixels, four tokens, as a processor would give it to the model."""
    generator = torch.Generator().manual_seed(0)
    token = 259 if architecture == "mistral3" else 261
    ids = torch.tensor([[3, 5, 8, *[token] * 4, 13, 21, 34]])
    pixels, of_picture = torch.randn(1, 3, 32, 32, generator=generator), (ids == token).int()
    if architecture == "gemma3":
        return {"input_ids": ids, "pixel_values": pixels, "token_type_ids": of_picture}
    if architecture == "mistral3":
        return {"input_ids": ids, "pixel_values": pixels, "image_sizes": torch.tensor([[32, 32]])}
    patches = torch.randn(16, 3 * 2 * 8 * 8, generator=generator)
    grid = {"image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": of_picture}
    return {"input_ids": ids, "pixel_values": patches} | grid


def class_name(folder: Path) -> str:
    """Of the original model."""
    return json.loads((folder / "config.json").read_text())["architectures"][0]


def logits(folder: Path, dequantized: bool = False, **inputs: torch.Tensor) -> torch.Tensor:
    """Of the model in a folder, loaded by transformers as its original class and with nothing left over."""
    model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert type(model).__name__ == class_name(folder)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    with torch.no_grad():
        return (model.dequantize() if dequantized else model).eval()(**inputs).logits


def test_other_parts_stay_as_they_are(architecture, source, checkpoint):
    verified, before, after = verify(checkpoint), TensorStore(source), TensorStore(checkpoint)
    assert len(verified.layers) == 2 * 7
    assert all(name.startswith("model.language_model.layers.") for name in verified.layers)
    assert verified.config.modules_to_not_convert == ("lm_head", *PARTS[architecture])
    assert verified.config.module_bits, "no layer has got more bits than 2"
    beside = [name for name in before.names() if any(f"{part}." in name for part in PARTS[architecture])]
    assert len(beside) > 20
    for name in beside:  # under the names that it has in the source, which vLLM knows
        assert torch.equal(after.get(name), before.get(name).bfloat16()), name
    stages = json.loads((checkpoint / "bq_report.json").read_text())["stages"]
    assert [stage["stage"] for stage in stages] == ["rounded", "train"]


def test_other_parts_take_the_dtype_that_is_asked_for(checkpoint):
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float16)
    packed = (".qweight", ".scales", ".angles")
    assert {p.dtype for name, p in model.named_parameters() if not name.endswith(packed)} == {torch.float16}


@pytest.mark.parametrize("dequantized", [False, True])
def test_answers_text_and_pictures_as_the_dense_model_does(architecture, checkpoint, dense, source, dequantized):
    seen = picture(architecture)
    for inputs in ({"input_ids": TEXT}, seen):
        expected = logits(dense, **inputs)
        assert (logits(checkpoint, dequantized, **inputs) - expected).abs().max() < 1e-4 * expected.abs().max()
    blank = seen | {"pixel_values": torch.zeros_like(seen["pixel_values"])}
    assert (logits(checkpoint, **blank) - expected).abs().max() > 1e-2 * expected.abs().max(), "the picture is not seen"


def test_blocks_see_what_the_whole_model_gives_them(architecture, source):
    """Calibration runs the decoder alone, layer by layer: that is what the whole model does with text."""
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(input_ids=TEXT).logits
    alone = SourceModel(str(source), torch.device("cpu"), "float32")
    hidden = alone.embed(TEXT)
    for index in range(alone.num_blocks):
        with alone.block(index) as block:
            block.run(hidden, out=hidden)
    with torch.no_grad(), alone.final_norm() as norm, alone.head() as head:
        torch.testing.assert_close(head(norm(hidden)), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_student_is_what_the_checkpoint_says(source, checkpoint):
    """Training sees the text decoder alone: before a step its divergence is that of the whole checkpoint."""
    wanted, found = (logits(folder, input_ids=TEXT).log_softmax(-1) for folder in (source, checkpoint))
    expected = (wanted.exp() * (wanted - found)).sum(-1).mean().item()
    alone = SourceModel(str(source), torch.device("cpu"), "float32")
    teacher = ResidentTeacher(alone, TEXT)
    student = Student(alone, read_config(checkpoint)[1], TensorStore(checkpoint))
    assert expected > 1e-3 and held_out(student, TrainingText(TEXT, 1, False), teacher) == pytest.approx(
        expected, rel=1e-2
    )


def test_names_of_newer_versions(architecture, source, text, tmp_path):
    """A model with the names that transformers gives its modules becomes the same checkpoint, these names kept."""
    newer = make_model(tmp_path / "newer", architecture)
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32)
    state = {name: t for name, t in model.state_dict().items() if name not in model.all_tied_weights_keys}
    save_file({name: t.clone() for name, t in state.items()}, newer / "model.safetensors", metadata={"format": "pt"})
    (newer / "config.json").write_text((source / "config.json").read_text())
    out, old = run(newer, tmp_path / "out", text), run(source, tmp_path / "old", text)
    assert read_config(out)[1] == read_config(old)[1]
    inputs = picture(architecture)
    assert torch.equal(logits(out, **inputs), logits(old, **inputs))


def test_evaluation(checkpoint, dense, text):
    found, expected = (
        Evaluator(str(folder), "float32", "cpu").perplexity(str(text), 64, 4, Progress(disable=True))
        for folder in (checkpoint, dense)
    )
    assert found["value"] == pytest.approx(expected["value"], rel=1e-4)


def test_a_checkpoint_that_is_not_whole_is_refused(checkpoint, tmp_path):
    tensors = load_file(checkpoint / "model.safetensors")
    name = next(name for name in sorted(tensors) if "language_model" not in name and name != "lm_head.weight")
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    save_file({key: t for key, t in tensors.items() if key != name}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"tensor \S+ is missing"):
        verify(tmp_path)
    save_file(tensors | {f"{name}.other": tensors[name].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"other does not belong to this model"):
        verify(tmp_path)
    twin = name.removeprefix("model.") if name.startswith("model.") else f"model.{name}"
    save_file(tensors | {twin: tensors[name].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"are the same one of the model|does not belong to this model"):
        verify(tmp_path)


def test_the_bare_model_is_refused(checkpoint):
    with pytest.raises(UserError, match=r"do not load into a bare \w+Model; load the model with its head"):
        AutoModel.from_pretrained(checkpoint)


# ---- in vLLM

PLACEHOLDERS = {"gemma3": "<start_of_image>", "mistral3": "[IMG]"}


def mapper_of(architecture: str, name: str):
    """vLLM's mapper from tensors of a class to its own, read from the source: importing that needs torchvision."""
    from vllm.model_executor.models.utils import WeightsMapper

    models = Path(find_spec("vllm").origin).parent / "model_executor" / "models"
    file = models / ("gemma3_mm.py" if architecture == "gemma3" else f"{architecture}.py")
    [model] = [n for n in ast.parse(file.read_text()).body if isinstance(n, ast.ClassDef) and n.name == name]
    [call] = [
        node.value for node in model.body if isinstance(node, ast.Assign) and node.targets[0].id == "hf_to_vllm_mapper"
    ]
    return WeightsMapper(**{k.arg: ast.literal_eval(k.value) for k in call.keywords})


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_names_in_vllm(architecture, checkpoint):
    """What vLLM calls the modules of the checkpoint: packed ones are found with their bits, the others are skipped."""
    from bq_vllm.config import ButterflyConfig

    mapper = mapper_of(architecture, class_name(checkpoint))
    seen = ButterflyConfig(read_config(checkpoint)[1])
    seen.apply_vllm_mapper(mapper)
    stored, before = TensorStore(checkpoint), read_config(checkpoint)[1]
    for name in stored.names():
        module, _, leaf = name.rpartition(".")
        mapped = mapper.map_name(name).removesuffix("." + leaf)
        part = mapped.split(".")[0]
        assert part in ("language_model", *PARTS[architecture]), name
        if leaf == "qweight":
            assert mapped.startswith("language_model.model.layers.")
            assert not seen.quant.skips(mapped) and seen.quant.bits_of(mapped) == before.bits_of(module)
        else:
            assert part == "language_model" or seen.quant.skips(mapped), name
    assert seen.quant.skips("language_model.lm_head")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision, which vLLM's multimodal models import")
@pytest.mark.skipif(torch.cuda.is_available(), reason="runs vLLM's CPU build")
def test_vllm_answers_text_and_pictures(architecture, checkpoint, dense, tmp_path):
    """As the class of the original, with the tokens of the model that was decoded independently."""
    placeholder = PLACEHOLDERS.get(architecture, "<|vision_start|><|image_pad|><|vision_end|>")
    prompts = [[5, 9, 100, 33], [7, 8, 9] * 5, *({"text": f"ab{placeholder}cd", "picture": n} for n in (0, 1))]
    options = {"skip_tokenizer_init": False, "limit_mm_per_prompt": {"image": 1, "video": 0}}
    options["max_num_batched_tokens"] = 512
    jobs = [{"model": str(folder), "prompts": prompts, "options": options} for folder in (checkpoint, dense)]
    (found, expected), printed = run_engines(tmp_path, jobs, **ONE_PROCESS)
    assert_same(found["base"], expected["base"], atol=1e-3)
    assert "Resolved architecture: " + class_name(checkpoint) in printed
    one, other = found["base"][2:]
    assert one["logprobs"] != pytest.approx(other["logprobs"], abs=1e-2), "the picture is not seen"
