"""The loop behind block-wise and end-to-end training: Adam, a schedule, a curve, and a file from which it goes on."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.progress import Progress

from . import parallel
from .errors import explain_write
from .optimizer import Optimizer
from .sampling import derive_seed
from .schedule import Schedule
from .training_state import empty_tensors, latest_state, load_state, save_state

SAVE_EVERY = 300.0  # seconds
SHOW_EVERY = 1.0  # seconds between looks at the loss, which make a GPU wait
COURSE = ("losses", "held_out_steps", "held_out_divergences")  # tensors of a `Curve`


@dataclass
class Curve:
    """The course of a training: the loss of every step, and now and then the divergence on held-out text.

    Attributes:
        file: jsonl file with a line per step, to look at while the training runs; None for none.
        losses: of the steps so far, but for those that are still on the device.
        held_out: step and divergence in nats per token.
        before: divergence before the first step; infinite where it is not known.
    """

    file: Path | None = None
    losses: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    before: float = math.inf
    _pending: list[torch.Tensor] = field(default_factory=list)

    def __len__(self) -> int:
        """Steps so far."""
        return len(self.losses) + len(self._pending)

    def add(self, loss: torch.Tensor) -> None:
        """Take a step's loss, without waiting for it."""
        self._pending.append(loss)

    def flush(self) -> None:
        """Fetch the losses that are still on the device."""
        if not self._pending:
            return
        first = len(self.losses)
        self.losses += torch.stack(self._pending).tolist()
        self._pending = []
        self._write({"step": step + 1, "loss": self.losses[step]} for step in range(first, len(self.losses)))

    def measured(self, divergence: float) -> None:
        """Note the divergence on held-out text after the steps so far."""
        self.flush()
        self.held_out.append((len(self), divergence))
        self._write([{"step": len(self), "held_out_divergence": divergence}])

    def lowest(self) -> float:
        """The lowest divergence on held-out text so far."""
        return min([self.before, *(value for _, value in self.held_out)])

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Take over what `state` gave, also in the file."""
        self.losses = state["losses"].tolist()
        steps, values = state["held_out_steps"].tolist(), state["held_out_divergences"].tolist()
        self.held_out = list(zip(steps, values, strict=True))
        if self.file is not None:
            self.file.unlink(missing_ok=True)
        lines = [{"step": step, "loss": loss} for step, loss in enumerate(self.losses, 1)]
        lines += [{"step": step, "held_out_divergence": value} for step, value in self.held_out]
        self._write(sorted(lines, key=lambda line: line["step"]))  # as they were written

    def state(self) -> dict[str, torch.Tensor]:
        """Everything as tensors."""
        self.flush()
        return {
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "held_out_steps": torch.tensor([step for step, _ in self.held_out], dtype=torch.int64),
            "held_out_divergences": torch.tensor([value for _, value in self.held_out], dtype=torch.float64),
        }

    def _write(self, lines) -> None:
        if self.file is not None:
            with explain_write(self.file), open(self.file, "a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)


@dataclass
class Training:
    """One training: how its steps are made, and where it is kept.

    Attributes:
        optimizer: of the trained parameters.
        rates: peak learning rate of every kind of parameter.
        schedule: of the rates.
        step_loss: computes the loss of a step, a tensor on the device, and its gradients; of several processes each
            has its share of the gradients and the whole loss.
        after_step: called after every step of the optimizer.
        seed: of stochastic rounding.
        title: of the progress bar.
        tokens_per_step: for the progress bar; 0 shows no rate.
        saved: folder of a state that is written every few minutes, and from which the training goes on; None for
            training too short to be worth it.
        stable: folder of the state where a `wsd` schedule begins to fall; a longer training starts there.
        curve: takes the losses.
        measure: divergence on held-out text; None for none.
        measure_at: steps after which to measure it.
    """

    optimizer: Optimizer
    rates: dict[str, float]
    schedule: Schedule
    step_loss: Callable[[int], torch.Tensor]
    after_step: Callable[[], None]
    seed: int
    title: str
    tokens_per_step: int = 0
    saved: Path | None = None
    stable: Path | None = None
    curve: Curve = field(default_factory=Curve)
    measure: Callable[[], float] | None = None
    measure_at: frozenset[int] = frozenset()

    def run(self, progress: Progress) -> Curve:
        """Train to the end, from where `saved` stands if it is there, to the same bytes."""
        steps = self.schedule.steps
        states = [latest_state(folder) for folder in (self.saved, self.stable) if folder is not None]
        if state := next(filter(None, states), None):
            self._restore(state)
        task = progress.add_task(self.title, total=steps, completed=len(self.curve))
        last_save = last_look = parallel.clock()
        first = looked = len(self.curve)
        for step in range(first, steps):
            if step == self.schedule.decay_from > first and self.stable is not None:
                self._save(self.stable)
            self._step(step)
            if step + 1 in self.measure_at and self.measure is not None:
                self.curve.measured(self.measure())
            now = parallel.clock()
            if now - last_look >= SHOW_EVERY or step + 1 == steps:
                self.curve.flush()
                rate = (step + 1 - looked) * self.tokens_per_step / (now - last_look)
                progress.update(task, completed=step + 1, description=self._describe(rate))
                looked, last_look = step + 1, now
            if self.saved is not None and now - last_save >= SAVE_EVERY:
                self._save(self.saved)
                last_save = parallel.clock()
        progress.remove_task(task)
        self.curve.flush()
        return self.curve

    def _step(self, step: int) -> None:
        place = step * parallel.size() + parallel.rank()
        torch.manual_seed(derive_seed(self.seed, place))  # of stochastic rounding
        factor = self.schedule.factor(step)
        self.optimizer.set_rates({kind: rate * factor for kind, rate in self.rates.items()})
        self.curve.add(self.step_loss(step))
        self.optimizer.step()
        self.after_step()

    def _describe(self, rate: float) -> str:
        words = [self.title, f"loss {self.curve.losses[-1]:.3g}"]
        if self.curve.held_out:
            words.append(f"held-out KL {self.curve.held_out[-1][1]:.3g}")
        if self.tokens_per_step:
            words.append(f"{rate:,.0f} tokens/s")
        return ", ".join(words)

    def _save(self, folder: Path) -> None:
        save_state(folder, len(self.curve), self.optimizer.state() | self.curve.state() | self._warm_up())

    def _restore(self, state: Path) -> None:
        course, warm_up = empty_tensors(state, COURSE), self._warm_up()
        load_state(state, self.optimizer.state() | course | warm_up)
        self.curve.restore(course)
        self.schedule = dataclasses.replace(self.schedule, warm_up=warm_up["warm_up"].item())  # a shorter run's
        self.optimizer.set_steps(len(self.curve))

    def _warm_up(self) -> dict[str, torch.Tensor]:
        return {"warm_up": torch.tensor([self.schedule.warm_up], dtype=torch.float64)}
