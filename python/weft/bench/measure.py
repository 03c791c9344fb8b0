"""Timing weft and PyTorch in one process, in turn.

Both run warm, on inputs that rotate through more memory than the last-level cache holds, and the
order changes from sample to sample, so that drift of the machine meets both. A sample is as many
calls as fill a millisecond. Medians with the interquartile range; the CPU's clock is
`time.perf_counter`, CUDA's are events.

On the CPU each row has a process of its own. What ran before in a process decides, by what it left
of malloc's heap, whether an output of some megabytes comes of fresh pages of the system, which
takes a PyTorch operation up to ten times as long: a row would depend on its place in the list. A
new process has no such memory left; `apart=False` measures in one that may have.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from weft import _C, facts
from weft.bench.rows import Direction, Row

# The profiler, which counts allocations here, logs every start and stop unless told not to.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
# A row's process is a fork, which may have threads only if the one it comes from had none; numpy
# would start some.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

_SAMPLE_SECONDS = 1e-3
_WARM_SHARE = 0.05  # of an effort's seconds, for each library before it is timed
_ROTATION_BYTES = 1 << 30
_MOST_COPIES = 64
_SLOW_SECONDS = 0.02

Call = Callable[[int], Any]
"""One call on the i-th set of inputs (modulo their number)."""


@dataclass(frozen=True)
class Effort:
    """How long to measure one row: `seconds` unless `least` samples take longer."""

    seconds: float
    least: int
    most: int


QUICK = Effort(seconds=1.0, least=3, most=30)
FULL = Effort(seconds=3.0, least=5, most=200)
# A GPU's clock is steady, and its time is short.
ON_CUDA = Effort(seconds=0.25, least=5, most=50)


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, interquartile range and least of `samples` samples."""

    seconds: float
    spread: float
    least: float
    samples: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        quartiles = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(quartiles[1], quartiles[2] - quartiles[0], min(samples), len(samples))


