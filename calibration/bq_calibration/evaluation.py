"""Perplexity and zero-shot tasks of a checkpoint or a 16-bit model, through transformers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import Progress
from transformers import AutoConfig, AutoTokenizer

from . import hf  # noqa: F401  registers the butterfly loader
from .compute import COMPUTE_DTYPES, dtype_name, native_dtype
from .data import check_length, cut_windows, dataset_name, load_documents
from .errors import UserError
from .model import resolve_model
from .skeleton import auto_class

_MOST_NATS = 700  # whose exponential is a number
_ROWS = 16  # tokens whose logits are float32 at a time: few enough for a CPU cache, where their loss is 3 x faster


class Evaluator:
    """A loaded model and its tokenizer.

    Args:
        model: a butterfly checkpoint or any Hugging Face causal LM; folder or hub name.
        dtype: one of COMPUTE_DTYPES; `auto` is the checkpoint's where the device multiplies it natively, else float32.
        device: where to run.
        packed: keep packed layers on a CPU as well; by default they become dense there, which run several times faster.

    Raises:
        UserError: if the model cannot be loaded.
    """

    def __init__(self, model: str, dtype: str, device: str, packed: bool = False):
        folder = resolve_model(model)
        if dtype not in COMPUTE_DTYPES:
            raise UserError(f"--compute-dtype {dtype}: expected one of {', '.join(COMPUTE_DTYPES)}")
        try:
            config = AutoConfig.from_pretrained(folder)
            if dtype == "auto":
                stored = config.dtype or config.get_text_config().dtype or torch.float32
                dtype = native_dtype(stored, device)
            kind = auto_class(config.model_type)
            self.model = kind.from_pretrained(folder, dtype=dtype).to(device).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{folder}: cannot be loaded: {error}") from error
        if device == "cpu" and not packed and getattr(self.model, "hf_quantizer", None) is not None:
            self.model.dequantize()

    @torch.no_grad()
    def perplexity(self, dataset: str, context: int, windows: int | None, progress: Progress) -> dict[str, Any]:
        """Perplexity by the project's protocol.

        Text is joined and tokenised once, cut into consecutive windows of `context` tokens without overlap, BOS first
        in each where the tokenizer adds one; the mean is over all predicted tokens.

        Args:
            dataset: `wikitext2`, `c4` or a local file.
            context: tokens per window.
            windows: only the first so many; None for all.

        Raises:
            UserError: if the text does not fill a window, the model has too few positions, or the loss is not finite.
        """
        check_length(self.model.config, context, "--context")
        text = "\n\n".join(load_documents(dataset, "test"))
        rows = cut_windows(self.tokenizer, text, context)[:windows]
        if not rows:
            raise UserError(f"{dataset}: the text does not fill a window of {context} tokens; lower --context")
        total = 0.0
        task = progress.add_task("perplexity", total=len(rows))
        for number, row in enumerate(rows, 1):
            ids = torch.tensor([row], device=self.model.device)
            logits = self.model(input_ids=ids, use_cache=False).logits[0, :-1]
            pairs = zip(logits.split(_ROWS), ids[0, 1:].split(_ROWS), strict=True)
            total += float(sum(F.cross_entropy(row.float(), following, reduction="sum") for row, following in pairs))
            if not math.isfinite(total):
                dtype = dtype_name(self.model.dtype)
                raise UserError(
                    f"{dataset}, window {number}: the loss is {total}; activations may overflow {dtype}: "
                    "try --compute-dtype float32"
                )
            progress.advance(task)
        mean = total / (len(rows) * (context - 1))
        if mean > _MOST_NATS:
            raise UserError(f"{dataset}: the loss is {mean:.0f} nats per token; is the model whole?")
        value = math.exp(mean)
        return {"dataset": dataset_name(dataset), "context": context, "windows": len(rows), "value": value}

    def tasks(self, names: list[str], include_path: Path | None, limit: int | None) -> dict[str, dict[str, Any]]:
        """Zero-shot accuracy through lm-eval, `acc_norm` where a task has it, else `acc`, else its first metric.

        Raises:
            UserError: if lm-eval is missing or does not know a task.
        """
        try:
            from lm_eval import simple_evaluate
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise UserError("--tasks needs lm-eval: pip install 'bq-vllm[evaluation]'") from error
        manager = TaskManager(include_path=str(include_path) if include_path else None)
        unknown = [name for name in names if name not in manager.all_tasks]
        if unknown:
            raise UserError(f"--tasks {unknown[0]}: lm-eval knows no such task; --include-path adds a folder of tasks")
        results = simple_evaluate(
            model=HFLM(pretrained=self.model, tokenizer=self.tokenizer, batch_size=8),
            tasks=names,
            num_fewshot=0,
            limit=limit,
            task_manager=manager,
            bootstrap_iters=1000,
        )
        table = {name: _main_metric(values) for name, values in results["results"].items()}
        if not any(table.values()):
            raise UserError(f"--tasks {','.join(names)}: lm-eval measured nothing that is a number")
        return {name: found for name, found in table.items() if found}


def _main_metric(values: dict[str, Any]) -> dict[str, Any] | None:
    """The metric of a task that a table shows, its standard error, and all metrics; None without any.

    `acc_norm` or `acc` where the task has it, else the first that lm-eval lists.
    """
    metrics = {
        key: float(value)
        for key, value in values.items()
        if "," in key and "_stderr," not in key and isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    if not metrics:
        return None
    best = next((key for key in ("acc_norm,none", "acc,none", "word_perplexity,none") if key in metrics), min(metrics))
    name, kind = best.split(",", 1)
    stderr = values.get(f"{name}_stderr,{kind}")
    stderr = float(stderr) if isinstance(stderr, (int, float)) else math.nan
    shown = name if kind == "none" else f"{name} ({kind})"
    return {"metric": shown, "value": metrics[best], "stderr": stderr, "all": metrics}
