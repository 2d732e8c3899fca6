"""The folders that a case compares: a tiny random model, its checkpoint, and dense models decoded from that."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from bq_calibration import calibrate
from bq_calibration.architecture import STACKED, expert_layers
from safetensors.torch import load_file, save_file

from ..calibration.conftest import CONFIGS, MULTIMODAL_CONFIGS, make_model, make_text
from ..vllm import tiny
from .pairwise import Case

# 384 = 2⁷·3 makes a composite rotation; wider models would take Triton's interpreter minutes
WIDTHS = dict(hidden_size=128, intermediate_size=384, num_attention_heads=4, num_key_value_heads=2)
# one width for all down projections of a mixture: else there is no full-width rotation
MIXTURE = dict.fromkeys(("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"), 128)
LATENT = dict(q_lora_rank=128, num_key_value_heads=4)  # of multi-head latent attention
ROTATIONS = {
    "blocks of 64": dict(rotation="butterfly", rotation_block=64, init="random"),
    "full width": dict(rotation="butterfly", rotation_block=None, init="random"),
    "Hadamard, blocks of 64": dict(rotation="hadamard", rotation_block=64),
    "none": dict(rotation="none"),
}
# codes need not be good ones: what is compared is how they are read
QUICK = dict(rounding="rtn", refine=0, steps=0, compare=False, samples=2, seqlen=16)
EMBEDDING = "embed_tokens.weight"
PACKED = (".qweight", ".scales", ".zeros", ".angles", ".kept_tokens", ".kept_rows")


def architecture_of(case: Case) -> str:
    """Name of a case's architecture in the tables of tiny models."""
    return str(case["architecture"]).partition(",")[0]


def _is_tied(folder: Path) -> bool:
    return not any(name.endswith("lm_head.weight") for name in load_file(folder / "model.safetensors"))


def write_source(folder: Path, case: Case) -> Path:
    """Write the 16-bit model of a case."""
    architecture = architecture_of(case)
    config = (CONFIGS | MULTIMODAL_CONFIGS)[architecture]()
    widths = WIDTHS | (MIXTURE if expert_layers(architecture) else {})
    widths |= LATENT if hasattr(config, "kv_lora_rank") else {}
    for name, value in widths.items():
        if getattr(config.get_text_config(), name, None) is not None:
            setattr(config.get_text_config(), name, value)
    if architecture == "llama":
        config.tie_word_embeddings = case["architecture"] == "llama, tied head"
    vision = getattr(config, "vision_config", None)
    if hasattr(vision, "out_hidden_size"):
        vision.out_hidden_size = WIDTHS["hidden_size"]
    make_model(folder, architecture, config=config)
    tensors = load_file(folder / "model.safetensors")
    if _is_tied(folder):  # else the token just seen would be the likeliest
        tensors |= {name: 0.1 * tensor for name, tensor in tensors.items() if name.endswith(EMBEDDING)}
    if expert_layers(architecture):
        tensors |= decided_routes(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def decided_routes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The embedding with one of eight long directions added to each token, and routers that tell these apart.

    Random routers leave many a token between two experts, and rounding sends it to the other one.
    """
    (name,) = (name for name in tensors if name.endswith(EMBEDDING))
    directions = torch.linalg.qr(torch.randn(tensors[name].shape[1], 8)).Q.T
    # longer than what layers add to a token, which in turn is longer than the token itself would be
    found = {name: 6 * tensors[name] + 200 * directions[torch.arange(len(tensors[name])) % 8]}
    for router in [name for name in tensors if name.endswith((".gate.weight", ".router.weight"))]:
        levels = torch.linspace(0, 1, len(tensors[router])) ** 1.5  # sums over groups of experts differ, too
        found[router] = torch.stack([0.7 * levels[torch.randperm(len(levels))] for _ in range(8)], 1) @ directions
    return found


def write_checkpoint(folder: Path, source: Path, case: Case) -> Path:
    """Calibrate the model of a case, in the format of the case."""
    settings = QUICK | ROTATIONS[case["rotation"]] | {"zero_point": case["zero point"], "head_bits": case["head bits"]}
    settings["bits"], settings["target_bpw"] = (2, 3.6) if case["bits"] == "mixed" else (case["bits"], None)
    settings["group_size"] = -1 if case["group"] == "per channel" else case["group"]
    if _is_tied(source):
        settings["embedding_bits"] = case["head bits"]
    text = folder.with_suffix(".txt")
    text.write_text(make_text(200))
    calibrate(str(source), str(folder), device="cpu", plots=False, dataset=str(text), **settings)
    return folder


def write_other(folder: Path, checkpoint: Path) -> Path:
    """Write a checkpoint of the same format with the rows of all packed layers in reverse order."""
    shutil.copytree(checkpoint, folder)
    (folder / "SHA256SUMS").unlink()
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name: tensor.flip(0) for name, tensor in tensors.items() if name.endswith(".qweight")}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def decode(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of the dense model that a checkpoint stands for, by an independent reading of the format."""
    stored = load_file(checkpoint / "model.safetensors")
    return {name: tensor for name, tensor in stored.items() if not name.endswith(PACKED)} | tiny.decode(checkpoint)


def write_dense(folder: Path, source: Path, state: dict[str, torch.Tensor]) -> Path:
    """Write a dense model of the class of the source."""
    folder.mkdir()
    for file in source.glob("*.json"):
        shutil.copy(file, folder)
    if json.loads((source / "config.json").read_text())["model_type"] in STACKED:
        state = tiny.stacked(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_adapter(folder: Path, checkpoint: Path, state: dict[str, torch.Tensor]) -> Path:
    """Write a LoRA adapter of all packed layers of the decoder."""
    stored = load_file(checkpoint / "model.safetensors")
    modules = [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight") and ".layers." in name]
    return tiny.write_lora(folder, {module: tuple(state[f"{module}.weight"].shape) for module in modules})
