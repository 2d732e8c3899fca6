import concurrent.futures
import multiprocessing
import os
import random

import pytest
import torch
from bq_kernels import ops


@pytest.fixture(autouse=True)
def seed():
    """Fresh data in every run; pytest prints the seed when a test fails, BQ_TEST_SEED brings it back."""
    value = int(os.environ.get("BQ_TEST_SEED") or random.SystemRandom().getrandbits(32))
    print(f"BQ_TEST_SEED={value}")
    torch.manual_seed(value)
    random.seed(value)
    return value


@pytest.fixture(scope="module", params=["interpreter"] + ["cuda"] * torch.cuda.is_available())
def call(request):
    """Calls a function with CPU tensors where kernels run: in a process that interprets them, or on the GPU.

    Triton decides at import whether it interprets, and then compiles no more: hence a process of its own.
    """
    if request.param == "cuda":

        def on_gpu(function, *tensors):
            return function(*(t.cuda() if isinstance(t, torch.Tensor) else t for t in tensors)).cpu()

        yield on_gpu
        return
    pytest.importorskip("triton")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            assert pool.submit(ops.interpreted).result()  # starts the process, which keeps this environment
        yield lambda function, *arguments: pool.submit(function, *arguments).result()
