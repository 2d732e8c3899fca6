"""Adam over the trained parameters, by kind: in 32 bits, or for codes in 8 bits with stochastic rounding."""

from __future__ import annotations

import torch
from torch import nn

from .errors import UserError

BETAS = (0.9, 0.95)


def latent_dtype(optimizer_bits: int) -> torch.dtype:
    """Dtype of latent codes: they lose nothing to 16 bits where the optimizer rounds stochastically."""
    return torch.bfloat16 if optimizer_bits == 8 else torch.float32


class Optimizer:
    """Adam whose learning rates are given by kind of parameter.

    With 8 bits the moments of codes are stored in blocks of 256 with a scale each (Dettmers et al., arXiv 2110.02861),
    the codes themselves in bfloat16, rounded stochastically: torchao's Adam8bit. Everything else stays in 32 bits, for
    it is a hundredth of the parameters.

    Args:
        parameters: by kind.
        bits: 32 or 8, of the moments of codes.
        in_backward: whether codes take their step inside the backward pass, each as soon as its gradient is there,
            which is then freed. The learning rates must be set before, and one backward pass must be one step.

    Raises:
        UserError: if torchao is needed and not installed.
    """

    def __init__(self, parameters: dict[str, list[nn.Parameter]], bits: int = 32, in_backward: bool = False):
        self.kinds = {kind: tensors for kind, tensors in parameters.items() if tensors}
        self.everything = [parameter for tensors in self.kinds.values() for parameter in tensors]
        # codes move one by one, each by its own gradient; the others share the loss's steepest moments
        self.clipped = [p for kind, tensors in self.kinds.items() if kind != "codes" for p in tensors]
        codes = self.kinds.get("codes", [])
        make = _adam8bit if bits == 8 else _adam
        units = [[parameter] for parameter in codes] if in_backward else [codes] if codes else []
        self._codes = [make(unit) for unit in units]
        self._rest = {kind: _adam(tensors) for kind, tensors in self.kinds.items() if kind != "codes"}
        self._all = (*self._codes, *self._rest.values())
        self._owner = {id(p): o for o in self._all for group in o.param_groups for p in group["params"]}
        self._stepped = [*self._rest.values(), *([] if in_backward else self._codes)]
        if in_backward:
            for parameter in codes:
                parameter.register_post_accumulate_grad_hook(self._step_in_backward)

    def set_rates(self, rates: dict[str, float]) -> None:
        """Set the learning rate of every kind; before the backward pass."""
        for optimizer in self._codes:
            _set_rate(optimizer, rates["codes"])
        for kind, optimizer in self._rest.items():
            _set_rate(optimizer, rates[kind])

    def step(self) -> None:
        """Take a step along the gradients, and forget them."""
        if self.clipped:
            nn.utils.clip_grad_norm_(self.clipped, 1.0)
        for optimizer in self._stepped:
            optimizer.step()
            optimizer.zero_grad()

    def _step_in_backward(self, parameter: nn.Parameter) -> None:
        self._owner[id(parameter)].step()
        parameter.grad = None

    def state(self) -> dict[str, torch.Tensor]:
        """Values and moments of all parameters, by name; after at least one step."""
        found = {}
        for i, parameter in enumerate(self.everything):
            found[f"{i}.value"] = parameter.detach()
            for name, moment in _moments(self._owner[id(parameter)].state[parameter]):
                found[f"{i}.{name}"] = moment
        return found

    def load(self, state: dict[str, torch.Tensor], steps: int) -> None:
        """Take over what `state` gave after so many steps."""
        for i, parameter in enumerate(self.everything):
            parameter.data.copy_(state[f"{i}.value"])
            own = _new_state(self._owner[id(parameter)], parameter, steps)
            for name, moment in _moments(own):
                moment.copy_(state[f"{i}.{name}"])
            self._owner[id(parameter)].state[parameter] = own


def _adam(tensors: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(tensors, betas=BETAS, fused=True)


def _adam8bit(tensors: list[nn.Parameter]) -> torch.optim.Optimizer:
    try:
        from torchao.optim import Adam8bit
    except ImportError as error:
        raise UserError("--optimizer-bits 8 needs torchao; install it with pip") from error
    return Adam8bit(tensors, betas=BETAS, bf16_stochastic_round=True)


def _new_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, steps: int) -> dict[str, torch.Tensor]:
    """An optimizer's state of a parameter after so many steps, moments at 0."""
    if isinstance(optimizer, torch.optim.Adam):
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        return {"step": torch.tensor(float(steps), device=parameter.device)} | moments
    new = optimizer._new_buffer  # torchao makes state only in a step
    moments = {"exp_avg": new(parameter, True), "exp_avg_sq": new(parameter, False)}
    return {"step": torch.tensor(float(steps))} | moments


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):  # so that torchao's compiled step stays good
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _moments(state: dict[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    """Names and plain tensors of an optimizer's state; a quantized moment has several."""
    found = []
    for key, value in state.items():
        if key == "step":
            continue
        if hasattr(value, "__tensor_flatten__"):
            names, _ = value.__tensor_flatten__()
            found += [(f"{key}.{name}", getattr(value, name)) for name in names]
        else:
            found.append((key, value))
    return found
