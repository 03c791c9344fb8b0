"""Instruments for tests and for `python -m weft check`.

How weft's numbers are judged, CUDA kernels executed on the CPU, and the choice of CPU kernels.
Errors are measured against float64 and judged against PyTorch's own error on the same input, so
nothing here holds a tolerance of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from weft import _C

if hasattr(torch.ops.weft, "device_selftest"):

    @torch.library.register_fake("weft::device_selftest")
    def _(input: Tensor, word: str) -> Tensor:
        return torch.empty_like(input)


@dataclass(frozen=True)
class Launch:
    """What one kernel launch moved. A sector is 32 bytes; each counts once per block."""

    kernel: str
    blocks: int
    threads: int
    shared_bytes: int
    bytes_loaded: int
    bytes_stored: int
    sectors_loaded: int
    sectors_stored: int

    @property
    def traffic(self) -> int:
        """Bytes that must come from and go to memory if each block caches perfectly."""
        return 32 * (self.sectors_loaded + self.sectors_stored)


class HostRun:
    """The launches made so far inside a `host_execution` block, in any thread."""

    def __init__(self) -> None:
        self._first = len(_C.launch_reports())

    @property
    def launches(self) -> list[Launch]:
        return [Launch(**report) for report in _C.launch_reports()[self._first :]]


HOST_MULTIPROCESSORS = 4

_lock = threading.Lock()
_open_blocks = 0


@contextmanager
def host_execution(multiprocessors: int = HOST_MULTIPROCESSORS) -> Iterator[HostRun]:
    """Runs every weft op on CPU tensors through the CUDA kernels' own source.

    Process-wide; blocks may nest and overlap. Strict: see "Host execution" in CONTRIBUTING.md. A
    fault of a kernel is a RuntimeError that names the kernel, the block and the threads.

    Args:
        multiprocessors: of the device that is played; plans depend on it. On none, no blocks can
            wait for each other.

    Raises:
        RuntimeError: if weft was built without `WEFT_HOST_EXECUTION=1`.
    """
    global _open_blocks
    with _lock:
        _C.set_host_execution(True)
        _C.set_multiprocessors(multiprocessors)
        if _open_blocks == 0:
            _C.clear_launch_reports()
        _open_blocks += 1
        run = HostRun()
    try:
        yield run
    finally:
        with _lock:
            _open_blocks -= 1
            _C.set_host_execution(_open_blocks > 0)
            _C.set_multiprocessors(HOST_MULTIPROCESSORS)


@contextmanager
def sm90a_kernels() -> Iterator[None]:
    """Chooses the CUDA kernels that only Hopper GPUs have, where they suit.

    They pass their tests under host execution but have no run on such a GPU in
    `benchmarks/results` yet, so they are not chosen otherwise, unless the process was started with
    the environment variable `WEFT_SM90A=1`. Process-wide.
    """
    before = _C.sm90a_kernels()
    _C.set_sm90a_kernels(True)
    try:
        yield
    finally:
        _C.set_sm90a_kernels(before)


@contextmanager
def cpu_target(name: str) -> Iterator[None]:
    """Runs CPU kernels of one instruction set: "baseline", "avx2" or "avx512".

    Raises:
        ValueError: if this machine does not have it.
    """
    before = _C.cpu_target()
    _C.set_cpu_target(name)
    try:
        yield
    finally:
        _C.set_cpu_target(before)


def cast(value: Any, dtype: torch.dtype) -> Any:
    """`value` with every floating tensor in it as a detached leaf of `dtype`."""

    def convert(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        return leaf.detach().to(dtype, copy=True).requires_grad_(leaf.requires_grad)

    return tree_map(convert, value)


def _finite(tensor: Tensor) -> Tensor:
    return tensor.double().where(tensor.isfinite(), 0)


def assert_as_accurate(
    actual: Tensor, native: Tensor, exact: Tensor, native_error: float = 0.0
) -> None:
    """|actual − exact| ≤ max(1.5 · PyTorch's largest error, 1 ulp); non-finite places equal.

    PyTorch's error is that of `native`, or `native_error` if that is larger.
    """
    if (actual.shape, actual.dtype) != (native.shape, native.dtype):
        raise AssertionError(
            f"is {actual.dtype} {list(actual.shape)}, "
            f"PyTorch's is {native.dtype} {list(native.shape)}"
        )
    if actual.numel() == 0:
        return
    torch.testing.assert_close(
        actual.where(~native.isfinite(), 0),
        native.where(~native.isfinite(), 0),
        rtol=0,
        atol=0,
        equal_nan=True,
    )
    both = native.isfinite() & exact.isfinite()
    error = _finite(actual.double() - exact).where(both, 0).abs()
    bound = 1.5 * _finite(native.double() - exact).where(both, 0).abs().max()
    bound = bound.clamp(min=1.5 * native_error)
    if actual.dtype == torch.float64:  # `exact` is PyTorch's own result and errs as much
        bound = torch.full_like(bound, 2.5 * native_error)
    finfo = torch.finfo(actual.dtype)
    bounds = torch.maximum(bound, finfo.eps * _finite(exact).abs() + finfo.tiny)
    if not (error <= bounds).all():
        worst = (error - bounds).argmax()
        raise AssertionError(
            f"error {error.flatten()[worst]:.3e} exceeds {bounds.flatten()[worst]:.3e}"
        )


def _tensors(value: Any) -> list[Tensor]:
    flat = tree_leaves(value)
    return [t for t in flat if isinstance(t, Tensor) and t.is_floating_point()]


def _values_and_gradients(
    function: Callable[..., Any], args: tuple, kwargs: dict, seeds: list[Tensor] | None
) -> tuple[list[Tensor], list[Tensor | None]]:
    outputs = _tensors(function(*args, **kwargs))
    inputs = [t for t in _tensors((args, kwargs)) if t.requires_grad]
    if seeds is None or not inputs or not any(t.requires_grad for t in outputs):
        return outputs, []
    pairs = [(t, s.to(t.dtype)) for t, s in zip(outputs, seeds, strict=True) if t.requires_grad]
    grads = torch.autograd.grad(
        [t for t, _ in pairs], inputs, [s for _, s in pairs], allow_unused=True
    )
    return outputs, list(grads)


@contextmanager
def _onednn(enabled: bool) -> Iterator[None]:
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(enabled)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


def _native_errors(
    native: Callable[..., Any],
    args: tuple,
    kwargs: dict,
    seeds: list[Tensor],
    dtype: torch.dtype,
) -> list[float]:
    """PyTorch's error in `dtype`, per output and gradient.

    It is the largest of several draws of values near the given ones, since a small tensor may
    round luckily. In float64 it is the error in float32, scaled by the ratio of the two epsilons,
    and without oneDNN, which has no float64: both run the same algorithm.
    """
    low, scale, onednn = dtype, 1.0, torch._C._get_mkldnn_enabled()
    if dtype == torch.float64:
        low, onednn = torch.float32, False
        scale = torch.finfo(torch.float64).eps / torch.finfo(low).eps
    draws = []
    elements = sum(t.numel() for t in _tensors((args, kwargs)))
    for _ in range(32 if elements < 3_000 else 12 if elements < 50_000 else 4):
        near = tree_map(
            lambda t: (
                (t * (1 + torch.rand_like(t) / 4)).detach().requires_grad_(t.requires_grad)
                if isinstance(t, Tensor) and t.is_floating_point()
                else t
            ),
            (args, kwargs, seeds),
        )
        low_args, low_kwargs, low_seeds = cast(near, low)
        with _onednn(onednn):
            rounded = _values_and_gradients(native, low_args, low_kwargs, low_seeds)
        exact_args, exact_kwargs = cast((low_args, low_kwargs), torch.float64)
        exact = _values_and_gradients(native, exact_args, exact_kwargs, low_seeds)
        draws.append(
            [
                0.0
                if a is None or b is None or a.numel() == 0
                else float(_finite(a.detach().double() - b.detach()).abs().max()) * scale
                for a, b in zip(rounded[0] + rounded[1], exact[0] + exact[1], strict=True)
            ]
        )
    return [max(errors) for errors in zip(*draws, strict=True)]


def check_against_native(
    weft: Callable[..., Any], native: Callable[..., Any], *args: Any, **kwargs: Any
) -> None:
    """Values, and gradients of every floating tensor that requires one, of weft(*args, **kwargs).

    PyTorch's error is measured on this input and on others near it, see `_native_errors`.
    """
    double = torch.float64
    outputs = _tensors(weft(*args, **kwargs))
    seeds = [torch.randn_like(t) for t in outputs]
    actual = _values_and_gradients(weft, args, kwargs, seeds)
    expected = _values_and_gradients(native, args, kwargs, seeds)
    exact_args, exact_kwargs = cast((args, kwargs), double)
    exact = _values_and_gradients(native, exact_args, exact_kwargs, seeds)
    errors: list[float] = []  # drawn only where PyTorch's error on this very input is not enough
    for i, (a, n, e) in enumerate(
        zip(actual[0] + actual[1], expected[0] + expected[1], exact[0] + exact[1], strict=True)
    ):
        if (a is None) != (n is None):
            raise AssertionError("a gradient is there for one of weft and PyTorch alone")
        if a is None or n is None or e is None:
            continue
        try:
            assert_as_accurate(a, n, e)
        except AssertionError:
            errors = errors or _native_errors(native, args, kwargs, seeds, outputs[0].dtype)
            assert_as_accurate(a, n, e, errors[i])


def check_deterministic(function: Callable[[], Any], threads: Sequence[int] = (1, 2, 3)) -> None:
    """Equal bits from two runs, and from other numbers of threads."""
    before = torch.get_num_threads()
    first = _tensors(function())
    try:
        for count in (before, *threads):
            torch.set_num_threads(count)
            for a, b in zip(first, _tensors(function()), strict=True):
                if not torch.equal(
                    a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
                ):
                    raise AssertionError(f"other bits in a second run, with {count} threads")
    finally:
        torch.set_num_threads(before)
