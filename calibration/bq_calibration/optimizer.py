"""Adam over the trained parameters, by kind: in 32 bits, or for codes in 8 bits with stochastic rounding."""

from __future__ import annotations

import functools
import importlib.util
import math

import torch
from torch import nn

from . import parallel

BETAS = (0.9, 0.95)
MOMENT_BLOCK = 256  # 8-bit moments that share a scale, at most


def latent_dtype(optimizer_bits: int) -> torch.dtype:
    """Dtype of latent codes: they lose nothing to 16 bits where the optimizer rounds stochastically."""
    return torch.bfloat16 if optimizer_bits == 8 else torch.float32


def has_torchao() -> bool:
    """Whether the moments of codes can have 8 bits."""
    return importlib.util.find_spec("torchao") is not None


class Optimizer:
    """Adam whose learning rates are given by kind of parameter.

    With 8 bits the moments of codes are stored in blocks with a scale each (Dettmers et al., arXiv 2110.02861), the
    codes themselves in bfloat16, rounded stochastically: torchao's Adam8bit. A block lies in one row, so that rows can
    be shared out among processes. Everything else stays in 32 bits, for it is a hundredth of the parameters.

    Of a sharded parameter a process moves its own rows. Gradients of the others are summed over the processes.

    Args:
        parameters: by kind.
        bits: 32 or 8, of the moments of codes.
        in_backward: whether codes take their step inside the backward pass, each as soon as its gradient is there,
            which is then freed. The learning rates must be set before, and one backward pass must be one step.

    Raises:
        ImportError: if torchao is needed and not installed; `has_torchao` tells before.
    """

    def __init__(self, parameters: dict[str, list[nn.Parameter]], bits: int = 32, in_backward: bool = False):
        self.kinds = {kind: tensors for kind, tensors in parameters.items() if tensors}
        self.everything = [parameter for tensors in self.kinds.values() for parameter in tensors]
        self._rows = [_own_rows(parameter) for parameter in self.everything]
        rows = {id(parameter): rows for parameter, rows in zip(self.everything, self._rows, strict=True)}
        # codes move one by one, each by its own gradient; the others share the loss's steepest moments
        self.clipped = [p for kind, tensors in self.kinds.items() if kind != "codes" for p in tensors]
        codes = [rows[id(parameter)] for parameter in self.kinds.get("codes", [])]
        make = _adam8bit if bits == 8 else _adam
        units = [[parameter] for parameter in codes] if in_backward else [codes] if codes else []
        self._codes = [make(unit) for unit in units]
        self._rest = {kind: _adam(tensors) for kind, tensors in self.kinds.items() if kind != "codes"}
        self._all = (*self._codes, *self._rest.values())
        self._owner = {id(p): o for o in self._all for group in o.param_groups for p in group["params"]}
        for own in self._rows:
            self._owner[id(own)].state[own] = _new_state(self._owner[id(own)], own)
        self._stepped = [*self._rest.values(), *([] if in_backward else self._codes)]
        if in_backward:
            for parameter in self.kinds.get("codes", []):
                step = functools.partial(self._step_in_backward, rows[id(parameter)])
                parameter.register_post_accumulate_grad_hook(step)

    def set_rates(self, rates: dict[str, float]) -> None:
        """Set the learning rate of every kind; before the backward pass."""
        for optimizer in self._codes:
            _set_rate(optimizer, rates["codes"])
        for kind, optimizer in self._rest.items():
            _set_rate(optimizer, rates[kind])

    def step(self) -> None:
        """Take a step along the gradients, and forget them."""
        for parameter, own in zip(self.everything, self._rows, strict=True):
            if own is not parameter:
                own.grad, parameter.grad = None if parameter.grad is None else parallel.local(parameter.grad), None
        gradients = [p.grad for p, own in zip(self.everything, self._rows, strict=True) if own is p]
        parallel.add_up(gradient for gradient in gradients if gradient is not None)
        if self.clipped:
            nn.utils.clip_grad_norm_(self.clipped, 1.0)
        for optimizer in self._stepped:
            optimizer.step()
            optimizer.zero_grad()

    def _step_in_backward(self, own: nn.Parameter, parameter: nn.Parameter) -> None:
        own.grad = parallel.local(parameter.grad)
        self._owner[id(own)].step()
        own.grad = parameter.grad = None

    def state(self) -> dict[str, torch.Tensor]:
        """Values and moments of all parameters, by name, in their own memory; sharded as the parameters are."""
        found = {}
        for i, (parameter, own) in enumerate(zip(self.everything, self._rows, strict=True)):
            tensors = {"value": own.detach(), **_moments(self._owner[id(own)].state[own])}
            found |= {f"{i}.{name}": parallel.sharded_like(tensor, parameter) for name, tensor in tensors.items()}
        return found

    def set_steps(self, steps: int) -> None:
        """Go on as after so many steps."""
        for own in self._rows:
            self._owner[id(own)].state[own]["step"].fill_(steps)


def _own_rows(parameter: nn.Parameter) -> nn.Parameter:
    """The rows of a sharded parameter that are here, in its memory; any other parameter itself."""
    rows = parallel.local(parameter)
    return parameter if rows is parameter else nn.Parameter(rows)


def _adam(tensors: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(tensors, betas=BETAS, fused=True)


def _adam8bit(tensors: list[nn.Parameter]) -> torch.optim.Optimizer:
    from torchao.optim import Adam8bit

    return Adam8bit(tensors, betas=BETAS, bf16_stochastic_round=True)


def _new_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    """An optimizer's state of a parameter before the first step."""
    if isinstance(optimizer, torch.optim.Adam):
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        return {"step": torch.tensor(0.0, device=parameter.device)} | moments
    block = math.gcd(MOMENT_BLOCK, parameter[0].numel())
    signed = {"exp_avg": True, "exp_avg_sq": False}
    moments = {name: optimizer._subclass_zeros(parameter, sign, block) for name, sign in signed.items()}
    return {"step": torch.tensor(0.0)} | moments


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):  # so that torchao's compiled step stays good
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _moments(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Plain tensors of an optimizer's state by name, rows first; a quantized moment has two."""
    found = {}
    for key, value in state.items():
        if key == "step":
            continue
        if hasattr(value, "codes"):
            found |= {f"{key}.codes": value.codes, f"{key}.scale": value.scale.view(len(value), -1)}
        else:
            found[key] = value
    return found
