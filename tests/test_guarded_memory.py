"""No CPU kernel reads beyond its inputs: `guarded_problems.py`, in processes that would die."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("guarded_problems.py")


def run(family: str, seed: int, count: int) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-X", "faulthandler", str(PROGRAM), family, str(seed), str(count)],
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("family", ["convolution", "pooling", "recurrence", "cells"])
def test_random_problems_between_pages_without_access(family):
    said = run(family, seed=5, count=240)
    assert said.returncode == 0, said.stderr


@pytest.mark.parametrize("seed", [1, 2])
def test_a_read_beyond_the_end_is_seen(seed):
    assert run("read_too_far", seed, count=1).returncode == -signal.SIGSEGV
