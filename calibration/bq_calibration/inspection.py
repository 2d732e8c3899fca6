"""The description of a checkpoint that `bq-inspect` prints."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from bq_kernels import checksums
from bq_kernels.format import FormatError
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from .checkpoint import REPORT, read_report, verify
from .errors import UserError

_TOKENIZERS = ("tokenizer.json", "*.model", "*.tiktoken", "tekken.json", "vocab.*", "token*.py")
_PROBE = "Two plus two is 4."


def describe(folder: Path) -> dict[str, Any]:
    """Verify a checkpoint and describe it; the run's report is part of it where the checkpoint has one.

    Raises:
        UserError: naming the first file or tensor that is damaged or breaks the format.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected that of a butterfly checkpoint")
    try:
        sums = checksums.compare(folder)
    except FormatError as error:
        raise UserError(str(error)) from error
    verified = verify(folder)
    check_tokenizer(folder)
    return {
        "checkpoint": str(folder),
        "quantization_config": verified.config.to_dict(),
        "bits_per_weight": verified.bits_per_weight(),
        "file_bits_per_weight": verified.file_bits_per_weight(),
        "stored_bits": verified.stored_bits,
        "unquantized_dtypes": verified.unquantized_dtypes,
        "total_bytes": verified.total_bytes,
        "checksums": {
            "listed": sums.listed,
            "files": len(sums.files),
            "tensors": sums.tensors,
            "not_covered": sums.uncovered,
        },
        "layers": {name: {"out_features": n, "in_features": k} for name, (n, k) in verified.layers.items()},
        "embeddings": {
            name: {
                "tokens": n,
                "features": k,
                "bits": verified.config.bits_of(name),
                "kept_tokens": verified.config.kept_tokens.get(name, 0),
            }
            for name, (n, k) in verified.embeddings.items()
        },
        "report": read_report(folder),
    }


def check_tokenizer(folder: Path) -> None:
    """Refuse a checkpoint whose tokenizer is missing or broken.

    Raises:
        UserError: naming the folder.
    """
    if not any(any(folder.glob(pattern)) for pattern in _TOKENIZERS):
        raise UserError(f"{folder}: no tokenizer (tokenizer.json, tokenizer.model, …); copy that of the 16-bit model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        text = tokenizer.decode(tokenizer(_PROBE)["input_ids"], skip_special_tokens=True)
    except BaseException as error:  # some tokenizers end in a panic of Rust
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        words = " ".join(str(error).split())
        raise UserError(f"{folder}: the tokenizer cannot be loaded ({words}); copy that of the 16-bit model") from error
    if not text.strip():
        raise UserError(f"{folder}: the tokenizer knows no text, it is damaged; copy that of the 16-bit model")


def print_description(description: dict[str, Any], console: Console) -> None:
    """Print `describe`'s result as tables that fit 80 columns.

    Raises:
        UserError: if the report is not one of bq-calibrate.
    """
    try:
        tables = [_summary(description)]
        if (report := description["report"]) is not None:
            tables += [] if "conversion" in report else [_gains(report), _input_table(report), _error_table(report)]
            if any("expert_tokens" in entry for entry in report.get("inputs", ())):
                tables.append(_expert_table(report))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        file = Path(description["checkpoint"]) / REPORT
        raise UserError(f"{file}: not a report of bq-calibrate ({error!r}); download it again, or delete it") from error
    for table in tables:
        console.print(table)


def _table(title: str, *columns: str, left: int = 1) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i < left else "right")
    return table


