import os
import random

import pytest
import torch


@pytest.fixture(autouse=True)
def seed():
    """Fresh data in every run; pytest prints the seed when a test fails, BQ_TEST_SEED brings it back."""
    value = int(os.environ.get("BQ_TEST_SEED") or random.SystemRandom().getrandbits(32))
    print(f"BQ_TEST_SEED={value}")
    torch.manual_seed(value)
    random.seed(value)
    return value
