"""Pooling of bad input: torch's exception types, with a sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import weft
from harness import module_info
from pool_cases import (
    ADAPTIVE,
    FIXED,
    MODULES,
    OPS,
    each_adaptive,
    each_max,
    each_op,
    random_map,
    rank_of,
)

BAD_WINDOWS: list[tuple[dict[str, Any], str]] = [
    ({"kernel_size": 0}, "kernel size"),
    ({"kernel_size": 2, "stride": 0}, "stride"),
    ({"kernel_size": 2, "stride": -1}, "stride"),
    ({"kernel_size": 2, "padding": 2}, "at most half"),
    ({"kernel_size": 2, "padding": -1}, "non-negative"),
    ({"kernel_size": 11}, "too small"),
    ({"kernel_size": (2,) * 4}, "kernel_size"),
    ({"kernel_size": 2, "stride": (2,) * 4}, "stride"),
    ({"kernel_size": 2, "padding": (1,) * 4}, "padding"),
    ({"kernel_size": 2**31}, "out of range"),
    ({"kernel_size": 2, "stride": 2**40}, "out of range"),
]


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize(("window", "text"), BAD_WINDOWS, ids=str)
def test_bad_windows(name: str, window: dict[str, Any], text: str, device: torch.device) -> None:
    """The sentence names the op and the argument."""
    x = random_map(name, 2, 3).to(device)
    with pytest.raises(RuntimeError, match=f"{name}: .*{text}"):
        OPS[name][0](x, **window)
    if text != "out of range":  # torch takes strides of any length in 1-d
        with pytest.raises(RuntimeError):
            OPS[name][1](x, **window)


@pytest.mark.parametrize("name", FIXED)
def test_windows_of_too_many_elements(name: str, device: torch.device) -> None:
    kernel_size = (2**31 // 2 ** (10 * rank_of(name)) + 1, *(2**10,) * (rank_of(name) - 1))
    with pytest.raises(RuntimeError, match=rf"{name}: .*(out of range|too small)"):
        OPS[name][0](random_map(name, 2, 3).to(device), kernel_size)


@pytest.mark.parametrize("name", [n for n in FIXED if "max" in n])
@pytest.mark.parametrize(
    ("dilation", "text"), [(0, "dilation"), (-1, "dilation"), (9, "too small"), (2**31, "range")]
)
def test_bad_dilation(name: str, dilation: int, text: str, device: torch.device) -> None:
    with pytest.raises(RuntimeError, match=f"{name}: .*{text}"):
        OPS[name][0](random_map(name, 2, 3).to(device), 2, dilation=dilation)


@pytest.mark.parametrize("name", [n for n in FIXED if "max" not in n and rank_of(n) > 1])
def test_zero_divisor(name: str, device: torch.device) -> None:
    with pytest.raises(RuntimeError, match=f"{name}: divisor must be not zero"):
        OPS[name][0](random_map(name, 2, 3).to(device), 2, divisor_override=0)


@each_adaptive
@pytest.mark.parametrize("size", [-1, (2, 2, 2, 2), (2, None, -3, 1), 2**31], ids=str)
def test_bad_output_sizes(name: str, size: Any, device: torch.device) -> None:
    with pytest.raises(RuntimeError, match=f"{name}: .*output_size"):
        OPS[name][0](random_map(name, 2, 3).to(device), size)


@each_op
def test_wrong_rank_and_empty_maps(name: str, device: torch.device) -> None:
    weft_op, rank = OPS[name][0], rank_of(name)
    for dims in (rank, rank + 3):
        with pytest.raises(RuntimeError, match=f"{name}: Expected {rank + 1}D or {rank + 2}D"):
            weft_op(torch.ones([2] * dims, device=device), 1)
    with pytest.raises(RuntimeError, match=f"{name}: .*non-zero size"):
        weft_op(torch.ones([2] * (rank + 1) + [0], device=device), 1)


@each_op
def test_integer_input(name: str, device: torch.device) -> None:
    with pytest.raises(NotImplementedError, match="float32, float64, bfloat16 or float16"):
        OPS[name][0](random_map(name, 1, 1).to(device, torch.int64), 2)


@each_op
def test_more_bytes_than_there_are(name: str, device: torch.device) -> None:
    """A tensor of no memory of its own can be of any size."""
    x = torch.ones((), device=device).expand(2**28, 2**28, *(4,) * rank_of(name))
    with pytest.raises(RuntimeError, match=r"overflow|memory"):
        OPS[name][0](x, 2)


@each_op
def test_arguments_of_another_type(name: str, device: torch.device) -> None:
    x = random_map(name, 2, 3).to(device)
    for wrong in (2.5, "2", [2.5] * rank_of(name)):
        for op in OPS[name]:
            with pytest.raises((TypeError, RuntimeError)):
                op(x, wrong)


@each_max
def test_places_that_no_forward_gave(name: str, device: torch.device) -> None:
    """The inner ops check what they are handed."""
    rank = rank_of(name)
    x = random_map(name, 2, 3).to(device)
    window: list[Any] = [[2] * rank]
    op = "adaptive_max_pool" if name in ADAPTIVE else "max_pool"
    if name in FIXED:
        window += [[], [0] * rank, [1] * rank, False]
    ops = torch.ops.weft
    y, places = getattr(ops, op)(x, *window, True)
    for wrong in (places[:1], places.int(), places.unsqueeze(0)):
        for inner, arguments in (
            ("_backward", (y, wrong, x.shape, *window, False)),
            ("_pick", (x, wrong, *window)),
            ("_indices", (wrong, x.shape, *window)),
        ):
            with pytest.raises(RuntimeError, match="places must come from"):
                getattr(ops, op + inner)(*arguments)
    with pytest.raises(RuntimeError, match="grad must have the output's size"):
        getattr(ops, op + "_backward")(y[:1], places, x.shape, *window, False)


def test_module_db_errors(device: torch.device) -> None:
    """Of the pooling modules torch describes the errors of MaxPool2d alone."""
    described = [m for m in map(module_info, MODULES) if m.module_error_inputs_func]
    assert [m.module_cls for m in described] == [torch.nn.MaxPool2d]
    cases = described[0].module_error_inputs_func(
        described[0], device=device, dtype=torch.float32, requires_grad=False, training=True
    )
    for case in cases:
        build, call = (
            case.module_error_input.constructor_input,
            case.module_error_input.forward_input,
        )
        module = weft.nn.MaxPool2d(*build.args, **build.kwargs)
        with pytest.raises(case.error_type):
            module(*call.args, **call.kwargs)
