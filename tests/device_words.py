"""What the tests of the device vocabulary share: where words run, and how a planted fault reads."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import weft.testing

POISON = 0x7FF47FF4


def run(word: str, input: Tensor) -> Tensor:
    return torch.ops.weft.device_selftest(input, word)


def words_fixture(on_cuda: bool) -> Callable[..., Any]:
    """The fixture `device`: where words run, on the host and, if `on_cuda`, on the GPU."""

    @pytest.fixture(name="device", params=["cuda-on-host"] + (["cuda"] if on_cuda else []))
    def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
        host = request.param == "cuda-on-host"
        with weft.testing.host_execution() if host else nullcontext():
            yield torch.device("cpu" if host else "cuda")

    return device


def check_fault(fault: str, message: str, input: Tensor) -> None:
    """The first line is "kernel <fault>" and `message`, a pattern."""
    with weft.testing.host_execution():
        # Twice: the message is the same every time, and a fault leaves the process usable.
        messages = []
        for _ in range(2):
            with pytest.raises(RuntimeError) as caught:
                run(fault, input)
            messages.append(str(caught.value).splitlines()[0])
            assert torch.equal(run("load.4", input), input)
    assert messages[0] == messages[1]
    assert re.match(f"kernel {fault}(?:{message})", messages[0]), messages[0]
