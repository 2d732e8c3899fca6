"""The loop behind block-wise and end-to-end training: Adam, a cosine schedule, and a file from which it goes on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.progress import Progress
from safetensors.torch import load_file
from torch import nn

from .files import write_tensors

WARM_UP = 0.1  # share of the steps
SAVE_EVERY = 300.0  # seconds


def train(
    parameters: dict[str, list[nn.Parameter]],
    rates: dict[str, float],
    steps: int,
    step_loss: Callable[[int], float],
    after_step: Callable[[], None],
    saved: Path | None,
    progress: Progress,
    title: str,
) -> list[float]:
    """Train parameters, from where the file `saved` stands if it is there, to the same bytes.

    Args:
        parameters: by kind.
        rates: peak learning rate of every kind; after a short rise a cosine takes them to 0.
        steps: of the optimizer.
        step_loss: computes the loss of a step and its gradients.
        after_step: called after every step of the optimizer.
        saved: safetensors file that is written every few minutes; None for training too short to be worth it.
        progress: shows a bar.
        title: of the bar.

    Returns:
        the loss at every step.
    """
    groups = [{"params": tensors, "lr": rates[kind], "kind": kind} for kind, tensors in parameters.items() if tensors]
    everything = [parameter for group in groups for parameter in group["params"]]
    # codes move one by one, each by its own gradient; the others share the loss's steepest moments
    clipped = [parameter for group in groups if group["kind"] != "codes" for parameter in group["params"]]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), fused=True)
    losses: list[float] = []
    if saved is not None and saved.exists():
        losses = _restore(saved, everything, optimizer)
    task = progress.add_task(title, total=steps, completed=len(losses))
    last_save = time.monotonic()
    for step in range(len(losses), steps):
        warm = min(1.0, (step + 1) / max(1, WARM_UP * steps))
        for group in optimizer.param_groups:
            group["lr"] = rates[group["kind"]] * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
        losses.append(step_loss(step))
        torch.nn.utils.clip_grad_norm_(clipped, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        after_step()
        progress.update(task, advance=1, description=f"{title}, loss {losses[-1]:.3g}")
        if saved is not None and time.monotonic() - last_save >= SAVE_EVERY:
            _save(saved, everything, optimizer, losses)
            last_save = time.monotonic()
    progress.remove_task(task)
    return losses


def _save(saved: Path, everything: list[nn.Parameter], optimizer: torch.optim.Optimizer, losses: list[float]) -> None:
    state = {"losses": torch.tensor(losses, dtype=torch.float64)}
    for i, parameter in enumerate(everything):
        moments = optimizer.state[parameter]
        state[f"{i}.value"] = parameter.detach().cpu().contiguous()
        state[f"{i}.first"], state[f"{i}.second"] = moments["exp_avg"].cpu(), moments["exp_avg_sq"].cpu()
    write_tensors(saved, state)


def _restore(saved: Path, everything: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> list[float]:
    state = load_file(saved)
    losses = state["losses"].tolist()
    for i, parameter in enumerate(everything):
        parameter.data.copy_(state[f"{i}.value"])
        moments = {"exp_avg": state[f"{i}.first"], "exp_avg_sq": state[f"{i}.second"]}
        optimizer.state[parameter] = {"step": torch.tensor(float(len(losses)))} | {
            key: value.to(parameter.device) for key, value in moments.items()
        }
    return losses