def _elapsed(call: Call, first: int, count: int, device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for i in range(first, first + count):
            call(i)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3
    begin = time.perf_counter()
    for i in range(first, first + count):
        call(i)
    return time.perf_counter() - begin


def _warm_up(call: Call, device: torch.device, seconds: float) -> float:
    """Least seconds of a call among those that fill `seconds`; the first pays for lazy set-up."""
    _elapsed(call, 0, 1, device)
    samples = [_elapsed(call, 1, 1, device)]
    while sum(samples) < seconds:
        samples.append(_elapsed(call, len(samples) + 1, 1, device))
    return min(samples)


def time_in_turn(calls: Sequence[Call], device: torch.device, effort: Effort) -> list[Timing]:
    """Times several calls against each other; see the module's text."""
    warm = [_warm_up(call, device, effort.seconds * _WARM_SHARE) for call in calls]
    batch = max(1, round(_SAMPLE_SECONDS / max(min(warm), 1e-7)))
    affordable = effort.seconds / (batch * sum(warm))
    count = int(min(max(effort.least, affordable), effort.most))
    samples: list[list[float]] = [[] for _ in calls]
    collecting = gc.isenabled()
    gc.disable()
    try:
        for round_index in range(count):
            order = range(len(calls)) if round_index % 2 == 0 else reversed(range(len(calls)))
            for k in order:
                elapsed = _elapsed(calls[k], round_index * batch, batch, device)
                samples[k].append(elapsed / batch)
    finally:
        if collecting:
            gc.enable()
    return [Timing.of(s) for s in samples]


# ---- ceilings ------------------------------------------------------------------------------------


class Ceilings:
    """What this device can do at most, measured once in this run when first asked for.

    The best sample counts: another program's work must not lower a ceiling.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._bytes_per_second: float | None = None
        self._flops_per_second: dict[torch.dtype, float] = {}
        self._multiply_adds_per_second: float | None = None
        self._autograd_seconds: dict[int, float] = {}

    def bytes_per_second(self) -> float:
        """Of a large copy, reading and writing counted."""
        if self._bytes_per_second is None:
            elements = max(1 << 26, facts.cache_bytes(self._device))
            source = torch.ones(elements, dtype=torch.float32, device=self._device)
            target = torch.empty_like(source)
            (timing,) = time_in_turn(
                [lambda _: target.copy_(source)], self._device, Effort(0.5, 5, 20)
            )
            self._bytes_per_second = 2 * source.nbytes / timing.least
        return self._bytes_per_second

    def flops_per_second(self, dtype: torch.dtype) -> float:
        """Of a square matrix product, as large as does not take long: some dtypes are slow."""
        if dtype not in self._flops_per_second:
            n, most = 256, 8192 if self._device.type == "cuda" else 2048
            while n < most and self._product_seconds(n, dtype, Effort(0, 2, 2)) < _SLOW_SECONDS:
                n *= 2
            seconds = self._product_seconds(n, dtype, Effort(0.5, 3, 20))
            self._flops_per_second[dtype] = 2 * n**3 / seconds
        return self._flops_per_second[dtype]

    def _product_seconds(self, n: int, dtype: torch.dtype, effort: Effort) -> float:
        a, b = (torch.randn(n, n, device=self._device).to(dtype) for _ in range(2))
        (timing,) = time_in_turn([lambda _: a @ b], self._device, effort)
        return timing.least

    def multiply_adds_per_second(self) -> float:
        """Floating-point operations of float32 multiply-adds in registers, on all threads: what no
        product on the CPU exceeds."""
        if self._multiply_adds_per_second is None:
            rounds = 1 << 18
            operations = _C.multiply_adds(rounds)
            (timing,) = time_in_turn(
                [lambda _: _C.multiply_adds(rounds)], torch.device("cpu"), Effort(0.5, 5, 50)
            )
            self._multiply_adds_per_second = operations / timing.least
        return self._multiply_adds_per_second

    def autograd_seconds(self, tensors: int) -> float:
        """Of `torch.autograd.grad` through one node of so many tensors, which copies as many
        numbers: what PyTorch's engine takes by itself."""
        if tensors not in self._autograd_seconds:
            parts = [torch.ones(1, device=self._device, requires_grad=True) for _ in range(tensors)]
            whole = torch.cat(parts)
            grad = torch.ones_like(whole)
            (timing,) = time_in_turn(
                [lambda _: torch.autograd.grad(whole, parts, grad, retain_graph=True)],
                self._device,
                Effort(0.2, 5, 50),
            )
            self._autograd_seconds[tensors] = timing.least
        return self._autograd_seconds[tensors]

    def as_dict(self) -> dict[str, Any]:
        flops = {str(d).removeprefix("torch."): f for d, f in self._flops_per_second.items()}
        return {
            "device": str(self._device),
            "copy_bytes_per_s": self.bytes_per_second(),
            "matmul_flops_per_s": flops,
            "cpu_multiply_add_flops_per_s": self.multiply_adds_per_second(),
            "autograd_s": {str(n): self.autograd_seconds(n) for n in (1, 6, 7)},
        }


# ---- memory --------------------------------------------------------------------------------------


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """The most that `call` holds at once above what was held before, its results included.

    On the CPU, of what torch's allocator gives out, as its profiler records it; memory that a
    library takes from the system by itself is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def kept_bytes(forward: Callable[[], Any], parameters: Sequence[Tensor]) -> int:
    """Bytes that autograd holds between `forward` and backward; `parameters` are there anyway."""
    there = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    # Alive until here, so that no two storages share an address.
    del result
    return sum(storage.nbytes() for storage in kept.values())


# ---- one row -------------------------------------------------------------------------------------


class Problem:
    """A row made real: modules of both libraries, and inputs to rotate through."""

    def __init__(self, row: Row, direction: Direction, device: torch.device) -> None:
        self.row, self.direction, self.device = row, direction, device
        torch.manual_seed(20)
        native = row.native().to(device)
        self.modules = {"weft": row.weft(native), "native": native}
        grad = direction != "f"
        first = tuple(t.to(device).requires_grad_(grad) for t in row.inputs())
        with torch.no_grad():
            outputs = row.outputs(native(*row.arguments(first)))
        gradients = tuple(torch.randn_like(t) for t in outputs) if grad else ()
        one = sum(t.nbytes for t in (*first, *gradients))
        wanted = 2 * facts.cache_bytes(device) // one + 1
        copies = max(2, min(wanted, _ROTATION_BYTES // one, _MOST_COPIES))
        self._inputs = [first, *(self._again(first, grad) for _ in range(copies - 1))]
        self._gradients = [gradients, *(self._again(gradients, False) for _ in range(copies - 1))]
        self._arguments = [row.arguments(inputs) for inputs in self._inputs]

    @staticmethod
    def _again(tensors: tuple[Tensor, ...], grad: bool) -> tuple[Tensor, ...]:
        return tuple(t.detach().clone().requires_grad_(grad) for t in tensors)

    def call(self, library: str) -> Call:
        """The row's work by "weft" or "native"."""
        module, arguments, copies = self.modules[library], self._arguments, len(self._inputs)
        if self.direction == "f":

            def forward(i: int) -> Any:
                with torch.no_grad():
                    return module(*arguments[i % copies])

            return forward
        parameters = tuple(module.parameters())
        wanted = [(*inputs, *parameters) for inputs in self._inputs]
        gradients, outputs = self._gradients, self.row.outputs

        def forward_backward(i: int) -> Any:
            found = outputs(module(*arguments[i % copies]))
            return torch.autograd.grad(found, wanted[i % copies], gradients[i % copies])

        def twice(i: int) -> Any:
            found = outputs(module(*arguments[i % copies]))
            inputs, gradient = wanted[i % copies], gradients[i % copies]
            first = torch.autograd.grad(found, inputs, gradient, create_graph=True)
            return torch.autograd.grad(first, inputs, [t.detach() for t in first])

        return twice if self.direction == "fbb" else forward_backward

    def kept_bytes(self, library: str) -> int:
        """What autograd keeps for backward; 0 in direction "f"."""
        module = self.modules[library]
        if self.direction == "f":
            return 0
        return kept_bytes(lambda: module(*self._arguments[0]), list(module.parameters()))


def time_row(
    row: Row, direction: Direction, device: torch.device, effort: Effort
) -> dict[str, Any]:
    """What is measured of a row in this process; times in seconds, ratio = native ÷ weft."""
    problem = Problem(row, direction, device)
    calls = [problem.call(library) for library in ("weft", "native")]
    weft_time, native_time = time_in_turn(calls, device, effort)
    return {
        "weft_s": weft_time.seconds,
        "native_s": native_time.seconds,
        "ratio": native_time.seconds / weft_time.seconds,
        "weft_spread_s": weft_time.spread,
        "native_spread_s": native_time.spread,
        "samples": weft_time.samples,
        "peak_bytes": peak_bytes(partial(calls[0], 0), device),
        "native_peak_bytes": peak_bytes(partial(calls[1], 0), device),
        "kept_bytes": problem.kept_bytes("weft"),
        "native_kept_bytes": problem.kept_bytes("native"),
    }


def time_row_apart(
    row: Row, direction: Direction, device: torch.device, effort: Effort
) -> dict[str, Any]:
    """`time_row` in a new process, a fork of one that has imported what it needs and run nothing.

    Raises:
        RuntimeError: what the row raised there, or that the process came to an end.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__, "torch.profiler"])
    with ProcessPoolExecutor(
        max_workers=1,
        mp_context=context,
        initializer=torch.set_num_threads,
        initargs=(torch.get_num_threads(),),
    ) as process:
        return process.submit(time_row, row, direction, device, effort).result()


def measure(
    row: Row,
    direction: Direction,
    device: torch.device,
    ceilings: Ceilings,
    effort: Effort,
    apart: bool = True,
) -> dict[str, Any]:
    """One row of the result, as it stands in JSON.

    Args:
        apart: on the CPU in a process of its own.

    Raises:
        RuntimeError: what the row raised.
    """
    timed = time_row_apart if apart and device.type == "cpu" else time_row
    found = timed(row, direction, device, effort)
    cost = row.cost(direction)
    by_bytes = cost.bytes / ceilings.bytes_per_second()
    by_flops = cost.flops / ceilings.flops_per_second(row.dtype)
    return {
        "family": row.family,
        "baseline": row.baseline,
        "op": row.op,
        "shape": row.shape,
        "dtype": str(row.dtype).removeprefix("torch."),
        "layout": row.layout,
        "direction": direction,
        "device": device.type,
        "bytes": cost.bytes,
        "flops": cost.flops,
        "fraction_of_ceiling": max(by_bytes, by_flops) / found["weft_s"],
        **found,
    }
