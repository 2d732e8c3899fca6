"""The command for a lent GPU: its time, its state, and what it leaves behind."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks.lease import processes, runner
from benchmarks.lease.runner import DONE, FAILED, INTERRUPTED, OUT_OF_TIME, UNFINISHED, Lease
from benchmarks.lease.steps import GPU, MINUTES, ROOT, Plan, Step, steps

# starts a process in a session of its own, as vLLM's engines are, writes its number, and waits
ENGINE = 'setsid sleep 600 & echo $! > "$0"; wait'


@pytest.fixture
def lease(tmp_path):
    def lease(minutes=5.0, has_gpu=False) -> Lease:
        deadline = time.monotonic() + 60 * minutes
        return Lease(tmp_path, deadline, has_gpu, dict(os.environ), Console(quiet=True))

    return lease


def python(name, code, *arguments, **options) -> Step:
    options = {"seconds": 60, "least": 1} | options
    return Step(name, name, (sys.executable, "-c", code, *map(str, arguments)), **options)


def engine(child: Path, seconds: int) -> Step:
    return Step("long", "long", ("sh", "-c", ENGINE, str(child)), seconds, 1)


def states(lease) -> dict[str, str]:
    return {name: outcome.state for name, outcome in lease.outcomes.items()}


def assert_ends(pid: int) -> None:
    """A killed process is gone, or a zombie, after a moment."""
    for _ in range(200):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return
        if state == "Z":
            return
        time.sleep(0.05)
    raise AssertionError(f"{pid} still runs")


def wait_for(file: Path) -> int:
    while not (file.exists() and file.read_text()):
        time.sleep(0.05)
    return int(file.read_text())


def test_a_step_that_takes_too_long_is_ended_with_all_below_it(lease, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "GRACE", 1.0)
    child = tmp_path / "child"
    late = lease()
    late.run([engine(child, 4), python("next", "print('fine')")])
    assert states(late) == {"long": OUT_OF_TIME, "next": DONE}
    assert_ends(int(child.read_text()))
    assert late.outcomes["long"].note == "ended after 4 s" and late.outcomes["next"].note == "fine"


def test_the_budget_is_that_of_all_steps(lease):
    short = lease(minutes=1.5)
    short.run([python("first", "pass"), python("big", "pass", least=100), python("last", "pass")])
    assert states(short) == {"first": DONE, "big": OUT_OF_TIME, "last": DONE}
    spent = lease(minutes=0.0)
    spent.run([python("first", "pass")])
    assert states(spent) == {"first": OUT_OF_TIME}


def test_a_step_knows_its_time(lease, tmp_path):
    step = python("timed", "import sys; print(sys.argv[1])", MINUTES, seconds=60)
    timed = lease()
    timed.run([step])
    assert 0.5 <= float(timed.outcomes["timed"].note) < 1


def test_what_a_machine_lacks_is_listed(lease, tmp_path):
    wanted = [
        python("gpu", "pass", needs=(GPU,)),
        python("program", "pass", needs=("no-such-program",)),
        python("file", "pass", needs=(tmp_path / "missing",)),
        python("all there", "pass", needs=("json", "sh", tmp_path)),
    ]
    without = lease()
    without.run(wanted)
    assert states(without) == {
        "gpu": "needs a GPU",
        "program": "needs no-such-program",
        "file": f"needs {tmp_path / 'missing'}",
        "all there": DONE,
    }
    with_gpu = lease(has_gpu=True)
    with_gpu.run(wanted[:1])
    assert states(with_gpu) == {"gpu": DONE}


def test_resume(lease, tmp_path):
    done, result = tmp_path / "order", tmp_path / "result.json"
    note = "import sys; open(sys.argv[1], 'a').write(sys.argv[2]); sys.exit(int(sys.argv[3]))"
    result.write_text(json.dumps({"left_out": {"a row": OUT_OF_TIME, "a peer": "not installed"}}))
    wanted = [
        python("a", note, done, "a", 0),
        python("b", note, done, "b", 1),
        python("c", note, done, "c", 0, result=result),
        python("d", note, done, "d", 0, least=1000),
    ]
    first = lease()
    first.run(wanted)
    assert states(first) == {"a": DONE, "b": FAILED, "c": UNFINISHED, "d": OUT_OF_TIME}
    assert first.outcomes["c"].note == "no time for a row"
    result.write_text("{}")
    second = lease()
    second.resume()
    second.run([*wanted[:3], python("d", note, done, "d", 0)])
    assert states(second) == {"a": DONE, "b": FAILED, "c": DONE, "d": DONE}
    assert done.read_text() == "abc" + "cdb"  # what failed comes last
    assert json.loads((tmp_path / "lease.json").read_text())["steps"]["d"]["state"] == DONE
    second.forget(wanted[2])
    assert not result.exists() and "c" not in second.outcomes


@pytest.fixture
def interruptible():
    """Ctrl-C raises, also where a shell has started the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c(lease, tmp_path, monkeypatch, interruptible):
    monkeypatch.setattr(processes, "GRACE", 1.0)
    child = tmp_path / "child"
    threading.Thread(
        target=lambda: (wait_for(child), time.sleep(1), os.kill(os.getpid(), signal.SIGINT)), daemon=True
    ).start()
    stopped = lease()
    with pytest.raises(KeyboardInterrupt):
        stopped.run([engine(child, 600), python("next", "pass")])
    assert_ends(int(child.read_text()))
    kept = json.loads((tmp_path / "lease.json").read_text())["steps"]
    assert {name: step["state"] for name, step in kept.items()} == {"long": INTERRUPTED, "next": OUT_OF_TIME}


