"""Where the time of a decode step goes, from a trace of torch.profiler."""

from __future__ import annotations

import re

# the category of a kernel (GPU) or operator (CPU) is that of the first pattern that its name matches
CATEGORIES = {
    "rotation": r"rotate|hada",
    "attention": r"attention|attn|flash|fmha|cache|rotary",
    "GEMM": r"gemm|gemv|::mm|addmm|matmul|linear|nvjet|xmma|cutlass|cublas|split_?k|marlin|machete|humming|onednn"
    r"|_decode_kernel|_dequantize_",
    "norms": r"norm|rsqrt",
}


def breakdown(events: list[dict]) -> dict[str, float]:
    """Microseconds of a mean decode step by category, and `gaps`, in which the device (on a CPU: torch) did nothing.

    Each instant counts once, for what started last of what is running: on a GPU a kernel or a copy, else an operator
    of torch, without those that it calls. A rotation inside a GEMM's prologue counts as GEMM, one behind a norm as
    norm: the row `no-rotation` shows what it costs.

    Args:
        events: `traceEvents` of a trace that torch.profiler wrote.

    Raises:
        ValueError: if the trace holds no step.
    """
    steps = sum(e.get("cat") == "user_annotation" and "_generation_" in e["name"] for e in events)
    device = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    used = device or [e for e in events if e.get("cat") == "cpu_op"]
    if not steps or not used:
        raise ValueError(f"the trace holds {steps} steps and {len(used)} operations")
    total = dict.fromkeys((*CATEGORIES, "other", "gaps"), 0.0)
    running: list[tuple[float, str]] = []  # end and category, the last to start last
    now = first = min(e["ts"] for e in used)
    last = max(e["ts"] + e["dur"] for e in used)
    for event in (*sorted(used, key=lambda e: (e["ts"], -e["dur"])), {"ts": last, "dur": 0, "name": ""}):
        while now < event["ts"]:
            end, category = running[-1] if running else (event["ts"], "gaps")
            if end <= now:
                running.pop()
                continue
            total[category] += min(end, event["ts"]) - now
            now = min(end, event["ts"])
        matching = (name for name, pattern in CATEGORIES.items() if re.search(pattern, event["name"], re.IGNORECASE))
        inside = [category for end, category in running[-1:] if end > now and not device]  # what a GEMM calls is GEMM
        running.append((now + event["dur"], next(matching, *inside or ["other"])))
    return {name: value / steps for name, value in (total | {"step": last - first}).items()}
