"""A small real problem: the first decoder layers of a model, with its own final norm and LM head, as a model."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def truncate(model: Path, layers: int, out: Path) -> Path:
    """Write the first `layers` decoder layers of a model as a model of their own, unless it is there.

    Its text is poor, but its next-token distribution is that of real weights on real activations, and a quantized copy
    has to imitate just that.

    Returns:
        the folder, `out`/LAYERS-layers.
    """
    folder = out / f"{layers}-layers"
    if not (folder / "config.json").exists():
        config = AutoConfig.from_pretrained(model)
        config.num_hidden_layers = min(layers, config.num_hidden_layers)
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
        small = AutoModelForCausalLM.from_pretrained(model, config=config, dtype="auto")
        small.save_pretrained(folder)
        AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder
