"""The 16-bit model that end-to-end training imitates: its hidden states in front of the LM head."""

from __future__ import annotations

import torch
from rich.progress import Progress

from .model import SourceModel
from .skeleton import empty_model


@torch.no_grad()
def teacher_states(source: SourceModel, tokens: torch.Tensor, progress: Progress) -> torch.Tensor:
    """States of all samples at once, [samples, seqlen, hidden], with one decoder layer in memory at a time.

    Args:
        source: the 16-bit model.
        tokens: int [samples, seqlen].
        progress: shows a bar.
    """
    hidden = source.embed(tokens)
    task = progress.add_task("16-bit model", total=source.num_blocks)
    for index in range(source.num_blocks):
        with source.block(index) as block:
            block.run(hidden, out=hidden)
        progress.advance(task)
    progress.remove_task(task)
    return normed(source, hidden)


@torch.no_grad()
def normed(source: SourceModel, hidden: torch.Tensor) -> torch.Tensor:
    """States in front of the LM head, in the place of those behind the last layer, [samples, seqlen, hidden]."""
    with source.final_norm() as norm:
        for sample in hidden:  # one at a time: a norm computes in float32, with several temporaries
            sample.copy_(norm(sample))
    return hidden


class StoredTeacher:
    """States that have been computed before; for data of which every sample is seen several times.

    Args:
        states: of all samples, [samples, seqlen, hidden].
        device: where they are used.
    """

    def __init__(self, states: torch.Tensor, device: torch.device):
        self._states, self._device = states, device

    def states(self, rows: torch.Tensor) -> torch.Tensor:
        """States of some samples, given by number: [rows, seqlen, hidden]."""
        return self._states[rows].to(self._device)


class ResidentTeacher:
    """The 16-bit decoder in memory, in the dtype in which the run computes: for data whose states are too many to keep.

    Args:
        source: the 16-bit model.
        tokens: int [samples, seqlen].
    """

    def __init__(self, source: SourceModel, tokens: torch.Tensor):
        self._tokens, self._device, prefix = tokens, source.device, f"{source.decoder_name}."
        self._decoder = empty_model(source.config, source.dtype).get_submodule(source.decoder_name)
        weights = {name: source.read(prefix + name).to(source.dtype) for name in self._decoder.state_dict()}
        self._decoder.load_state_dict(weights, assign=True)
        self._decoder.requires_grad_(False).to(source.device)

    @torch.no_grad()
    def states(self, rows: torch.Tensor) -> torch.Tensor:
        """States of some samples, given by number: [rows, seqlen, hidden]."""
        tokens = self._tokens[rows].to(self._device, torch.int64)
        return self._decoder(input_ids=tokens, use_cache=False).last_hidden_state
