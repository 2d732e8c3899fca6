"""End-to-end training of a rounded model: scales, zeros, angles and norms follow the 16-bit model; codes stay.

The loss is KL(16-bit ‖ quantized) over the next token: every other stage looks at one layer at a time. The quantized
model is in memory whole, a byte a code.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from bq_kernels.format import QuantConfig
from bq_kernels.packing import unpack
from bq_kernels.reference import hadamard_angles, levels
from rich.progress import Progress
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from .checkpoint import write_tensors
from .model import SourceModel, TensorStore
from .rotation import Turn

TOKENS_A_STEP = 2048
RATES = {"factors": 5e-3, "zeros": 5e-3, "angles": 2e-3, "norms": 5e-4}  # peak learning rates of Adam
SAVE_EVERY = 10  # steps
WARM_UP = 0.1  # share of the steps


def _as_stored(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`value` rounded as the checkpoint will hold it; the gradient passes straight through."""
    return value + (value.to(dtype).float() - value).detach()


class Rotation(nn.Module):
    """The rotation in front of the layers that share an input; done once for all of them.

    Args:
        angles: [K/b, num_angles]; None leaves the input as it is.
        block_size: b.
        train: whether the angles are trained.
    """

    def __init__(self, angles: torch.Tensor | None, block_size: int, train: bool):
        super().__init__()
        self.block_size = block_size
        self.angles = None if angles is None else nn.Parameter(angles.float(), requires_grad=train)
        self._seen = self._rotated = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Q x in float32, x [..., K]."""
        if self.angles is None:
            return x
        if self._seen is not x:
            turn = Turn(_as_stored(self.angles, torch.float16), self.block_size)
            self._rotated = turn.forward(x.float().flatten(0, -2)).view(x.shape)
            self._seen = x
        return self._rotated


class _Product(torch.autograd.Function):
    """x W′ᵀ with W′ = s·(q − z) made anew in the backward pass."""

    @staticmethod
    def forward(ctx, x, codes, scales, zeros, bits):
        ctx.save_for_backward(x, codes, scales, zeros)
        ctx.bits = bits
        return F.linear(x, levels(codes, scales, zeros, bits).flatten(-2).to(x.dtype))

    @staticmethod
    def backward(ctx, gradient):
        x, codes, scales, zeros = ctx.saved_tensors
        weight = levels(codes, scales, zeros, ctx.bits).flatten(-2).to(x.dtype)
        by_weight = (gradient.flatten(0, -2).T @ x.flatten(0, -2)).view(codes.shape)
        # q − z is W′/s; where s is 0 so is everything
        by_scale = (by_weight * weight.view(codes.shape)).sum(-1, dtype=torch.float32) / scales.clamp(min=1e-12)
        by_zero = None if zeros is None else -by_weight.sum(-1, dtype=torch.float32) * scales
        return gradient @ weight, None, by_scale, by_zero, None


class PackedLinear(nn.Module):
    """A linear layer with frozen codes and trainable scales, as factors near 1, and zeros.

    Args:
        tensors: `qweight`, `scales` and `zeros` of the layer as stored.
        bits: bits per code.
        rotation: in front of it.
        bias: or None.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], bits: int, rotation: Rotation, bias: torch.Tensor | None):
        super().__init__()
        self.bits, self.rotation = bits, rotation
        scales = tensors["scales"].float()
        self.register_buffer("codes", unpack(tensors["qweight"], bits).unflatten(-1, (scales.shape[1], -1)))
        self.register_buffer("base", scales)
        self.factor = nn.Parameter(torch.ones_like(scales))
        self.zeros = nn.Parameter(tensors["zeros"].float()) if "zeros" in tensors else None
        self.bias = bias

    def stored(self) -> dict[str, torch.Tensor]:
        """Scales and zeros as the checkpoint holds them."""
        kept = {"scales": (self.base * self.factor).half()}
        return kept | ({} if self.zeros is None else {"zeros": self.zeros.half()})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """W′ Q x + bias in bfloat16, accumulated in float32; x [..., K]."""
        scales = _as_stored(self.base * self.factor, torch.float16)
        zeros = None if self.zeros is None else _as_stored(self.zeros, torch.float16)
        y = _Product.apply(self.rotation(x).bfloat16(), self.codes, scales, zeros, self.bits)
        return y if self.bias is None else y + self.bias


