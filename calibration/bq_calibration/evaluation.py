"""Perplexity and zero-shot tasks of a checkpoint or a 16-bit model, through transformers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import Progress
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from . import hf  # noqa: F401  registers the butterfly loader
from .compute import COMPUTE_DTYPES, native_dtype
from .data import dataset_name, load_documents, tokenize
from .errors import UserError
from .model import resolve_model

_ROWS = 16  # tokens whose logits are float32 at a time: few enough for a CPU cache, where their loss is 3 x faster


class Evaluator:
    """A loaded model and its tokenizer.

    Args:
        model: a butterfly checkpoint or any Hugging Face causal LM; folder or hub name.
        dtype: one of COMPUTE_DTYPES; `auto` is the checkpoint's where the device multiplies it natively, else float32.
        device: where to run. On a CPU packed layers are unfolded into dense ones, which run several times faster.

    Raises:
        UserError: if the model cannot be loaded.
    """

    def __init__(self, model: str, dtype: str, device: str):
        folder = resolve_model(model)
        if dtype not in COMPUTE_DTYPES:
            raise UserError(f"--compute-dtype {dtype}: expected one of {', '.join(COMPUTE_DTYPES)}")
        try:
            if dtype == "auto":
                stored = AutoConfig.from_pretrained(folder).dtype or torch.float32
                dtype = native_dtype(stored, device)
            self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{folder}: cannot be loaded: {error}") from error
        if device == "cpu" and getattr(self.model, "hf_quantizer", None) is not None:
            self.model.dequantize()

    @torch.no_grad()
    def perplexity(self, dataset: str, context: int, windows: int | None, progress: Progress) -> dict[str, Any]:
        """Perplexity by the project's protocol.

        Text is joined and tokenised once, cut into consecutive windows of `context` tokens without overlap; the mean
        is over all predicted tokens.

        Args:
            dataset: `wikitext2`, `c4` or a local file.
            context: tokens per window.
            windows: only the first so many; None for all.

        Raises:
            UserError: if the text does not fill a window.
        """
        tokens = tokenize(self.tokenizer, "\n\n".join(load_documents(dataset, "test")))
        count = min(len(tokens) // context, windows or len(tokens))
        if not count:
            raise UserError(f"{dataset}: {len(tokens)} tokens do not fill a window of {context}; lower --context")
        total = 0.0
        task = progress.add_task("perplexity", total=count)
        for window in range(count):
            ids = torch.tensor([tokens[window * context : (window + 1) * context]], device=self.model.device)
            logits = self.model(input_ids=ids, use_cache=False).logits[0, :-1]
            pairs = zip(logits.split(_ROWS), ids[0, 1:].split(_ROWS), strict=True)
            total += float(sum(F.cross_entropy(row.float(), following, reduction="sum") for row, following in pairs))
            progress.advance(task)
        value = math.exp(total / (count * (context - 1)))
        return {"dataset": dataset_name(dataset), "context": context, "windows": count, "value": value}

    def tasks(self, names: list[str], include_path: Path | None, limit: int | None) -> dict[str, dict[str, Any]]:
        """Zero-shot accuracy through lm-eval, `acc_norm` where a task has it, else `acc`.

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
        table = {}
        for name, values in results["results"].items():
            metric = next((m for m in ("acc_norm", "acc", "word_perplexity") if f"{m},none" in values), None)
            if metric is None:
                continue
            stderr = values.get(f"{metric}_stderr,none")
            stderr = float(stderr) if isinstance(stderr, (int, float)) else math.nan
            table[name] = {"metric": metric, "value": values[f"{metric},none"], "stderr": stderr}
        return table
