"""A pass over vLLM's compiled graphs: an RMSNorm and the packed linear behind it become one operator.

vLLM leaves its norms in the graph as operators of its own, `vllm_ir.rms_norm` and `vllm_ir.fused_add_rms_norm`, until
its passes have run; this one is the last of them. It leaves alone a norm that more than the one linear layer reads,
and a linear layer without a rotation, which has no launch to save. Gemma's norms need nothing special: their weight is
1 + the stored one in the graph.
"""

from __future__ import annotations

import operator

import torch
from torch import fx
from vllm.logger import init_logger

from .backend import FUSE_NORM_VARIABLE

logger = init_logger("vllm.bq_vllm")

COS_SIN = 6  # the argument of bq::packed_linear that is None without a rotation


def _called(node, target) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target == target


def _inputs(norm: fx.Node) -> tuple | None:
    """x, residual (or None), weight and epsilon of a norm; None for one without a weight, or of a part of the row."""
    if _called(norm, torch.ops.vllm_ir.rms_norm.default):
        (x, weight, epsilon, *variance_size), residual = norm.args, None
    elif _called(norm, torch.ops.vllm_ir.fused_add_rms_norm.default):
        x, residual, weight, epsilon, *variance_size = norm.args
    else:
        return None
    return (x, residual, weight, epsilon) if weight is not None and variance_size in ([], [None]) else None


def norm_before(linear: fx.Node) -> fx.Node | None:
    """The norm whose output only this packed linear reads, and that can move into it; else None."""
    x = norm = linear.args[0]
    if linear.args[COS_SIN] is None or len(x.users) > 1:
        return None
    if _called(x, operator.getitem):
        norm, item = x.args
        items = [user.args[1] for user in norm.users if _called(user, operator.getitem)]
        if item != 0 or items.count(0) > 1 or len(items) < len(norm.users):
            return None
    # the operator takes the place of the norm, so that readers of the sum come after it
    movable = all(node < norm for node in linear.all_input_nodes if node is not x)
    return norm if movable and _inputs(norm) else None


def _fuse(graph: fx.Graph, norm: fx.Node, linear: fx.Node) -> None:
    target, arguments = torch.ops.bq.norm_linear.default, (*_inputs(norm), *linear.args[1:])
    with graph.inserting_before(norm):
        fused = graph.call_function(target, arguments)
        outputs = [graph.call_function(operator.getitem, (fused, i)) for i in (0, 1)]
    fused.meta["val"] = target(*fx.map_arg(arguments, lambda node: node.meta["val"]))
    for output, value in zip(outputs, fused.meta["val"], strict=True):
        output.meta["val"] = value
    linear.replace_all_uses_with(outputs[0])
    graph.erase_node(linear)
    for reader in list(norm.users):  # of (rows, sum)
        reader.replace_all_uses_with(outputs[reader.args[1]])
        graph.erase_node(reader)
    graph.erase_node(norm)
    for output in outputs:
        if not output.users:
            graph.erase_node(output)


def fuse_norms(graph: fx.Graph) -> None:
    """Replace in place every RMSNorm and packed linear that can be one operator, `bq::norm_linear`."""
    linears = graph.find_nodes(op="call_function", target=torch.ops.bq.packed_linear.default)
    norms = [norm_before(linear) for linear in linears]
    for norm, linear in zip(norms, linears, strict=True):
        if norm:
            _fuse(graph, norm, linear)
    if linears:
        fused = sum(norm is not None for norm in norms)
        logger.info("RMSNorm is fused into %d of the %d packed linear layers of a graph", fused, len(linears))


def install() -> None:
    """Make vLLM run the pass over every graph that it compiles for the engine that is being built, if there is one.

    Raises:
        ValueError: if another pass is set where this one belongs.
    """
    from vllm.compilation.passes.inductor_pass import CallableInductorPass
    from vllm.config import CompilationMode, get_current_vllm_config_or_none
    from vllm.platforms import current_platform

    if (config := get_current_vllm_config_or_none()) is None:
        return
    if config.compilation_config.mode != CompilationMode.VLLM_COMPILE:
        logger.warning_once("%s=1 has no effect: vLLM does not compile the model", FUSE_NORM_VARIABLE)
        return
    if not all(hasattr(torch.ops.vllm_ir, norm) for norm in ("rms_norm", "fused_add_rms_norm")):
        logger.warning_once("%s=1 has no effect: this vLLM's graphs have no norms to fuse", FUSE_NORM_VARIABLE)
        return
    passes, key = config.compilation_config.inductor_compile_config, current_platform.pass_key
    ours = CallableInductorPass(fuse_norms)
    if passes.setdefault(key, ours).uuid() != ours.uuid():
        raise ValueError(f"inductor_passes sets {key}, where {FUSE_NORM_VARIABLE}=1 needs its own; drop one of the two")
