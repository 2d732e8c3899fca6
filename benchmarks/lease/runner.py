"""Goes through the steps of a lease within its time, and keeps what became of each."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.harness.results import write_json
from benchmarks.lease.processes import run_limited
from benchmarks.lease.steps import GPU, LAUNCH_TABLE, MINUTES, ROOT, Step

DONE, FAILED, UNFINISHED, OUT_OF_TIME, INTERRUPTED = "done", "failed", "unfinished", "out of time", "interrupted"
NEEDS = "needs "  # begins the state of a step that cannot run here
RESERVE = 8.0  # seconds that a step keeps of its limit to write its results
TOOLS = ("/usr/local/cuda/bin",)  # where NVIDIA's programs lie if they are not on PATH
PATHS = (ROOT / "kernels", ROOT / "calibration", ROOT)
# for a machine without a network, where the project and vLLM may be there by PYTHONPATH alone
VARIABLES = {
    "HF_HUB_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "butterfly",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
}
ENTRY_POINTS = "[vllm.general_plugins]\nbutterfly = bq_vllm:register\n"


@dataclass
class Outcome:
    """What became of a step.

    Attributes:
        state: DONE, FAILED, UNFINISHED (its JSON names what it had no time for), OUT_OF_TIME, INTERRUPTED, or
            `needs …`.
        seconds: that it ran.
        note: why, or the last line that it printed.
        command: as it ran.
    """

    state: str
    seconds: float = 0.0
    note: str = ""
    command: list[str] = field(default_factory=list)


def environment(out: Path) -> dict[str, str]:
    """Variables of all steps: the project on PYTHONPATH, and its plugin where vLLM looks for plugins."""
    paths = [*map(str, PATHS), os.environ.get("PYTHONPATH", "")]
    if not entry_points(group="vllm.general_plugins", name="butterfly"):
        version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
        folder = out / "plugin" / f"bq_vllm-{version}.dist-info"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: bq-vllm\nVersion: {version}\n")
        (folder / "entry_points.txt").write_text(ENTRY_POINTS)
        paths.append(str(folder.parent))
    tools = os.pathsep.join([os.environ.get("PATH", ""), *TOOLS])
    return VARIABLES | os.environ | {"PATH": tools, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def machine(variables: dict[str, str]) -> dict[str, Any]:
    """The GPU of this machine, None without one, and versions; asked in a process of its own, to leave the GPU free."""
    code = (
        "import json, torch; from benchmarks.packed_linear.measure import environment; "
        "print(json.dumps({'gpu': torch.cuda.is_available(), **environment()}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=variables, cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"torch and triton do not load here:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def restore_launches(out: Path, table: Path = LAUNCH_TABLE) -> None:
    """Give a launch table the lines of GPUs that an earlier command tuned for, if it has none for them.

    A resumed command may run on a fresh copy of the project.

    Args:
        out: folder of results, with the table that the step `tune` left there.
        table: the project's.
    """
    kept = out / table.name
    if not kept.exists():
        return
    known = json.loads(table.read_text())
    for name, lines in json.loads(kept.read_text()).items():
        if name not in known:
            from bq_kernels.triton_linear import Launch

            from benchmarks.packed_linear.tuning import write_launch_table

            write_launch_table(name, [Launch(**line) for line in lines], table)


def last_line(log: Path) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "")[:300]


class Lease:
    """One command's time on a machine.

    Args:
        out: folder of results, logs and of `lease.json`, the state that a later command resumes.
        deadline: of all steps together, by time.monotonic().
        has_gpu: whether the machine has one.
        variables: of the steps' processes.
        console: where to print.
    """

    def __init__(self, out: Path, deadline: float, has_gpu: bool, variables: dict[str, str], console: Console) -> None:
        self.out, self.deadline, self.has_gpu = out, deadline, has_gpu
        self.variables, self.console = variables, console
        self.outcomes: dict[str, Outcome] = {}
        self.facts: dict[str, Any] = {}

    @property
    def state_file(self) -> Path:
        """The file that a later command reads."""
        return self.out / "lease.json"

    def resume(self) -> None:
        """Take over the outcomes of an earlier command."""
        if self.state_file.exists():
            kept = json.loads(self.state_file.read_text())["steps"]
            self.outcomes = {name: Outcome(**outcome) for name, outcome in kept.items()}

    def forget(self, step: Step) -> None:
        """Begin a step anew: some go on with the JSON file of an earlier command."""
        self.outcomes.pop(step.name, None)
        if step.result:
            step.result.unlink(missing_ok=True)

    def save(self) -> None:
        """Write the state; after every step, for the machine may be taken away."""
        steps = {name: asdict(outcome) for name, outcome in self.outcomes.items()}
        write_json(self.state_file, self.facts | {"steps": steps})

    def missing(self, step: Step) -> str | None:
        """The first thing that a step needs and this machine lacks."""
        for need in step.needs:
            if isinstance(need, Path):
                there = need.exists()
            elif need == GPU:
                there = self.has_gpu
            else:
                there = find_spec(need) or shutil.which(need, path=self.variables.get("PATH"))
            if not there:
                return str(need)
        return None

    def run(self, steps: list[Step]) -> None:
        """Run those that have not been done; those that failed before come last.

        Raises:
            KeyboardInterrupt: after the step that was running has been ended and written down.
        """
        todo = [step for step in steps if self._state(step) != DONE]
        for step in todo:
            if self._state(step) != FAILED:  # what an earlier command reached stays as it was until it is run again
                self.outcomes[step.name] = Outcome(OUT_OF_TIME)
        for step in sorted(todo, key=lambda step: self._state(step) == FAILED):
            self._run_step(step)
            self.save()

    def _state(self, step: Step) -> str | None:
        return self.outcomes[step.name].state if step.name in self.outcomes else None

    def _run_step(self, step: Step) -> None:
        left = self.deadline - time.monotonic()
        if lacking := self.missing(step):
            outcome = Outcome(f"{NEEDS}{lacking}")
        elif left < step.least:
            outcome = Outcome(OUT_OF_TIME, note=f"{max(left, 0):.0f} s were left, it needs {step.least}")
        else:
            outcome = self._measure(step, min(left, step.seconds))
        self.outcomes[step.name] = outcome
        self.console.print(
            f"{step.name}: {outcome.state}, {outcome.seconds:.0f} s  {outcome.note}", markup=False, highlight=False
        )

    def _measure(self, step: Step, limit: float) -> Outcome:
        minutes = f"{max(limit - RESERVE, limit / 2) / 60:.3f}"
        command = tuple(minutes if part == MINUTES else part for part in step.command)
        shown = [Path(part).name if Path(part).is_absolute() else part for part in command]
        self.console.print(f"{step.name}: {step.purpose}, at most {limit:.0f} s", markup=False, highlight=False)
        log, started = self.out / f"{step.name}.log", time.monotonic()
        try:
            code = run_limited(command, limit, log, self.variables, ROOT)
        except KeyboardInterrupt:
            self.outcomes[step.name] = Outcome(INTERRUPTED, time.monotonic() - started, command=shown)
            self.save()
            raise
        seconds = time.monotonic() - started
        if step.keeps and code == 0:
            shutil.copy(step.keeps, self.out)
        if code is None:
            return Outcome(OUT_OF_TIME, seconds, f"ended after {limit:.0f} s", shown)
        if code:
            return Outcome(FAILED, seconds, f"exit status {code}: {last_line(log)}", shown)
        if undone := self._undone(step):
            return Outcome(UNFINISHED, seconds, f"no time for {undone}", shown)
        return Outcome(DONE, seconds, step.result.name if step.result else last_line(log), shown)

    def _undone(self, step: Step) -> str:
        """What a step's own result says that it had no time for."""
        if not step.result or not step.result.exists():
            return ""
        left_out = json.loads(step.result.read_text()).get("left_out", {})
        return "; ".join(name for name, reason in left_out.items() if reason == OUT_OF_TIME)[:300]
