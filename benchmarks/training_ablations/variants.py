"""Variants of the loss, of the gradient of rounding and of the end of a training, put in place of the package's own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from unittest.mock import patch

import torch
import torch.nn.functional as F
from bq_calibration import end_to_end, quantized_linear
from bq_calibration.optimizer import Optimizer
from bq_calibration.student import Student
from torch import nn

from benchmarks.training_ablations.arms import Arm

ROWS = 128  # tokens whose logits are in memory at a time
STATES_WEIGHT, CE_WEIGHT = 1.0, 0.5


def _kl(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return (wanted.exp() * (wanted - found)).sum(-1)


def kl_and_ce(found, wanted, labels) -> torch.Tensor:
    """KL plus the cross-entropy of the token that follows."""
    return _kl(found, wanted) + CE_WEIGHT * F.nll_loss(found, labels, reduction="none", ignore_index=-1)


def confident(found, wanted, labels) -> torch.Tensor:
    """KL, weighted by how sure the teacher is: one less its entropy relative to the largest (EdgeRazor)."""
    entropy = -(wanted.exp() * wanted).sum(-1)
    weight = 1 - entropy / torch.tensor(float(wanted.shape[-1])).log()
    return 1.5 * weight * _kl(found, wanted)


LOSSES: dict[str, Callable | None] = {
    "kl": None,
    "kl+ce": kl_and_ce,
    "confident": confident,
    "kl+states": None,
}


def divergence_of(loss: str) -> Callable:
    """`end_to_end.divergence` with another loss, by autograd."""
    rowwise = LOSSES[loss]

    def divergence(student: RecordingStudent, output: torch.Tensor, target: torch.Tensor):
        if rowwise is None or not torch.is_grad_enabled():  # held-out text is always measured by KL
            total = PLAIN(student, output, target)
            if loss == "kl+states" and torch.is_grad_enabled():
                error = (output.float() - target).square().sum(-1) / target.float().square().sum(-1)
                total = total + STATES_WEIGHT * (error.sum() - error.sum().detach())  # only its gradient counts
            return total
        labels = F.pad(student.vocabulary.place(student.tokens[:, 1:]), (0, 1), value=-1).flatten()
        total, gradients = torch.zeros(()), []
        parts = (part.split(ROWS) for part in (output.detach().flatten(0, -2), target.flatten(0, -2), labels))
        for states, wanted, label in zip(*parts, strict=True):
            states.requires_grad_()
            with torch.no_grad():
                wanted = student.original_head(wanted.to(student.source.training_dtype)).float().log_softmax(-1)
            value = rowwise(student.logits(states).float().log_softmax(-1), wanted, label).sum()
            gradients.append(torch.autograd.grad(value, states)[0])
            total += value.detach()
        gradient = torch.cat(gradients).view(output.shape)
        product = (output * gradient).sum()  # whose gradient is that one
        return product - product.detach() + total

    return divergence


PLAIN = end_to_end.divergence


def dge(codes: torch.Tensor) -> torch.Tensor:
    """Differentiable gradient estimator (Wang et al., arXiv 2501.17116): steepest halfway between two levels, k = 5."""
    distance = 2 * (codes - codes.floor()) - 1  # −1 and 1 at the levels, 0 halfway
    return (distance.abs().clamp(min=1e-3) ** (1 / 5 - 1) / 5).clamp(max=3)


GRADIENTS: dict[str, Callable | None] = {"straight-through": None, "dge": dge}


class Vocabulary:
    """The most frequent tokens of a text: the only ones between which the models choose here, for the head's sake.

    Args:
        tokens: int64 [samples, seqlen].
        most: how many to keep.
        known: tokens that the model knows.
    """

    def __init__(self, tokens: torch.Tensor, most: int, known: int):
        counts = torch.bincount(tokens.flatten(), minlength=known)
        self.kept = counts.argsort(descending=True, stable=True)[:most].sort().values
        self._places = torch.full((known,), -1)
        self._places[self.kept] = torch.arange(len(self.kept))
        self.share = counts[self.kept].sum().item() / counts.sum().item()

    def place(self, tokens: torch.Tensor) -> torch.Tensor:
        """Rows of the head for tokens; -1 for those that are not kept."""
        return self._places[tokens]


class RecordingStudent(Student):
    """A student with a small vocabulary that remembers the tokens it has just seen, averages what it trains, and may
    train its embedding.
    """

    vocabulary: Vocabulary
    average_decay, with_embedding = 0.0, False

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.head.weight = nn.Parameter(self.head.weight[self.vocabulary.kept].clone(), requires_grad=False)
        self.decoder.embed_tokens.weight.requires_grad_(self.with_embedding and self.train_codes)
        self._averages: list[torch.Tensor] | None = None

    def states(self, tokens: torch.Tensor) -> torch.Tensor:
        """As Student's."""
        self.tokens = tokens
        return super().states(tokens)

    def parameters(self):
        """As Student's, with the embedding among the norms where it is trained."""
        found = super().parameters()
        weight = self.decoder.embed_tokens.weight
        return found | ({"norms": [*found["norms"], weight]} if weight.requires_grad else {})

    def clamp_codes(self) -> None:
        """As Student's; called after every step, it also moves the averages."""
        super().clamp_codes()
        if not self.average_decay:
            return
        values = [p.detach() for parameters in self.parameters().values() for p in parameters]
        if self._averages is None:
            self._averages = [value.clone() for value in values]
        for average, value in zip(self._averages, values, strict=True):
            average.lerp_(value, 1 - self.average_decay)

    def take_average(self) -> None:
        """Put the averages in place of the last values."""
        if self._averages is not None:
            values = [p.data for parameters in self.parameters().values() for p in parameters]
            for average, value in zip(self._averages, values, strict=True):
                value.copy_(average)


@contextlib.contextmanager
def in_place(arm: Arm, steps: int, kept: Vocabulary) -> Iterator[list[RecordingStudent]]:
    """The package with an arm's variants for as long as the context lasts; yields the students that are made."""
    made: list[RecordingStudent] = []

    class ArmStudent(RecordingStudent):
        vocabulary, average_decay, with_embedding = kept, arm.average, arm.embedding

        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            made.append(self)

    class ArmOptimizer(Optimizer):
        taken = 0

        def set_rates(self, rates: dict[str, float]) -> None:
            self.taken += 1
            super().set_rates(rates | ({"codes": 0.0} if self.taken > arm.freeze * steps else {}))

    with contextlib.ExitStack() as patches:
        patches.enter_context(patch.object(end_to_end, "Student", ArmStudent))
        patches.enter_context(patch.object(end_to_end, "MEASUREMENTS", 1))  # at the end
        patches.enter_context(patch.object(end_to_end, "Optimizer", ArmOptimizer))
        patches.enter_context(patch.object(quantized_linear, "INIT_MARGIN", arm.margin))
        if arm.loss != "kl":
            patches.enter_context(patch.object(end_to_end, "divergence", divergence_of(arm.loss)))
        if (gradient := GRADIENTS[arm.gradient]) is not None:
            patches.enter_context(patch.object(quantized_linear, "rounding_gradient", gradient))
        yield made
