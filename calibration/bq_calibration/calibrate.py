"""The run: block by block, capture inputs, learn rotations, round, keep; then write the checkpoint."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import os
import platform
import resource
import shutil
import time
from collections.abc import Callable
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from bq_kernels.format import FormatError, QuantConfig
from bq_kernels.reference import angles_of, dense_weight, hadamard_angles, rotate
from rich.progress import Progress
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from . import analysis
from .architecture import InputGroup
from .checkpoint import export, write_json, write_tensors
from .data import calibration_tokens, sampled_tokens
from .distill import distill, held_out, teacher_states
from .errors import UserError, WriteError
from .model import SourceModel, TensorStore, block_output
from .quantize import Quantized, output_error, refine, round_gptq, round_nearest
from .recipes import Recipe, quant_config
from .reconstruct import block_loss, reconstruct
from .report import write_report
from .rotation import MOST_ROWS, Problem, Turn, initial_angles, learn
from .sensitivity import allocate, sensitivities
from .student import Student

TOKENS_PER_BATCH = 4096
SAMPLE_TOKENS = 1024  # inputs kept for statistics and for the uniformity term


def _spread(x: torch.Tensor, most: int) -> torch.Tensor:
    """At most `most` rows of x, evenly spread."""
    return x[:: max(1, len(x) // most)][:most].clone()


class _InputReached(Exception):
    """Stops a block's forward pass once the wanted input has been seen."""