def test_the_plugin_is_found_without_an_installation(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "entry_points", lambda **_: ())
    variables = runner.environment(tmp_path)
    code = (
        "from importlib.metadata import entry_points, version\n"
        "print(*entry_points(group='vllm.general_plugins', name='butterfly'), version('bq-vllm'))"
    )
    # only what that variable names: no site-packages
    paths = {"PYTHONPATH": variables["PYTHONPATH"]}
    done = subprocess.run([sys.executable, "-S", "-c", code], env=paths, capture_output=True, text=True, check=True)
    project = (ROOT / "pyproject.toml").read_text()
    assert "value='bq_vllm:register'" in done.stdout and 'butterfly = "bq_vllm:register"' in project
    assert f'version = "{done.stdout.split()[-1]}"' in project


def test_launches_of_an_earlier_lease_are_used(tmp_path):
    table, line = tmp_path / "project" / "launch.json", {"max_rows": None, "kernel": "dense", "fuse": False}
    table.parent.mkdir()
    table.write_text(json.dumps({"sm90": [line]}))
    runner.restore_launches(tmp_path, table)
    (tmp_path / "launch.json").write_text(json.dumps({"sm90": [], "a GPU": [line]}))
    runner.restore_launches(tmp_path, table)
    assert json.loads(table.read_text()) == {"sm90": [line], "a GPU": [line]}


@pytest.mark.parametrize("rehearse", [False, True])
def test_steps(tmp_path, rehearse):
    every = steps(Plan(tmp_path, rehearse))
    assert [step.name for step in every] == [
        *(
            "tests",
            "errors",
            "tune",
            "kernels",
            "layer",
            "vocabulary",
            "mixture",
            "serving",
            "calibration",
            "training",
            "rotation",
        ),
        *("sanitizer", "parity"),
    ]
    assert all(step.least <= step.seconds <= 540 for step in every)
    assert all(Path(part).exists() for step in every for part in step.command if part.endswith(".py"))
    needing = {step.name for step in every if GPU in step.needs}
    assert needing == ({"sanitizer"} if rehearse else {step.name for step in every})


def test_unknown_step(start):
    done = start("gpu.py", "--only", "tests,nothing")
    assert done.returncode == 2 and "nothing" in done.stderr and "calibration" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_every_step_says_so(run, tmp_path):
    printed = run("gpu.py", "--minutes", 1, "--out", tmp_path / "out")
    kept = json.loads((tmp_path / "out" / "lease.json").read_text())
    assert {step["state"] for step in kept["steps"].values()} == {"needs a GPU"}
    assert kept["machine"]["gpu"] is False and "needs a GPU" in printed and "left:" not in printed


@pytest.mark.slow
def test_rehearsal(run, tmp_path):
    """The steps that no other test runs; the same folder for two commands."""
    out = tmp_path / "out"
    common = ("--rehearse", "--minutes", 4, "--out", out)
    run("gpu.py", *common, "--only", "errors,layer,sanitizer")
    run("gpu.py", *common, "--only", "calibration,training", "--resume")
    kept = json.loads((out / "lease.json").read_text())["steps"]
    assert {name: step["state"] for name, step in kept.items()} == {
        **{name: DONE for name in ("errors", "layer", "calibration", "training")},
        "sanitizer": "needs a GPU",
    }
    errors = json.loads((out / "errors.json").read_text())["rows"]
    assert all(0 < row["rms"] <= row["largest"] for row in errors)
    steps_of = {row["method"] for row in json.loads((out / "layer.json").read_text())["rows"]}
    assert {"cuBLAS fp16", "ours, block = group", "ours, norm before", "ours, norm inside"} <= steps_of
    assert [rung["tokens"] for rung in json.loads((out / "training.json").read_text())["rungs"]] == [1000, 2000]
    calibration = json.loads((out / "calibration.json").read_text())
    assert calibration["run"]["wall_seconds"] > 0 and (out / "calibration" / "bq2" / "config.json").exists()
