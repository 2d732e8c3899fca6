"""The model card of a checkpoint: README.md with the front matter that the Hub renders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bq_kernels.format import QuantConfig
from huggingface_hub import ModelCard, ModelCardData

from .errors import explain_write
from .model import SourceModel
from .skeleton import auto_class

if TYPE_CHECKING:
    from .conversion.source import Source

_CONVERTED = """# {name}, {bits}-bit integers in the butterfly format

The codes, scales and zero points of {name} ({method}), brought into another format by `bq-convert`. Nothing was
quantized again: every weight is the same number. There is no rotation.

| | |
|---|---|
| bits per weight of the linear layers, all that is stored counted | {bits_per_weight:.3f} |
| bits per weight of the whole file | {file_bits_per_weight:.3f} |
| size | {size:.1f} MB (source: {source_size:.1f} MB) |
| group size, zero point | {group_size}, {zero_point} |

{use}
## Limits

Those of the source: see its card.
"""

_USE = """## Use

With vLLM and the bq-vllm plugin installed:

    vllm serve FOLDER --quantization butterfly

With transformers: `import bq_calibration.hf` first, then `{auto_class}.from_pretrained("FOLDER")`; without the
import transformers refuses to load it.
"""

_TEMPLATE = """# {name}, {bits}-bit butterfly

Linear weights are {bits}-bit integers in a rotated basis ({rotation}), after ButterflyQuant
([arXiv 2509.09679](https://arxiv.org/abs/2509.09679)). {kept}

| | |
|---|---|
| bits per weight of the linear layers, all that is stored counted | {bits_per_weight:.3f} |
| bits per weight of the whole file | {file_bits_per_weight:.3f} |
| size | {size:.1f} MB (original: {source_size:.1f} MB) |
| group size, zero point | {group_size}, {zero_point} |
| calibrated on | {tokens:,} tokens of {dataset} |

{use}
## Measured while calibrating

| stage | measure | before | after |
|---|---|---|---|
{gains}

Perplexity and zero-shot accuracy are not part of calibration: `bq-eval FOLDER --perplexity wikitext2` measures them.
Everything else that was measured is in `bq_report.json`.

## Limits

A model of few bits makes more errors than its original, above all a small one; evaluate it on your own task before you
use it. What the original's card says of intended use, bias and risks holds here as well.

## Recipe

| setting | value |
|---|---|
{settings}
"""


def write_model_card(folder: Path, source: SourceModel, config: QuantConfig, report: dict[str, Any]) -> None:
    """Write README.md into a finished checkpoint.

    Args:
        folder: the checkpoint.
        source: the 16-bit model; its card's licence and languages are taken over.
        config: the checkpoint's format.
        report: of the run, as in bq_report.json.

    Raises:
        WriteError: if it cannot be written.
    """
    totals, recipe = report["totals"], report["recipe"]
    rotation = config.rotation.kind
    if rotation != "none":
        rotation += f", blocks of {config.rotation.block_size}"
    rows = (f"| {g['stage']} | {g['measure']} | {g['before']:.4f} | {g['after']:.4f} |" for g in report["gains"])
    text = _TEMPLATE.format(
        name=source.name,
        kept=_kept(source, config),
        use=_USE.format(auto_class=auto_class(source.config.model_type).__name__),
        bits=config.bits,
        rotation=rotation,
        bits_per_weight=totals["bits_per_weight"],
        file_bits_per_weight=totals["file_bits_per_weight"],
        size=totals["checkpoint_bytes"] / 1e6,
        source_size=totals["source_bytes"] / 1e6,
        group_size=config.group_size,
        zero_point=config.zero_point,
        tokens=report["calibration_tokens"],
        dataset=recipe["dataset"],
        gains="\n".join(rows),
        settings="\n".join(f"| {key} | {value} |" for key, value in recipe.items()),
    )
    task = "image-text-to-text" if source.other_parts else "text-generation"
    _write(folder, text, source.name, _source_card(source.folder), config, task, "bq-calibrate")


def write_converted_card(folder: Path, source: Source, config: QuantConfig, report: dict[str, Any]) -> None:
    """Write README.md into a finished conversion.

    Args:
        folder: the checkpoint.
        source: the checkpoint that was converted; its card's licence and languages are taken over.
        config: the checkpoint's format.
        report: of the run, as in bq_report.json.

    Raises:
        WriteError: if it cannot be written.
    """
    totals = report["totals"]
    text = _CONVERTED.format(
        name=source.name,
        bits=config.bits,
        method=source.method,
        bits_per_weight=totals["bits_per_weight"],
        file_bits_per_weight=totals["file_bits_per_weight"],
        size=totals["checkpoint_bytes"] / 1e6,
        source_size=totals["source_bytes"] / 1e6,
        group_size=config.group_size,
        zero_point=config.zero_point,
        use=_USE.format(auto_class=auto_class(source.skeleton.config.model_type).__name__),
    )
    _write(folder, text, source.name, _source_card(source.folder), config, "text-generation", "bq-convert")


def _write(
    folder: Path, text: str, name: str, original: dict[str, Any], config: QuantConfig, task: str, command: str
) -> None:
    is_hub_name = "/" in name
    data = ModelCardData(
        base_model=name if is_hub_name else None,
        base_model_relation="quantized" if is_hub_name else None,
        license=original.get("license"),
        license_name=original.get("license_name"),
        license_link=original.get("license_link"),
        language=original.get("language"),
        library_name="vllm",
        pipeline_tag=task,
        tags=["butterfly", "quantized", f"{config.bits}-bit", "bq-vllm"],
        quantized_by=command,
    )
    with explain_write(folder / "README.md"):
        (folder / "README.md").write_text(f"---\n{data.to_yaml()}\n---\n\n{text}")


def _kept(source: SourceModel, config: QuantConfig) -> str:
    """Sentences on the embedding and the LM head, and on all that is not quantized."""
    names = source.embedding_names
    titles = ("embedding", "LM head") if len(names) == 2 else ("embedding and LM head (one weight)",)
    titles = dict(zip(names, titles, strict=True))
    packed = [f"{titles[n][0].upper()}{titles[n][1:]}: {_bits_of_table(config, n)}." for n in names if config.packs(n)]
    kept = [title for name, title in titles.items() if not config.packs(name)]
    rest = [*kept, "norms", *(part.replace("_", " ") for part in source.other_parts)]
    return " ".join([*packed, f"As in the original: {', '.join(rest)}."])


def _bits_of_table(config: QuantConfig, name: str) -> str:
    kept = config.kept_tokens.get(name)
    return f"{config.bits_of(name)} bits" + (f", the rows of the {kept} most frequent tokens in 16" if kept else "")


def _source_card(folder: Path) -> dict[str, Any]:
    """Front matter of the original's card; empty where there is none, or none that can be read."""
    file = folder / "README.md"
    try:
        return ModelCard(file.read_text()).data.to_dict() if file.is_file() else {}
    except Exception:  # a card in a form of its own is no reason to fail at the end of a run
        return {}
