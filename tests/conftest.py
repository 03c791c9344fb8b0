"""Every op is tested on three backends by one fixture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

import weft.testing

# Test problems are tiny: a second thread only waits. Tests of threading set their own number.
torch.set_num_threads(1)

BACKENDS = ["cpu", "cuda-on-host"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Name of the backend that weft ops use inside the test."""
    host = request.param == "cuda-on-host"
    with weft.testing.host_execution() if host else nullcontext():
        yield request.param


@pytest.fixture
def device(backend: str) -> torch.device:
    """Where the backend's tensors live."""
    return torch.device("cuda" if backend == "cuda" else "cpu")


@pytest.fixture(autouse=True)
def _full_float32() -> Iterator[None]:
    """float32 means float32: PyTorch's own convolutions on CPU, the measure of errors, never round
    to TF32. Tests of TF32 turn it on."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20)
