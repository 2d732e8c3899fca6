"""What serving.py measures, and how often."""

from __future__ import annotations

from dataclasses import dataclass

Task = tuple[str, int]  # latency, prefill, throughput, profile or serve; and for how many requests
TOOLS = ("latency", "throughput", "serve")  # of `vllm bench`
PARTS = ("latency", "prefill", "throughput", "serve")  # prefill is `bench latency` with one token out


@dataclass(frozen=True)
class Settings:
    """The same for all rows.

    Attributes:
        runs: how often each task is measured.
        latency: tokens in and out of a request of `bench latency`.
        load: tokens in and out of a request of `bench throughput` and `bench serve`.
        prompts: requests of `bench throughput`.
        flags: flags of all engines.
        prefill: tokens in of a request of which only the prefill is timed.
    """

    runs: int
    latency: tuple[int, int]
    load: tuple[int, int]
    prompts: int
    flags: tuple[str, ...]
    prefill: int = 2048
