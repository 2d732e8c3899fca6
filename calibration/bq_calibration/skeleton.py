"""A model as transformers builds it, without memory: its decoder and other parts, and how files call its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import init_empty_weights
from bq_kernels.format import HEAD
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from .architecture import MULTIMODAL
from .errors import UserError
from .experts import split_experts

_TOWERS = r"(vision_tower|multi_modal_projector|visual)\."
_WRAPPED = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
    (rf"^{_TOWERS}", r"model.\1."),
    (rf"^model\.(?!language_model\.|{_TOWERS})", "model.language_model."),
)
# how names in files may differ from those of the model: patterns and replacements, all of a line are applied in turn
_RENAMINGS = (
    (),
    ((r"^(?!model\.|lm_head\.)", "model."),),  # saved from the decoder alone
    ((r"^language_model\.", ""),),  # the text part of a multimodal model
    ((r"^model\.language_model\.", "model."),),
    _WRAPPED,  # a multimodal model as the hub has it
    # of which newer versions of transformers drop a level
    (*_WRAPPED, (r"^model\.vision_tower\.vision_model\.", "model.vision_tower.")),
)


def auto_class(model_type: str) -> type[AutoModelForCausalLM] | type[AutoModelForImageTextToText]:
    """The class of transformers that loads models of this type."""
    return AutoModelForImageTextToText if model_type in MULTIMODAL else AutoModelForCausalLM


def empty_model(config: PreTrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model of a config on the meta device; buffers are computed, not stored, so these are real.

    Experts have linear layers of their own, see `Experts`.
    """
    with init_empty_weights(include_buffers=False):
        model = auto_class(config.model_type).from_config(config, dtype=dtype).eval()
    split_experts(model)
    return model


def decoder_name(model: PreTrainedModel) -> str:
    """Name of the decoder inside a model: `model`, or `model.language_model` in a multimodal one."""
    decoder = model.get_decoder()
    return next(name for name, module in model.named_modules() if module is decoder)


def tied_head(model: PreTrainedModel) -> bool:
    """Whether a model's LM head is its embedding."""
    return f"{HEAD}.weight" in model.all_tied_weights_keys


def other_parts(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of what a multimodal model has beside its decoder, which stays unquantized: `visual`, say."""
    decoder = model.get_decoder()
    children = () if model.base_model is decoder else model.base_model.named_children()
    return tuple(name for name, module in children if module is not decoder)


def model_names(folder: Path, stored: Iterable[str], model: PreTrainedModel) -> dict[str, str]:
    """The model's name for every tensor of its files.

    Args:
        folder: of the files, for messages.
        stored: names in the files.
        model: may be empty.

    Raises:
        UserError: if two tensors are the same one of the model.
    """
    stored, expected = list(stored), set(model.state_dict())
    candidates = []
    for rules in _RENAMINGS:
        names = dict(zip(stored, stored, strict=True))
        for pattern, replacement in rules:
            names = {name: re.sub(pattern, replacement, new, count=1) for name, new in names.items()}
        candidates.append(names)
    chosen = min(candidates, key=lambda names: len(expected - set(names.values())))
    first: dict[str, str] = {}
    for name, known in chosen.items():
        if first.setdefault(known, name) != name:
            raise UserError(f"{folder}: tensors {first[known]} and {name} are the same one of the model; remove one")
    return chosen
