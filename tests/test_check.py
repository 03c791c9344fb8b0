"""`python -m weft check` passes on what is right, and finds what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import weft.functional
from weft import check
from weft.__main__ import main

RIGHT = weft.functional.avg_pool2d


def failed(outcomes: list[check.Outcome]) -> set[tuple[str, str]]:
    return {(o.op, o.check) for o in outcomes if not o.passed}


def test_every_family_is_checked() -> None:
    assert {s.family for s in check.SUBJECTS} == {"pool", "conv", "rnn"}
    functions = [s.name for s in check.SUBJECTS if not isinstance(s, check.LayerSubject)]
    assert sorted(functions) == sorted(weft.functional.__all__)
    layers = {s.name for s in check.SUBJECTS} - set(functions)
    assert layers == {"lstm", "gru", "rnn"}


@pytest.mark.parametrize("family", ["pool", "conv", "rnn"])
def test_command_passes(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["check", family])
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert "FAIL" not in printed
    for subject in check.SUBJECTS:
        assert (f" {subject.name} " in printed) == (subject.family == family)
    assert "checks passed, 0 failed" in printed


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 1.05 * grad


class _WrongSecondGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _WrongGradient.apply(grad)


def _wrong_values(*args: Any, **options: Any) -> Tensor:
    return RIGHT(*args, **options) * 1.01


def _wrong_gradient(*args: Any, **options: Any) -> Tensor:
    return _WrongGradient.apply(RIGHT(*args, **options))


def _wrong_second_gradient(*args: Any, **options: Any) -> Tensor:
    return _WrongSecondGradient.apply(RIGHT(*args, **options))


def _other_bits_each_run(*args: Any, **options: Any) -> Tensor:
    noise = torch.rand(()).item() * 1e-6
    return RIGHT(*args, **options) * (1 + noise)


def _other_bits_by_threads(*args: Any, **options: Any) -> Tensor:
    return RIGHT(*args, **options) * (1 + 1e-6 * (torch.get_num_threads() == 3))


def _raises(*args: Any, **options: Any) -> Tensor:
    raise RuntimeError("no kernel here")


@pytest.mark.parametrize(
    ("wrong", "found_by"),
    [
        (_wrong_values, {"values", "gradients"}),
        (_wrong_gradient, {"gradients", "gradcheck"}),
        (_wrong_second_gradient, {"gradgradcheck"}),
        (_other_bits_each_run, {"repeat", "threads"}),
        (_other_bits_by_threads, {"threads"}),
        (_raises, set(check.CHECKS)),
    ],
)
def test_a_planted_fault_is_found(
    wrong: Callable[..., Tensor], found_by: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weft.functional, "avg_pool2d", wrong)
    found = failed(check.run("pool"))
    assert {("avg_pool2d", name) for name in found_by} <= found
    assert not any(op == "max_pool2d" for op, _ in found)


def test_command_fails_and_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(weft.functional, "avg_pool2d", _raises)
    assert main(["check", "pool"]) == 1
    printed = capsys.readouterr().out
    assert "FAIL" in printed
    assert "no kernel here" in printed
    assert "avg_pool2d on cpu" in printed
