"""A calibration run: the order of its stages, from the 16-bit model to the finished checkpoint."""

from __future__ import annotations

import dataclasses
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from bq_kernels.format import BITS, GROUP_MULTIPLE, HEAD, PER_CHANNEL, FormatError, QuantConfig
from rich.progress import Progress

from . import parallel, preflight
from .architecture import UNPACKED_IN_VLLM, InputGroup, other_matrices
from .data import gather_tokens
from .end_to_end import CURVE, TrainingText, keep_states, train_end_to_end
from .errors import UserError, explain_write
from .export import export, write_checksums
from .files import warn_of_large_files
from .logs import log_to
from .model import SourceModel
from .model_card import write_model_card
from .quant_config import embedding_bits, quant_config, shard_widths
from .quantize_blocks import BLOCKS, quantize_blocks
from .quantize_embeddings import quantize_embeddings
from .recipes import TRAINED_GROUP, USUAL_GROUP, Recipe
from .report import run_facts, write_report
from .sensitivity import mixed_bits
from .skeleton import tied_head
from .store import TensorStore
from .training_plan import free_memory
from .training_text import check_training_text, training_rows
from .workspace import Workspace

logger = logging.getLogger(__name__)


class Calibration:
    """One run of `bq-calibrate`: everything between the model and the checkpoint.

    Args:
        model: folder or hub name of the 16-bit model.
        out: folder to write; unfinished work is kept in `OUT.partial` beside it, log lines in `OUT.log`.
        recipe: settings.
        device: where decoder layers are computed.
        resume: go on from an earlier, interrupted run.
        plots: draw pictures of the report into the checkpoint.
        compute_dtype: see `compute.compute_dtypes`.
        memory_budget: bytes that each process may take; None for most of what is free.
        extends: kept work of a run with fewer training tokens.
        keep_work: leave the work in `OUT.work` for a longer run.

    Raises:
        UserError: when the model, the settings or the output folder will not do.
    """

    def __init__(
        self,
        model: str,
        out: str,
        recipe: Recipe,
        device: str,
        resume: bool = False,
        plots: bool = True,
        compute_dtype: str = "auto",
        memory_budget: int | None = None,
        extends: Path | None = None,
        keep_work: bool = False,
    ):
        self.device, self.plots = torch.device(device), plots
        self.memory_budget = memory_budget or parallel.from_first(lambda: free_memory(self.device))
        self.workspace, self.keep_work = Workspace(Path(out), resume, extends), keep_work
        self.source = SourceModel(model, self.device, compute_dtype, recipe.unquantized_dtype)
        self.recipe, self.config = self._decided(recipe)

    def run(self, progress: Progress) -> dict[str, Any]:
        """Calibrate and write the checkpoint; returns its report.

        Raises:
            UserError: naming the problem; finished blocks are kept for a run with `resume`.
        """
        if parallel.is_first() and not self.workspace.path.exists():  # else an earlier run has checked it
            check_training_text(self.recipe)
        settings = parallel.from_first(lambda: self._settings(progress))
        plan, work = preflight.plan(self.source, self.config, self.recipe, self.memory_budget), self.workspace
        with work.opened(settings, plan.disk_bytes), log_to(work.log):
            logger.info("%s: %s", self.source.name, settings)
            warn_of_large_files(self.source.folder)
            if self.source.experts_on_demand:
                logger.info("a decoder layer with all of its experts does not fit: they are read for every use")
            if not work.resumed and work.extends is None:
                parallel.from_first(lambda: preflight.check_weights(self.source, progress))
            tokens = work.tensors("tokens", lambda: {"tokens": gather_tokens(self.source, self.recipe, progress)})
            tokens = self._fitted(tokens["tokens"])
            parallel.from_first(lambda: preflight.check_activations(self.source, tokens, progress))
            report = self._stages(tokens, progress)
            bits, seconds = report["totals"]["bits_per_weight"], report["run"]["wall_seconds"]
            whole = report["totals"]["file_bits_per_weight"]
            logger.info("%s: %.3f bits per weight, %.3f in the whole file, %.0f s", work.out, bits, whole, seconds)
        if parallel.is_first():
            if self.keep_work:
                work.keep()
            else:
                work.remove()
        return report

    def _settings(self, progress: Progress) -> dict[str, Any]:
        """All that must be the same where an interrupted run goes on."""
        return {
            "model": str(self.source.folder.resolve()),
            **self.recipe.to_dict(),
            "compute_dtype": self.source.compute.to_dict(),
            "source_sha256": preflight.source_fingerprint(self.source, progress),
            "data_sha256": preflight.data_fingerprint(self.recipe, progress),
        }

    def dry_run(self, progress: Progress) -> dict[str, Any]:
        """Check all that a run checks before its first block, and estimate what the run would cost; writes nothing.

        Returns:
            the plan, see `preflight.Plan`, and the windows that the data fills.

        Raises:
            UserError: naming the problem.
        """
        return parallel.from_first(lambda: self._dry_run(progress))

    def _dry_run(self, progress: Progress) -> dict[str, Any]:
        check_training_text(self.recipe)
        plan = preflight.plan(self.source, self.config, self.recipe, self.memory_budget)
        self.workspace.check_free(plan.disk_bytes)
        warn_of_large_files(self.source.folder)
        preflight.check_weights(self.source, progress)
        tokens = self._fitted(gather_tokens(self.source, self.recipe, progress))
        preflight.check_activations(self.source, tokens, progress)
        recipe = self.recipe
        return dataclasses.asdict(plan) | {
            "seconds": plan.seconds(self.device),
            "windows": len(tokens),
            "seqlen": recipe.seqlen,
            "held_out": recipe.held_out if recipe.trains else 0,
            "compute_dtype": self.source.compute.to_dict(),
        }

    def _fitted(self, tokens: torch.Tensor) -> torch.Tensor:
        """Fit the recipe to the windows that the data has given."""
        asked, self.recipe = self.recipe, self.recipe.fitted(len(tokens))
        if self.recipe != asked:
            r = self.recipe
            training = f", {r.train_samples} to train on, {r.held_out} held out" if r.trains else ""
            logger.warning(
                "the data fills %d windows of %d tokens, %d were asked for: %d to round on%s",
                len(tokens), r.seqlen, asked.windows, r.samples, training,
            )  # fmt: skip
        if self.recipe.samples < parallel.size():
            raise UserError(
                f"{self.recipe.samples} samples for {parallel.size()} processes: raise --samples, or use fewer"
            )
        return tokens

    def _stages(self, tokens: torch.Tensor, progress: Progress) -> dict[str, Any]:
        source, recipe, work = self.source, self.recipe.of_blocks(), self.workspace
        parts = tokens.view(-1, recipe.seqlen)
        if recipe.target_bpw is not None:
            bits = work.json("module_bits", lambda: mixed_bits(source, self.config, recipe, parts, progress))
            self.config = dataclasses.replace(self.config, module_bits=self.config.module_bits | bits)
        blocks = quantize_blocks(source, self.config, recipe, parts, work, progress, self._keep_states)
        folder = work.path / BLOCKS
        packed, embeddings = quantize_embeddings(source, self.config, recipe, parts, folder, work, progress)
        packed, stages = self._train(tokens, packed, progress)
        used = parts[: recipe.read_windows].numel()
        return parallel.from_first(lambda: self._finish(packed, used, blocks, stages, embeddings))

    def _keep_states(self, hidden: torch.Tensor) -> None:
        """Spare end-to-end training on the windows of the blocks their way through the 16-bit model.

        Args:
            hidden: states behind its last layer, used up.
        """
        if self.recipe.shares_windows and parallel.size() == 1:
            keep_states(self.source, self.recipe, hidden, self.workspace, self.memory_budget)

    def _finish(self, packed: TensorStore, used: int, *parts: list[dict[str, Any]]) -> dict[str, Any]:
        """Write the checkpoint and its report of several parts, and move it to its place."""
        source, recipe, work = self.source, self.recipe, self.workspace
        final = work.path / "final"
        export(source, packed, self.config, final)
        report = write_report(final, source, self.config, recipe, used, *parts, run_facts(source, work))
        if recipe.train_tokens:
            with explain_write(final):
                (final / "report").mkdir()
                shutil.copyfile(work.path / CURVE, final / "report" / CURVE)
        write_model_card(final, source, self.config, report)
        if self.plots:
            from .plots import write_plots  # matplotlib takes a second to load

            write_plots(final / "report", report)
        write_checksums(final)
        work.publish(final)
        return report

    def _train(
        self, windows: torch.Tensor, packed: TensorStore, progress: Progress
    ) -> tuple[TensorStore, list[dict[str, Any]]]:
        """The end-to-end stage of a rounded model: on the recipe's mix, or on the windows that the blocks have seen."""
        recipe, mixed = self.recipe, None
        if recipe.train_tokens and recipe.mix is not None:
            mixed = training_rows(self.source, recipe, recipe.text_samples, self.workspace, progress)
            text = TrainingText(mixed.tokens, recipe.held_out, shuffled=False)
        else:
            text = TrainingText(windows, recipe.held_out, shuffled=True)
        arguments = (self.source, self.config, recipe, text, self.workspace, packed, self.memory_budget, progress)
        tensors, stages = train_end_to_end(*arguments)
        if mixed is not None:
            stages[-1]["text"] = mixed.report
        return tensors, stages

    def _decided(self, recipe: Recipe) -> tuple[Recipe, QuantConfig]:
        """The recipe with a group size where it leaves that open, and the checkpoint's format.

        Rows have a scale each then, and sensitive layers get more bits, up to those of groups of USUAL_GROUP columns;
        where layers cannot differ in bits, the groups are those. Scales that train end to end are worth more: they have
        groups of up to TRAINED_GROUP columns.
        """
        widths = {group: block.in_features(group) for block, _ in self.source.kinds for group in block.groups}
        if recipe.group_size is not None:
            return recipe, self._format(recipe, widths)
        common = math.gcd(*shard_widths(recipe, widths).values())
        usual = dataclasses.replace(recipe, group_size=math.gcd(USUAL_GROUP, common))
        config = self._format(usual, widths)
        if recipe.bits == max(BITS) or any(group.experts for group in widths):
            return usual, config
        fewer = PER_CHANNEL
        if recipe.train_tokens:
            fewer = max(size for size in range(GROUP_MULTIPLE, TRAINED_GROUP + 1, GROUP_MULTIPLE) if common % size == 0)
        target = recipe.target_bpw or preflight.bits_per_weight(self.source, config)
        chosen = dataclasses.replace(recipe, group_size=fewer, target_bpw=target)
        return chosen, self._format(chosen, widths)

    def _format(self, recipe: Recipe, widths: dict[InputGroup, int]) -> QuantConfig:
        """The checkpoint's format, checked against the shapes of the model's layers.

        Args:
            recipe: settings of the run, its group size among them.
            widths: input features of every group of layers.
        """
        blocks = [block for block, _ in self.source.kinds]
        embeddings = embedding_bits(recipe, self.source.embedding_names, self.source.name)
        if embeddings and tied_head(self.source.skeleton) and len(self.source.embedding_names) == 2:
            raise UserError(
                f"{self.source.folder}: config.json ties the LM head to the embedding, but lm_head.weight differs from "
                "it; set tie_word_embeddings to false"
            )
        for name, bits in embeddings.items():
            if name.rpartition(".")[2] in UNPACKED_IN_VLLM.get(self.source.config.model_type, ()):
                kind = "head" if name.endswith(HEAD) else "embedding"
                model = type(self.source.skeleton).__name__
                raise UserError(f"--{kind}-bits {bits}: vLLM's {model} keeps {name} in 16 bits; use 16")
        if recipe.target_bpw is not None and any(group.experts for group in widths):
            raise UserError("--target-bpw: a mixture of experts has the same bits everywhere; use --bits")
        config = quant_config(recipe, widths, embeddings, self.source.vocabulary)
        others = dict.fromkeys(name for block in blocks for name in other_matrices(block.module, block.groups))
        kept = (*config.modules_to_not_convert, *others, *self.source.other_parts)
        config = dataclasses.replace(config, modules_to_not_convert=kept)
        try:
            for name, layer in [item for block in blocks for item in block.linears().items()]:
                config.tensors(name, layer.in_features, layer.out_features)
        except FormatError as error:
            raise UserError(str(error)) from error
        return config
