"""Runs of several processes each, forked from one that has loaded torch: `python processes.py JOBS`, JOBS a JSON list.

A job is {"processes", "arguments" of `calibrate`}, and perhaps "interrupted": the step of the training at which Ctrl-C
comes, and "begun": the unfinished work of another run to go on from. Layers do not compile. Prints the exit codes of
every job's processes.
"""

import json
import os
import shutil
import socket
import sys
import traceback

import torch
from bq_calibration import calibrate, parallel, pipeline, train  # noqa: F401 pipeline: loaded before the fork
from torch import nn

torch.set_num_threads(1)
parallel.LAST_WORDS = 0.1


def interrupt_at(wanted: int) -> None:
    """Raise KeyboardInterrupt at a step of the training; the state is saved after every step before."""
    step = train.Training._step
    train.SAVE_EVERY = 0

    def stepping(self, number: int) -> None:
        if number == wanted:
            raise KeyboardInterrupt
        step(self, number)

    train.Training._step = stepping


def break_compiler() -> None:
    """Compiled layers fail in the middle."""

    def broken(*_, **__):
        raise RuntimeError("no compiler here")

    nn.Module.compile = lambda layer, **_: setattr(layer.mlp, "forward", broken)


def process(rank: int, job: dict, port: int) -> int:
    if job["processes"] > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["processes"], "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"})
    break_compiler()
    if "interrupted" in job:
        interrupt_at(job["interrupted"])
    try:
        calibrate(**job["arguments"], device="cpu", plots=False)
    except KeyboardInterrupt:
        return 130
    except SystemExit as error:
        return error.code
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def run(job: dict) -> list[int]:
    if "begun" in job:
        shutil.copytree(job["begun"], job["arguments"]["out"] + ".partial")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(job["processes"]):
        child = os.fork()
        if not child:
            code = process(rank, job, port)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


print(json.dumps([run(job) for job in json.loads(sys.argv[1])]))