def _summary(description: dict[str, Any]) -> Table:
    config, report = description["quantization_config"], description["report"]
    table = _table("All tensors verified", "checkpoint", description["checkpoint"], left=2)
    table.columns[1].overflow = "fold"
    rows = {"bits, group, zero point": f"{config['bits']}, {config['group_size']}, {config['zero_point']}"}
    rows["rotation"] = f"{config['rotation']['kind']} {config['rotation'].get('block_size', '')}"
    rows["packed layers"] = str(len(description["layers"]))
    embeddings = [
        f"{name}: {table['bits']} bits" + (f", {table['kept_tokens']} tokens in 16" if table["kept_tokens"] else "")
        for name, table in description["embeddings"].items()
    ]
    rows["embedding, LM head"] = "; ".join(embeddings) or "not quantized"
    rows["bits per weight of the whole file"] = f"{description['file_bits_per_weight']:.4f}"
    rows["bits per weight of linear layers, all counted"] = f"{description['bits_per_weight']:.4f}"
    weights = sum(layer["out_features"] * layer["in_features"] for layer in description["layers"].values())
    rows |= {f"  {part}": f"{bits / weights:.4f}" for part, bits in description["stored_bits"].items()}
    kept = description["unquantized_dtypes"].items()
    rows["not quantized"] = ", ".join(f"{count} tensors in {dtype}" for dtype, count in kept)
    rows["checksums"] = _checksums(description["checksums"])
    rows["size of all tensors"] = f"{description['total_bytes'] / 1e6:.1f} MB"
    if report is not None:
        run, dtypes = report["run"], report["run"].get("compute_dtype", {})
        source = f"{report['source_model']}, {report['totals']['source_bytes'] / 1e6:.1f} MB"
    if report is not None and "conversion" in report:
        rows["converted from"] = f"{source}, {report['conversion']['method']}"
    elif report is not None:
        rows["16-bit model"] = source
        rows["calibrated on"] = f"{report['calibration_tokens']:,} tokens of {report['recipe']['dataset']}"
        rows["calibration"] = f"{run['wall_seconds']:.0f} s, peak {run['peak_memory_bytes'] / 1e9:.2f} GB"
        rows["computed in"] = ", ".join(f"{dtype} ({part})" for part, dtype in dtypes.items())
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _checksums(sums: dict[str, Any]) -> str:
    if not sums["listed"]:
        tensors = f"; {sums['tensors']} tensors equal those in their headers" if sums["tensors"] else ""
        return f"none, {checksums.SUMS} is missing: damage may go unnoticed{tensors}"
    others = sums["not_covered"]
    rest = f"; not covered: {', '.join(others[:5])}{' …' if len(others) > 5 else ''}" if others else ""
    return f"{sums['files']} files and {sums['tensors']} tensors as written{rest}"


def _gains(report: dict[str, Any]) -> Table:
    table = _table("Gain of every stage", "stage", "measure", "before", "after", left=2)
    for gain in report["gains"]:
        table.add_row(gain["stage"], gain["measure"], f"{gain['before']:.4f}", f"{gain['after']:.4f}")
    return table


def _layers(entry: dict[str, Any]) -> str:
    return entry["layers"].replace("_proj", "")


def _input_table(report: dict[str, Any]) -> Table:
    columns = ("block", "inputs of", "kurtosis", "→", "max/RMS", "→", "skew", "→", "μ·√b")
    table = _table("Outliers before → after rotation, coherence", *columns, left=2)
    for entry in report["inputs"]:
        before, after = entry["inputs"]["before"], entry["inputs"].get("after")
        cells = []
        for key in ("kurtosis", "max_over_rms", "skew"):
            cells += [f"{before[key]:.1f}", f"{after[key]:.1f}" if after else "–"]
        mu = f"{entry['coherence'] / entry['best_coherence']:.2f}" if "coherence" in entry else "–"
        table.add_row(str(entry["block"]), _layers(entry), *cells, mu)
    return table


def _error_table(report: dict[str, Any]) -> Table:
    kinds = list(report["inputs"][0]["relative_output_error"])
    table = _table("Relative output error by rotation", "block", "layers", "bits", *kinds, "refined", left=2)
    for entry in report["inputs"]:
        errors = (f"{entry['relative_output_error'][kind]:.4f}" for kind in kinds)
        cells = str(entry["bits"]), *errors, f"{entry['refined_output_error']:.4f}"
        table.add_row(str(entry["block"]), _layers(entry), *cells)
    return table


def _expert_table(report: dict[str, Any]) -> Table:
    table = _table("Calibration tokens per expert", "block", "layers", "experts", "least", "median", "most", left=2)
    for entry in report["inputs"]:
        if counts := entry.get("expert_tokens"):
            cells = len(counts), min(counts), statistics.median_low(counts), max(counts)
            table.add_row(str(entry["block"]), _layers(entry), *map(str, cells))
    return table
