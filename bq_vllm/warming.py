"""Compiles a model's kernels while its weights are loaded: vLLM's profiling and its graphs then find them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from weakref import WeakSet

import torch

logger = logging.getLogger("vllm.bq_vllm")


def rows_of(vllm_config) -> list[int]:
    """Numbers of tokens that stand for all that the engine will compute: sizes of graphs, and prefill of any length."""
    from bq_kernels.warming import representative_rows

    most = vllm_config.scheduler_config.max_num_batched_tokens
    captured = vllm_config.compilation_config.cudagraph_capture_sizes or []
    return sorted({*captured, *representative_rows(most)})


class KernelWarmUp:
    """The layers of this process that are being loaded, and the kernels that are being compiled for them.

    Layers of the same shapes need the same kernels, so the first of each kind stands for all. Its launches are recorded
    when its weights are ready; from then on threads compile, and the last layer waits for them.
    """

    def __init__(self) -> None:
        self._pending: WeakSet[torch.nn.Module] = WeakSet()
        self._rows: list[int] = []
        self._kinds: set[tuple] = set()
        self._compilation = None

    def expect(self, layer: torch.nn.Module) -> None:
        """A layer has been made; `loaded` will be called with it. Layers made outside an engine are left alone."""
        from vllm.config import get_current_vllm_config_or_none

        config = get_current_vllm_config_or_none()
        if config is not None:
            self._rows = self._rows if self._pending else rows_of(config)
            self._pending.add(layer)

    def loaded(
        self,
        layer: torch.nn.Module,
        in_features: int,
        apply: Callable[[torch.nn.Module, torch.Tensor, torch.Tensor | None], object],
    ) -> None:
        """A layer's weights are ready on the GPU; begin to compile its kernels, and after the last layer wait for all.

        Args:
            layer: with its prepared weights as parameters.
            in_features: K of this rank.
            apply: computes a layer for x [M, K] and a bias [N] or None.
        """
        if layer not in self._pending:  # reloaded weights need no other kernels
            return
        self._pending.discard(layer)
        try:
            self._compile_for(layer, in_features, apply)
            if not self._pending and self._compilation:
                self._finish()
        except Exception:
            logger.warning("kernels are not compiled ahead, but each when it is first launched", exc_info=True)

    def _compile_for(self, layer: torch.nn.Module, in_features: int, apply: Callable) -> None:
        from bq_kernels.warming import Compilation, recording

        shapes = sorted((name, *p.shape, str(p.dtype)) for name, p in layer.named_parameters(recurse=False))
        kind = (type(layer).__name__, in_features, layer.params_dtype, *shapes, *self._rows)
        if kind in self._kinds:
            return
        self._kinds.add(kind)
        bias = None if getattr(layer, "skip_bias_add", False) else getattr(layer, "bias", None)
        with recording() as found, torch.inference_mode():
            for rows in self._rows:
                apply(
                    layer, torch.zeros(rows, in_features, dtype=layer.params_dtype, device=layer.qweight.device), bias
                )
        self._compilation = self._compilation or Compilation()
        self._compilation.add(found)

    def _finish(self) -> None:
        compilation, self._compilation = self._compilation, None
        started = time.monotonic()
        failed = compilation.wait()
        waited = time.monotonic() - started
        logger.info("%d kernels are compiled; loading waited %.1f s for them", len(compilation.builds), waited)
        for wanted, problem in failed.items():
            logger.warning("%s cannot be compiled", wanted.kernel, exc_info=problem)


warm_up = KernelWarmUp()