class Calibration:
    """One run of `bq-calibrate`: everything between the model and the checkpoint.

    Work is kept in `OUT.partial` beside the output folder, one file a finished block, each written whole or not at
    all. The output folder appears at the very end, complete.

    Args:
        model: folder or hub name of the 16-bit model.
        out: folder to write.
        recipe: settings.
        device: where blocks are computed.
        resume: go on from an earlier, interrupted run.

    Raises:
        UserError: when the model, the settings or the output folder will not do.
    """

    def __init__(self, model: str, out: str, recipe: Recipe, device: str, resume: bool):
        self.started, self.spent = time.time(), 0.0
        self.recipe, self.device, self.resume = recipe, torch.device(device), resume
        self.out = Path(out)
        self.staging = self.out.with_name(self.out.name + ".partial")
        self.source = SourceModel(model, self.device)
        self.config = self._check_geometry()

    def run(self, progress: Progress) -> None:
        """Calibrate and write the checkpoint.

        Raises:
            UserError: naming what went wrong; finished blocks are kept for `--resume`.
        """
        with self._staging_folder():
            tokens = self._tokens(progress)
            if self.recipe.target_bpw is not None:
                self.config = dataclasses.replace(self.config, module_bits=self._module_bits(tokens, progress))
            hidden, arguments = self.source.embed(tokens if self.recipe.reconstruct else tokens[: self.recipe.samples])
            original = hidden.clone() if self.recipe.reconstruct else None  # what the 16-bit model computes
            reports = []
            task = progress.add_task("calibrating blocks", total=self.source.num_blocks)
            for index in range(self.source.num_blocks):
                stem = self.staging / "blocks" / f"{index:05d}"
                with self.source.block(index) as block:
                    forward = self._forward_over(block, hidden, arguments[index])
                    rounding = self._forward_over(block, hidden[: self.recipe.samples], arguments[index])
                    if original is not None:
                        self._forward_over(block, original, arguments[index])(keep=original)
                    if stem.with_suffix(".safetensors").exists():
                        self._install(block, index, load_file(stem.with_suffix(".safetensors")))
                    else:  # leaves the block quantized
                        tensors, inputs = self._quantize_block(block, index, rounding)
                        report = {"inputs": inputs, "reconstruction": None}
                        if original is not None:
                            tensors, report["reconstruction"] = self._reconstruct(
                                block, index, tensors, hidden, original, arguments[index], progress
                            )
                        write_json(stem.with_suffix(".json"), report)
                        write_tensors(stem.with_suffix(".safetensors"), tensors)  # last: its presence means done
                    forward(keep=hidden)
                reports.append(json.loads(stem.with_suffix(".json").read_text()))
                progress.advance(task)
            del hidden, original
            rounded, stages = self._train(tokens, progress)
            progress.update(task, description="writing the checkpoint")
            final = self.staging / "final"
            shutil.rmtree(final, ignore_errors=True)
            export(self.source, rounded, self.config, self.recipe, final)
            write_report(
                final,
                self.source.folder,
                self.config,
                self.recipe,
                self._trained_on(tokens).numel(),
                reports,
                stages,
                self._run_facts(),
            )
            os.replace(final, self.out)
        shutil.rmtree(self.staging)

    # ---- set-up

    def _check_geometry(self) -> QuantConfig:
        block = self.source.decoder.layers[0]
        widths = {group: self.source.linear(block, group.layers[0]).in_features for group in self.source.groups}
        config = quant_config(self.recipe, widths)
        try:
            for group in self.source.groups:
                for name in group.layers:
                    layer = self.source.linear(block, name)
                    config.tensors(name, layer.in_features, layer.out_features)
        except FormatError as error:
            raise UserError(str(error)) from error
        return config

    @contextmanager
    def _staging_folder(self):
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise UserError(f"{self.out} exists and is not empty; choose another output folder or remove it")
        settings = {"model": str(self.source.folder.resolve()), **self.recipe.to_dict()}
        record = self.staging / "settings.json"
        if self.staging.exists() and not self.resume and record.exists():
            raise UserError(f"{self.staging} holds an unfinished run; continue it with --resume, or remove the folder")
        need = sum(file.stat().st_size for file in self.source.folder.glob("*.safetensors"))
        try:
            (self.staging / "blocks").mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.staging).free
            if free < need:
                raise UserError(
                    f"{self.staging.parent}: no space left: {free / 1e9:.2f} GB free, {need / 1e9:.2f} GB needed; "
                    "free some or choose another output folder"
                )
            with open(self.staging / "lock", "w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise UserError(f"{self.out} is in use by another running bq-calibrate") from error
                self.resumed = record.exists()
                if self.resumed:
                    before = json.loads(record.read_text())
                    changed = [key for key in settings if settings[key] != before.get(key)]
                    if changed:
                        key = changed[0]
                        raise UserError(
                            f"--resume: {key} was {before.get(key)!r} in the unfinished run and is {settings[key]!r} "
                            f"now; use the same settings, or remove {self.staging}"
                        )
                self._start_clock()
                write_json(record, settings)
                yield
        except WriteError as error:
            raise UserError(
                f"{error}. Finished blocks are kept: free some space and run again with --resume"
            ) from error
        except PermissionError as error:
            raise UserError(f"{self.out}: cannot be written ({error})") from error

    def _start_clock(self) -> None:
        """Count what interrupted processes of this run took, each up to the last tensors that it saved."""
        clock = self.staging / "clock.json"
        if clock.exists():
            before = json.loads(clock.read_text())
            saved = max((file.stat().st_mtime for file in self.staging.rglob("*.safetensors")), default=0.0)
            self.spent = before["spent"] + max(0.0, saved - before["started"])
        write_json(clock, {"started": self.started, "spent": self.spent})

    def _tokens(self, progress: Progress) -> torch.Tensor:
        file = self.staging / "tokens.safetensors"
        if not file.exists():
            recipe, tokenizer = self.recipe, self.source.tokenizer()
            wanted = recipe.samples
            if recipe.trains:
                wanted = max(wanted, recipe.train_samples) + recipe.held_out
            if recipe.dataset == "self":
                model = AutoModelForCausalLM.from_pretrained(self.source.folder, dtype=self.source.dtype)
                model = model.to(self.device).eval()
                tokens = sampled_tokens(model, tokenizer, wanted, recipe.seqlen, recipe.seed, progress)
                del model
            else:
                tokens = calibration_tokens(tokenizer, recipe.dataset, wanted, recipe.seqlen, recipe.seed)
            write_tensors(file, {"tokens": tokens})
        return load_file(file)["tokens"]

    def _trained_on(self, tokens: torch.Tensor) -> torch.Tensor:
        """All samples but those that are held out, the last ones."""
        return tokens[: len(tokens) - self.recipe.held_out] if self.recipe.trains else tokens

    def _module_bits(self, tokens: torch.Tensor, progress: Progress) -> dict[str, int]:
        """Bits of the layers that get more than the recipe's, by full name, so that `target_bpw` is spent."""
        file = self.staging / "module_bits.json"
        if not file.exists():
            block, config = self.source.decoder.layers[0], self.config
            weights, stored = {}, 0
            for group in self.source.groups:
                layers = {name: self.source.linear(block, name) for name in group.layers}
                weights[group] = sum(layer.in_features * layer.out_features for layer in layers.values())
                for name, layer in layers.items():
                    for suffix, spec in config.tensors(name, layer.in_features, layer.out_features).items():
                        if suffix != "angles" or name == group.layers[0]:
                            stored += math.prod(spec.shape) * spec.dtype.itemsize * 8
            budget = (self.recipe.target_bpw * sum(weights.values()) - stored) * self.source.num_blocks
            if budget < 0:
                least = stored / sum(weights.values())
                raise UserError(
                    f"--target-bpw {self.recipe.target_bpw}: {config.bits} bits alone, all counted, take {least:.3f}"
                )
            losses = sensitivities(self.source, tokens, self._rounding_error, self.recipe.seed, progress)
            given = allocate(losses, weights, config.bits, budget)
            write_json(
                file,
                {
                    self.source.block_prefix(index) + name: bits
                    for (index, group), bits in sorted(given.items(), key=lambda item: item[0][0])
                    for name in group.layers
                },
            )
        return json.loads(file.read_text())

    def _rounding_error(
        self, weight: torch.Tensor, hessian: torch.Tensor, group: InputGroup, bits: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Error of some rows of a weight by rounding as this run rounds, before angles are learned; and the Hessian."""
        weight = weight[:: max(1, len(weight) // MOST_ROWS)]
        if self.config.rotation.kind != "none":
            block_size = self.config.rotation.block(group.layers[0])
            turn = Turn(hadamard_angles(weight.shape[1], block_size, self.device), block_size)
            weight, hessian = turn.forward(weight), turn.hessian(hessian)
        return self._round(weight, hessian, bits).weight() - weight, hessian

    def _train(self, tokens: torch.Tensor, progress: Progress) -> tuple[Path, list[dict[str, Any]]]:
        """End-to-end training; returns the folder with the last tensors, and a report of every stage."""
        recipe, source, rounded = self.recipe, self.source, self.staging / "blocks"
        if not recipe.trains_end_to_end:
            return rounded, []
        states = teacher_states(source, tokens, self.staging / "teacher.safetensors", progress)
        count = len(self._trained_on(tokens))
        stages: list[dict[str, Any]] = []
        for stage, steps in (("rounded", 0), ("finetune", recipe.finetune), ("distill", recipe.distill)):
            folder = self.staging / stage
            if stage != "rounded" and not steps:
                continue
            folder.mkdir(exist_ok=True)
            if not (folder / "report.json").exists():
                report: dict[str, Any] = {"stage": stage}
                if steps:
                    packed, saved = TensorStore(rounded), self.staging / f"{stage}.training"
                    tensors, training = distill(
                        source,
                        self.config,
                        packed,
                        tokens[:count],
                        states[:count],
                        steps,
                        stage == "finetune",
                        recipe.seed,
                        saved,
                        progress,
                    )
                    write_tensors(folder / "model.safetensors", tensors)
                    saved.unlink(missing_ok=True)
                    report |= training
                if recipe.held_out:
                    packed = TensorStore(folder if steps else rounded)
                    student = Student(source, self.config, packed)
                    report["held_out_divergence"] = held_out(student, tokens[count:], states[count:])
                write_json(folder / "report.json", report)  # last: its presence means done
            stages.append(json.loads((folder / "report.json").read_text()))
            rounded = folder if steps else rounded
        return rounded, stages

    # ---- one block

    def _forward_over(self, block: nn.Module, hidden: torch.Tensor, arguments: dict[str, Any]) -> Callable:
        """A function that runs all samples through `block`, and with `keep` writes the outputs there."""
        batch = max(1, TOKENS_PER_BATCH // hidden.shape[1])

        @torch.no_grad()
        def forward(keep: torch.Tensor | None = None) -> None:
            for start in range(0, len(hidden), batch):
                try:
                    output = block_output(block, hidden[start : start + batch], arguments)
                except _InputReached:
                    continue
                if keep is not None:
                    keep[start : start + batch] = output

        return forward

    def _reconstruct(
        self,
        block: nn.Module,
        index: int,
        tensors: dict[str, torch.Tensor],
        hidden: torch.Tensor,
        original: torch.Tensor,
        arguments: dict[str, Any],
        progress: Progress,
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Train a block that has been rounded and install it; its tensors, and the losses for the report."""
        count = len(hidden) - self.recipe.held_out

        def held_out_loss() -> float:
            states = hidden[count:].clone()
            self._forward_over(block, states, arguments)(keep=states)
            return block_loss(states, original[count:]).item()

        before = held_out_loss() if self.recipe.held_out else None
        tensors, losses = reconstruct(
            self.source,
            self.config,
            block,
            index,
            tensors,
            hidden[:count],
            original[:count],
            arguments,
            self.recipe.reconstruct,
            self.recipe.seed * 1_000_003 + index,
            progress,
        )
        self._install(block, index, tensors)
        report: dict[str, Any] = {"losses": losses}
        if before is not None:
            report["held_out_loss"] = [before, held_out_loss()]
        return tensors, report

    def _capture(self, layer: nn.Linear, forward: Callable) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean of x xᵀ over all tokens that reach `layer`, float32 [K, K], and a sample of the x."""
        hessian = torch.zeros(layer.in_features, layer.in_features, device=self.device)
        kept: list[torch.Tensor] = []
        count = 0

        def hook(_module, args):
            nonlocal count
            x = args[0].reshape(-1, layer.in_features).float()
            hessian.addmm_(x.T, x)
            kept.append(_spread(x, 64))
            count += len(x)
            raise _InputReached

        handle = layer.register_forward_pre_hook(hook)
        try:
            forward()
        finally:
            handle.remove()
        return hessian / count, _spread(torch.cat(kept), SAMPLE_TOKENS)

    def _round(self, weight: torch.Tensor, hessian: torch.Tensor, bits: int) -> Quantized:
        group = self.config.group(weight.shape[1])
        if self.recipe.rounding == "gptq":
            return round_gptq(weight, hessian, bits, group, self.recipe.zero_point)
        return round_nearest(weight, bits, group, self.recipe.zero_point)

    def _quantize_block(
        self, block: nn.Module, index: int, forward: Callable
    ) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
        """Quantize a block's linear layers in the order in which data meets them; they are replaced as it goes."""
        tensors: dict[str, torch.Tensor] = {}
        reports = []
        for position, group in enumerate(self.source.groups):
            layers = [self.source.linear(block, name) for name in group.layers]
            hessian, inputs = self._capture(layers[0], forward)
            if not bool(torch.isfinite(hessian).all()):
                raise UserError(f"block {index}, {group.name}: the inputs hold NaN or infinity; is the model sound?")
            weight = torch.cat([layer.weight.detach() for layer in layers]).float()
            seed = (self.recipe.seed * 1_000_003 + index) * 16 + position
            bits = self.config.bits_of(self.source.block_prefix(index) + group.layers[0])
            quantized, angles, report = self._quantize_group(group, weight, hessian, inputs, bits, seed)
            reports.append({"block": index} | report)
            start = 0
            for name, layer in zip(group.layers, layers, strict=True):
                full_name = self.source.block_prefix(index) + name
                stored = quantized.rows(start, start + layer.out_features).tensors()
                if self.config.rotation.kind == "butterfly":
                    stored["angles"] = angles.cpu()
                start += layer.out_features
                for suffix, spec in self.config.tensors(full_name, layer.in_features, layer.out_features).items():
                    spec.check(f"{full_name}.{suffix}", stored[suffix])
                    tensors[f"{full_name}.{suffix}"] = stored[suffix].clone()
            self._install(block, index, tensors, group)
        return tensors, reports

    def _quantize_group(
        self,
        group: InputGroup,
        weight: torch.Tensor,
        hessian: torch.Tensor,
        inputs: torch.Tensor,
        bits: int,
        seed: int,
    ) -> tuple[Quantized, torch.Tensor | None, dict[str, Any]]:
        recipe, features = self.recipe, weight.shape[1]
        kind = self.config.rotation.kind
        block_size = self.config.rotation.block(group.layers[0])
        hadamard = hadamard_angles(features, block_size, self.device)
        losses: list[float] = []
        rotations: dict[str, torch.Tensor | None] = {"none": None, "hadamard": hadamard}
        if kind == "butterfly":
            generator = torch.Generator().manual_seed(seed)
            problem = Problem(
                _spread(weight, MOST_ROWS),
                hessian,
                _spread(inputs, MOST_ROWS // 4),
                block_size,
                bits,
                self.config.group(features),
            )
            start = initial_angles(recipe.init, features, block_size, generator)
            rotations[kind], losses = learn(
                problem, start, recipe.objective, recipe.optimizer, recipe.lr, recipe.steps, recipe.uniformity
            )
        # rows are rounded independently of each other, so a spread of them tells what a rotation is worth
        step = max(1, len(weight) // MOST_ROWS)
        errors, chosen, final_error = {}, None, 0.0
        for name, angles in rotations.items():
            turned, turned_hessian = weight, hessian
            if angles is not None:
                turn = Turn(angles.float(), block_size)
                turned, turned_hessian = turn.forward(weight), turn.hessian(hessian)
            if name != kind:
                turned = turned[::step]
            rounded = self._round(turned, turned_hessian, bits)
            if name == kind:
                chosen = refine(rounded, turned, turned_hessian, recipe.refine)
                turned, rounded_rows = turned[::step], rounded.weight()[::step]
                final_error = output_error(turned, chosen.weight()[::step], turned_hessian)
            else:
                rounded_rows = rounded.weight()
            errors[name] = output_error(turned, rounded_rows, turned_hessian)
        angles = rotations[kind]
        report = {
            "layers": group.name,
            "in_features": features,
            "bits": bits,
            "rotation_block": block_size,
            "relative_output_error": errors,
            "refined_output_error": final_error,
            "learning_curve": losses,
            "inputs": {"before": analysis.outliers(inputs)},
        }
        if angles is not None:
            report["inputs"]["after"] = analysis.outliers(rotate(inputs, angles, block_size))
            report["coherence"] = analysis.coherence(angles, block_size)
            report["best_coherence"] = block_size**-0.5
        return chosen, angles, report

    def _install(
        self, block: nn.Module, index: int, tensors: dict[str, torch.Tensor], only: InputGroup | None = None
    ) -> None:
        """Put the dense equivalent of the stored tensors in place of the 16-bit weights: what serving will compute."""
        for group in [only] if only else self.source.groups:
            for name in group.layers:
                layer = self.source.linear(block, name)
                stored = self.source.block_prefix(index) + name + "."
                rotation, block_size = self.config.rotation, self.config.rotation.block(name)
                angles = angles_of(rotation.kind, tensors.get(stored + "angles"), layer.in_features, block_size)
                weight = dense_weight(
                    tensors[stored + "qweight"],
                    tensors[stored + "scales"],
                    tensors.get(stored + "zeros"),
                    angles,
                    block_size,
                    layer.in_features,
                )
                layer.weight = nn.Parameter(weight.to(layer.weight), requires_grad=False)
        prefix = self.source.block_prefix(index)
        for name, tensor in tensors.items():
            if name.endswith("norm.weight"):
                norm = block.get_submodule(name.removeprefix(prefix).removesuffix(".weight"))
                norm.weight = nn.Parameter(tensor.to(norm.weight), requires_grad=False)

    def _run_facts(self) -> dict[str, Any]:
        """What differs from run to run: time, of interrupted processes too; memory, of the last one; machine."""
        on_gpu = self.device.type == "cuda"
        return {
            "wall_seconds": round(self.spent + time.time() - self.started, 1),
            "resumed": self.resumed,
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "peak_gpu_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
            "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
            "python": platform.python_version(),
            "versions": {name: version(name) for name in ("torch", "transformers", "safetensors")},
        }
