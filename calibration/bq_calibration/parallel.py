"""Several processes of one run, a GPU each, started by torchrun: what they share, and what the first does for all.

Every process takes the same way through a run. The first alone writes files, logs and shows bars. Without torchrun
there is one process, and every function here returns at once.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from .console import check_device
from .errors import UserError

TIMEOUT = timedelta(days=7)  # the others wait while the first works alone; torchrun sees it if one ends
LAST_WORDS = 3.0  # seconds in which the process that failed first may say so: torchrun ends all once one has ended

T = TypeVar("T")
_alone = False


def size() -> int:
    """Processes of the run."""
    return dist.get_world_size() if dist.is_initialized() and not _alone else 1


def rank() -> int:
    """This process's place among them, from 0."""
    return dist.get_rank() if dist.is_initialized() and not _alone else 0


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return rank() == 0


@contextlib.contextmanager
def joined(device: str) -> Iterator[str]:
    """Meet the other processes that torchrun has started, and part at the end.

    Where one fails, all end, and only the first one to fail raises its error.

    Args:
        device: `auto`, `cpu` or `cuda`, or another for a process that is alone.

    Yields:
        the device of this process.

    Raises:
        UserError: if the device is not there.
        SystemExit: in place of an error behind the first one.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield check_device(device)
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if _wants_gpu(device) else "gloo", timeout=TIMEOUT)
    try:
        device = _own_device(device)
        if device != "cpu":
            torch.cuda.set_device(device)
        yield device
    except BaseException as error:
        if not _fails_first():
            time.sleep(LAST_WORDS)
            raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else 1) from None
        raise
    _mesh.cache_clear()
    dist.destroy_process_group()  # not behind an error: it would wait for the others


def _wants_gpu(device: str) -> bool:
    return device != "cpu" and torch.cuda.is_available()


def _own_device(device: str) -> str:
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {device}: with torchrun every process takes a GPU of its own; use --device cuda")
    if not _wants_gpu(device):
        return check_device(device)
    return check_device(f"cuda:{os.environ['LOCAL_RANK']}")


def _fails_first() -> bool:
    try:
        return dist.distributed_c10d._get_default_store().add("failed", 1) == 1
    except RuntimeError:  # the store has ended with the process that kept it
        return False


# ---- what is done once


def from_first(compute: Callable[[], T]) -> T:
    """What `compute` returns in the first process, which alone calls it; the others wait for it.

    Tensors in it must be on the CPU.
    """
    if size() == 1:
        return compute()
    found = [compute() if is_first() else None]
    dist.broadcast_object_list(found, src=0, device=torch.device("cpu"))
    return found[0]


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """As if there were no other processes: for work of the first one whose parts would wait for them."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


def wait() -> None:
    """Wait until every process is here."""
    if size() > 1:
        dist.all_reduce(torch.zeros(1))  # a barrier of NCCL would keep the GPUs busy


def clock() -> float:
    """Seconds of the first process's clock, so that all decide alike where time decides."""
    now = torch.tensor(time.monotonic(), dtype=torch.float64)
    if size() > 1:
        dist.broadcast(now, src=0)
    return now.item()


# ---- what is done by shares


def share(count: int) -> int:
    """How many of `count` samples are this process's; numbers rank, rank + size, … are."""
    return len(range(rank(), count, size()))


def add_up(tensors: Iterable[torch.Tensor]) -> None:
    """Put the sum over all processes in place of each tensor, on whatever device."""
    if size() > 1:
        for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
            work.wait()


def total(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes; it has no gradient."""
    tensor = tensor.detach().clone()
    add_up([tensor])
    return tensor


# ---- parameters of which every process keeps some rows


@functools.cache
def _mesh(device_type: str) -> DeviceMesh:
    return init_device_mesh(device_type, (size(),))


def shard(module: nn.Module, parameters: Iterable[nn.Parameter], device: torch.device) -> None:
    """Shard parameters of a module by rows (FSDP2): they are whole only while the module computes.

    Their gradients are summed over the processes, in float32. The module's other parameters stay as they are. A module
    that holds sharded ones is sharded as well, last, so that layers are gathered while others compute.
    """
    others = set(module.parameters()) - set(parameters)
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    fully_shard(module, mesh=_mesh(device.type), reshard_after_forward=True, mp_policy=policy, ignored_params=others)
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)  # gloo knows no other


@torch.no_grad()
def local(tensor: torch.Tensor) -> torch.Tensor:
    """The rows of a sharded tensor that are here, in its own memory; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor, gathered; any other tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(rows: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Rows that belong to a tensor's own as a tensor that is sharded like it; any other tensor's rows are all there."""
    if not isinstance(tensor, DTensor):
        return rows
    shape = torch.Size((len(tensor), *rows.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(rows, tensor.device_mesh, tensor.placements, run_check=False, shape=shape, stride=stride)