class _Norm(nn.Module):
    """A norm whose weight is trained and rounded as the checkpoint will hold it."""

    def __init__(self, norm: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.norm, self.dtype = norm, dtype
        self.weight = nn.Parameter(norm.weight.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = _as_stored(self.weight, self.dtype)
        return torch.func.functional_call(self.norm, {"weight": weight}, (x,))


class Student:
    """The quantized model, whole and trainable.

    Args:
        source: the 16-bit model.
        config: the checkpoint's format.
        packed: tensors of the quantized layers.
    """

    def __init__(self, source: SourceModel, config: QuantConfig, packed: TensorStore):
        self.source, self.config = source, config
        with init_empty_weights(include_buffers=False):
            self.model = AutoModelForCausalLM.from_config(source.config, dtype=torch.float32)
        kept = {
            name: source.store.get(name).float()
            for name in self.model.state_dict()
            if name in source.store and not self._is_packed(name)
        }
        self.model.load_state_dict(kept, assign=True, strict=False)
        self.model.tie_weights()
        self.model.requires_grad_(False)
        self.layers: dict[str, PackedLinear] = {}
        self.rotations: dict[str, Rotation] = {}
        self.norms: dict[str, _Norm] = {}
        for index, block in enumerate(self.model.model.layers):
            for group in source.groups:
                self._replace(block, source.block_prefix(index), group, packed)
        for name, module in list(self.model.named_modules()):
            if name.endswith("norm") and isinstance(getattr(module, "weight", None), nn.Parameter):
                self.norms[name] = _Norm(module, source.store.get(name + ".weight").dtype)
                self.model.set_submodule(name, self.norms[name])
        self.model.to(source.device).train()

    def _is_packed(self, name: str) -> bool:
        return name.startswith("model.layers.") and any(
            name.endswith(layer + ".weight") for group in self.source.groups for layer in group.layers
        )

    def _replace(self, block: nn.Module, prefix: str, group, packed: TensorStore) -> None:
        kind = self.config.rotation.kind
        first, block_size, angles = group.layers[0], 1, None
        if kind != "none":
            block_size = self.config.rotation.block(first)
        if kind == "butterfly":
            angles = packed.get(f"{prefix}{first}.angles")
        elif kind == "hadamard":
            angles = hadamard_angles(self.source.linear(block, first).in_features, block_size)
        rotation = Rotation(angles, block_size, train=kind == "butterfly")
        self.rotations[prefix + first] = rotation
        for name in group.layers:
            linear = self.source.linear(block, name)
            suffixes = self.config.tensors(name, linear.in_features, linear.out_features)
            tensors = {suffix: packed.get(f"{prefix}{name}.{suffix}") for suffix in suffixes}
            layer = PackedLinear(tensors, self.config.bits, rotation, linear.bias)
            block.set_submodule(name, layer)
            self.layers[prefix + name] = layer

    def parameters(self) -> dict[str, list[nn.Parameter]]:
        """What is trained, by kind."""
        return {
            "factors": [layer.factor for layer in self.layers.values()],
            "zeros": [layer.zeros for layer in self.layers.values() if layer.zeros is not None],
            "angles": [r.angles for r in self.rotations.values() if r.angles is not None and r.angles.requires_grad],
            "norms": [norm.weight for norm in self.norms.values()],
        }

    def states(self, tokens: torch.Tensor) -> torch.Tensor:
        """What enters the LM head, [samples, seqlen, hidden]."""
        with torch.autocast(self.source.device.type, torch.bfloat16):
            return self.model.model(input_ids=tokens, use_cache=False).last_hidden_state

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Float32 logits of states, by the LM head that both models share."""
        with torch.autocast(self.source.device.type, torch.bfloat16):
            return self.model.lm_head(states).float()

    def tensors(self, packed: TensorStore) -> dict[str, torch.Tensor]:
        """Everything that training changed, and the codes, by name in the checkpoint."""
        found = {name: packed.get(name) for name in packed.names() if name.endswith(".qweight")}
        for group in self.source.groups:
            for index in range(self.source.num_blocks):
                prefix = self.source.block_prefix(index)
                angles = self.rotations[prefix + group.layers[0]].angles
                for name in group.layers:
                    stored = self.layers[prefix + name].stored()
                    if self.config.rotation.kind == "butterfly":
                        stored["angles"] = angles.half()
                    found |= {f"{prefix}{name}.{suffix}": tensor for suffix, tensor in stored.items()}
        found |= {f"{name}.weight": norm.weight.to(norm.dtype) for name, norm in self.norms.items()}
        return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}


@torch.no_grad()
def teacher_states(source: SourceModel, tokens: torch.Tensor, progress: Progress) -> torch.Tensor:
    """What enters the LM head of the 16-bit model, [samples, seqlen, hidden], block by block."""
    hidden, arguments = source.embed(tokens)
    task = progress.add_task("16-bit model", total=source.num_blocks)
    for index in range(source.num_blocks):
        with source.block(index) as block:
            for row in range(len(hidden)):
                output = block(hidden[row : row + 1], **arguments[index])
                hidden[row : row + 1] = output[0] if isinstance(output, tuple) else output
        progress.advance(task)
    with source.final_norm() as norm:
        hidden = norm(hidden)
    progress.remove_task(task)
    return hidden


def divergence(student: Student, tokens: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Mean KL(16-bit ‖ quantized) in nats a token; tokens [samples, seqlen], states of the 16-bit model."""
    with torch.no_grad():
        wanted = student.logits(states).log_softmax(-1)
    found = student.logits(student.states(tokens)).log_softmax(-1)
    return F.kl_div(found.flatten(0, 1), wanted.flatten(0, 1), reduction="batchmean", log_target=True)


def distill(
    source: SourceModel,
    config: QuantConfig,
    packed: TensorStore,
    tokens: torch.Tensor,
    steps: int,
    seed: int,
    saved: Path,
    progress: Progress,
    rates: dict[str, float] = RATES,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Train scales, zeros, angles and norms.

    Goes on from the file `saved`, which is written every few steps, to the same bytes.

    Args:
        source: the 16-bit model.
        config: the checkpoint's format.
        packed: tensors of the quantized layers.
        tokens: int64 [samples, seqlen].
        steps: of TOKENS_A_STEP tokens each.
        seed: of the order of the samples.
        saved: safetensors file for what a later run goes on from.
        rates: peak Adam learning rates by kind of parameter; after a short rise a cosine takes them to 0.

    Returns:
        what the checkpoint holds now in place of `packed` and of the norms, and for the report the loss at every step.
    """
    tokens = tokens.to(source.device)
    states = teacher_states(source, tokens, progress)
    student = Student(source, config, packed)
    kinds = {kind: found for kind, found in student.parameters().items() if found}
    everything = [parameter for found in kinds.values() for parameter in found]
    groups = [{"params": found, "lr": rates[kind]} for kind, found in kinds.items()]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    peaks = [group["lr"] for group in optimizer.param_groups]
    batch = max(1, TOKENS_A_STEP // tokens.shape[1])
    losses: list[float] = []
    if saved.exists():
        state = load_file(saved)
        losses = state["losses"].tolist()
        for i, parameter in enumerate(everything):
            parameter.data.copy_(state[f"{i}.value"])
            moments = {"exp_avg": state[f"{i}.first"], "exp_avg_sq": state[f"{i}.second"]}
            optimizer.state[parameter] = {"step": torch.tensor(float(len(losses)))} | {
                key: value.to(parameter.device) for key, value in moments.items()
            }
    task = progress.add_task("end-to-end training", total=steps, completed=len(losses))
    for step in range(len(losses), steps):
        warm = min(1.0, (step + 1) / max(1, WARM_UP * steps))
        rate = warm * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * rate
        # one long shuffled sequence of samples, epoch after epoch
        rows = torch.tensor([_sample(step * batch + i, len(tokens), seed) for i in range(batch)], device=tokens.device)
        loss = divergence(student, tokens[rows], states[rows])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(everything, 1.0)
        optimizer.step()
        losses.append(loss.item())
        progress.update(task, advance=1, description=f"end-to-end training, KL {losses[-1]:.3f}")
        if len(losses) % SAVE_EVERY == 0 or len(losses) == steps:
            state = {"losses": torch.tensor(losses, dtype=torch.float64)}
            for i, parameter in enumerate(everything):
                moments = optimizer.state[parameter]
                state[f"{i}.value"] = parameter.detach().cpu().clone()
                state[f"{i}.first"], state[f"{i}.second"] = moments["exp_avg"].cpu(), moments["exp_avg_sq"].cpu()
            write_tensors(saved, state)
    progress.remove_task(task)
    report = {"learning_rates": rates, "tokens_a_step": batch * tokens.shape[1], "losses": losses}
    return student.tensors(packed), report


def _sample(position: int, samples: int, seed: int) -> int:
    """Which sample comes at a position of the endless shuffled sequence."""
    epoch, place = divmod(position, samples)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return int(torch.randperm(samples, generator=generator)[place])
