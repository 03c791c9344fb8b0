"""`python -m weft check`: what weft promises of its numbers, tried on this machine.

Every op, on every device that is here, with the kernels that it runs there:

- values, gradients: the error against float64 is at most 1.5 times PyTorch's own on the same input
  (or 1 ulp), in each dtype;
- gradcheck, gradgradcheck: first and second derivatives against differences, in float64;
- repeat: two runs give the same bits; threads: so do other numbers of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

import weft.functional
from weft import _C, facts, reference, testing
from weft.bench.report import console, progress_bar
from weft.rnn_layer import rnn_layer

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
CHECKS = ("values", "gradients", "gradcheck", "gradgradcheck", "repeat", "threads")


@dataclass(frozen=True)
class Problem:
    """Sizes of the tensor arguments, and the other arguments."""

    sizes: tuple[tuple[int, ...], ...]
    options: dict[str, Any] = field(default_factory=dict)
    channels_last: bool = False


@dataclass(frozen=True)
class Subject:
    """One op: its name in `weft.functional`, PyTorch's own, and problems for it.

    `problems` serve values, gradients and bits; the small `derivative_problems` are differentiated
    numerically. The last `parameters` tensors are a layer's; `pack` makes arguments of tensors.
    """

    family: str
    name: str
    native: Callable[..., Any]
    problems: tuple[Problem, ...]
    derivative_problems: tuple[Problem, ...]
    parameters: int = 0
    pack: Callable[..., tuple] = lambda *tensors: tensors

    def weft(self, *tensors: Tensor, **options: Any) -> Any:
        # Looked up at each call, so that a test can plant a fault.
        return getattr(weft.functional, self.name)(*self.pack(*tensors), **options)

    def torch(self, *tensors: Tensor, **options: Any) -> Any:
        return self.native(*self.pack(*tensors), **options)


@dataclass(frozen=True)
class Outcome:
    """What one check of one op on one device found; `detail` says what went wrong."""

    family: str
    op: str
    device: str
    check: str
    detail: str = ""

    @property
    def passed(self) -> bool:
        return not self.detail


# ---- problems ------------------------------------------------------------------------------------


def _pool(kind: str, rank: int) -> Subject:
    def problem(
        batch: tuple[int, ...], extents: tuple[int, ...], last: bool = False, **options: Any
    ) -> Problem:
        per_axis = {k: v[-rank:] if isinstance(v, tuple) else v for k, v in options.items()}
        return Problem(((*batch, *extents[-rank:]),), per_axis, last)

    special = {
        "max_pool": {"dilation": (1, 2, 3)},
        "avg_pool": {"divisor_override": 3} if rank > 1 else {"count_include_pad": False},
    }
    if kind.startswith("adaptive"):
        problems = [
            problem((3, 5), (6, 17, 23), output_size=(2, 7, 5)),
            problem((2, 19), (5, 14, 12), True, output_size=(5, 3, 7)),
            problem((2, 8), (4, 20, 21), output_size=1),
            problem((15,), (3, 9, 33), output_size=(4, 1, 40)),
        ]
        small = [
            problem((1, 2), (2, 3, 4), output_size=(1, 2, 3)),
            problem((1, 2), (2, 3, 3), True, output_size=(3, 2, 2)),
        ]
    else:
        extra = special[kind]
        problems = [
            problem((3, 5), (6, 17, 23), kernel_size=3, stride=2, padding=1),
            problem((2, 19), (5, 14, 12), True, kernel_size=2, ceil_mode=True),
            problem((2, 8), (7, 20, 21), kernel_size=7, stride=1, padding=3),
            problem((4,), (3, 15, 33), kernel_size=(1, 2, 5), stride=(2, 3, 1), **extra),
        ]
        small = [
            problem((1, 1), (2, 3, 4), kernel_size=3, stride=2, padding=1),
            problem((1, 2), (2, 3, 4), True, kernel_size=2, stride=1, **extra),
        ]
    name = f"{kind}{rank}d"
    return Subject("pool", name, _native_pool(name), tuple(problems), tuple(small))


def _native_pool(name: str) -> Callable[..., Any]:
    native = getattr(F, name)
    if name != "avg_pool3d":
        return native

    def widened(x: Tensor, **options: Any) -> Tensor:
        """torch has no half types here on CPU."""
        half = x.dtype in (torch.bfloat16, torch.float16) and x.device.type == "cpu"
        return native(x.float() if half else x, **options).to(x.dtype)

    return widened


def _boxes(x: Tensor) -> Tensor:
    """Of the first and the last image of [N, C, H, W]: the whole map, a part, one over its edge."""
    n, _, h, w = x.shape
    return torch.tensor(
        [
            [0.0, 0, 0, w - 1, h - 1],
            [n - 1, 1, 0, w // 2 + 1, h // 2],
            [n - 1, w // 2, h // 3, w + 3, h + 1],
        ],
        device=x.device,
    )


def _roi_pool() -> Subject:
    maximum = {"output_size": (3, 2), "mode": "max"}
    mean = {"output_size": 2, "mode": "mean"}
    return Subject(
        "pool",
        "roi_pool",
        reference.roi_pool,
        (Problem(((3, 5, 11, 14),), maximum), Problem(((2, 19, 12, 9),), mean, True)),
        (Problem(((2, 2, 3, 4),), maximum), Problem(((1, 3, 4, 3),), mean, True)),
        pack=lambda x: (x, _boxes(x)),
    )


def _pyramid() -> Subject:
    return Subject(
        "pool",
        "spatial_pyramid_pool2d",
        reference.spatial_pyramid_pool2d,
        (Problem(((3, 5, 11, 14),)), Problem(((2, 19, 12, 9),), {}, True)),
        (Problem(((2, 2, 3, 4),)),),
        pack=lambda x: (x, (1, 2), "max", _boxes(x)),
    )


def _channel_pool() -> Subject:
    return Subject(
        "pool",
        "channel_pool",
        reference.channel_pool,
        (
            Problem(((3, 12, 11, 14),), {"kernel_size": 3}),
            Problem(((2, 20, 7, 9),), {"kernel_size": 4, "mode": "mean"}, True),
            Problem(((5, 31),), {"kernel_size": 3, "stride": 2, "ceil_mode": True}),
        ),
        (
            Problem(((2, 4, 3),), {"kernel_size": 2}),
            Problem(((1, 6, 2, 3),), {"kernel_size": 3, "mode": "mean"}, True),
        ),
    )


def _weighted_avg_pool() -> Subject:
    def problem(n: int, c: int, h: int, w: int, last: bool = False, **window: int) -> Problem:
        return Problem(((n, c, h, w), (c,), (c,)), {"kernel_size": 2, **window}, last)

    return Subject(
        "pool",
        "weighted_avg_pool2d",
        reference.weighted_avg_pool2d,
        (problem(3, 6, 14, 15), problem(2, 19, 9, 11, True, stride=1, padding=1)),
        (problem(1, 2, 4, 3), problem(2, 3, 2, 4, True)),
        parameters=2,
    )


def _conv(rank: int, transposed: bool) -> Subject:
    name = f"conv{'_transpose' if transposed else ''}{rank}d"

    def problem(
        batch: int,
        c: int,
        extents: tuple[int, ...],
        k: int,
        window: tuple[int, ...],
        last: bool = False,
        **options: Any,
    ) -> Problem:
        """Of the last `rank` extents, and the window of as many."""
        groups = options.get("groups", 1)
        inner, outer = (k // groups, c) if transposed else (c // groups, k)
        sizes = ((batch, c, *extents[-rank:]), (outer, inner, *window[-rank:]), (k,))
        per_axis = {n: v[-rank:] if isinstance(v, tuple) else v for n, v in options.items()}
        return Problem(sizes, per_axis, last)

    return Subject(
        "conv",
        name,
        getattr(F, name),
        (
            problem(2, 16, (3, 14, 15), 24, (3, 3, 3), padding=1),
            problem(2, 17, (3, 9, 12), 9, (1, 3, 5), True, stride=2, padding=(0, 1, 2)),
            problem(2, 24, (2, 16, 17), 24, (2, 5, 5), padding=(1, 2, 2), groups=24),
            problem(2, 12, (3, 9, 15), 18, (2, 3, 3), dilation=(1, 2, 2), groups=3),
        ),
        (
            problem(2, 2, (2, 3, 5), 3, (2, 3, 2), stride=2, padding=1),
            problem(1, 4, (2, 3, 4), 4, (1, 2, 2), True, groups=2, dilation=(1, 1, 2)),
        ),
        parameters=2,
    )


def _cell(name: str, native: Callable[..., Any], gates: int, states: int) -> Subject:
    def problem(batch: int, inputs: int, hidden: int) -> Problem:
        weights = [(gates * hidden, inputs), (gates * hidden, hidden), *2 * [(gates * hidden,)]]
        return Problem(((batch, inputs), *states * [(batch, hidden)], *weights))

    def pack(x: Tensor, *rest: Tensor) -> tuple:
        state = rest[:states] if states > 1 else rest[0]
        return x, state, *rest[states:]

    return Subject(
        "rnn",
        name,
        native,
        (problem(5, 24, 33), problem(1, 64, 64), problem(16, 128, 96)),
        (problem(2, 3, 2), problem(1, 2, 3)),
        parameters=4,
        pack=pack,
    )


@dataclass(frozen=True)
class LayerSubject(Subject):
    """A recurrent layer: `weft.rnn_layer` in the place of a function of `weft.functional`."""

    def weft(self, *tensors: Tensor, **options: Any) -> Any:
        x, state, *weights = self.pack(*tensors)
        cell = "rnn_tanh" if self.name == "rnn" else self.name
        output, final = rnn_layer(cell, x, state, *weights, **options)
        return output, *final

    def torch(self, *tensors: Tensor, **options: Any) -> Any:
        """torch's cell, step by step: its layers have no half types here, and no lengths."""
        x, state, *weights = self.pack(*tensors)
        outputs = []
        for step in x:
            found = self.native(step, state if len(state) == 2 else state[0], *weights)
            state = found if len(state) == 2 else (found,)
            outputs.append(state[0])
        return torch.stack(outputs), *state


def _layer(name: str, native: Callable[..., Any], gates: int, states: int) -> LayerSubject:
    def problem(steps: int, batch: int, inputs: int, hidden: int) -> Problem:
        weights = [(gates * hidden, inputs), (gates * hidden, hidden), *2 * [(gates * hidden,)]]
        return Problem(((steps, batch, inputs), *states * [(batch, hidden)], *weights))

    return LayerSubject(
        "rnn",
        name,
        native,
        (problem(25, 5, 24, 33), problem(20, 1, 40, 64), problem(12, 20, 40, 96)),
        (problem(3, 2, 3, 2), problem(2, 1, 2, 3)),
        parameters=4,
        pack=lambda x, *rest: (x, rest[:states], *rest[states:]),
    )


def _grid(height: int, width: int, batch: int, inputs: int, hidden: int) -> Problem:
    rows = 5 * hidden
    weights = [(rows, inputs), (rows, hidden), (rows, hidden), (rows,)]
    return Problem(((height, width, batch, inputs), *weights))


SUBJECTS: tuple[Subject, ...] = (
    *(
        _pool(kind, rank)
        for kind in ("max_pool", "avg_pool", "adaptive_max_pool", "adaptive_avg_pool")
        for rank in (1, 2, 3)
    ),
    _channel_pool(),
    _weighted_avg_pool(),
    _roi_pool(),
    _pyramid(),
    *(_conv(rank, transposed) for transposed in (False, True) for rank in (1, 2, 3)),
    _cell("lstm_cell", torch.lstm_cell, 4, 2),
    _cell("gru_cell", torch.gru_cell, 3, 1),
    _cell("rnn_cell", torch.rnn_tanh_cell, 1, 1),
    _layer("lstm", torch.lstm_cell, 4, 2),
    _layer("gru", torch.gru_cell, 3, 1),
    _layer("rnn", torch.rnn_tanh_cell, 1, 1),
    Subject(
        "rnn",
        "mdlstm2d",
        reference.mdlstm2d,
        (_grid(3, 4, 5, 6, 33), _grid(1, 6, 2, 8, 64), _grid(5, 1, 20, 8, 16)),
        (_grid(2, 3, 2, 3, 2), _grid(1, 2, 1, 2, 3)),
        parameters=4,
    ),
)


def _tensors(
    subject: Subject, problem: Problem, device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    """The tensor arguments, the same in each run.

    Values lie in [-2, 2]; parameters are scaled as layers initialise them, so that gates do not
    saturate.
    """
    generator = torch.Generator().manual_seed(20)
    tensors = []
    for index, size in enumerate(problem.sizes):
        # Distinct values: a maximum among equals has no derivative.
        elements = torch.Size(size).numel()
        values = torch.randperm(elements, generator=generator).double().reshape(size)
        values = values * (4 / max(elements - 1, 1)) - 2
        if index >= len(problem.sizes) - subject.parameters:
            values /= max(torch.Size(size[1:]).numel(), 4) ** 0.5
        values = values.to(device, dtype)
        if problem.channels_last and values.dim() in _CHANNELS_LAST:
            values = values.contiguous(memory_format=_CHANNELS_LAST[values.dim()])
        tensors.append(values)
    return tensors


# ---- checks --------------------------------------------------------------------------------------


def _accuracy(subject: Subject, device: torch.device, gradients: bool) -> None:
    for problem in subject.problems:
        for dtype in DTYPES:
            inputs = _tensors(subject, problem, device, dtype)
            inputs = [t.requires_grad_(gradients) for t in inputs]
            try:
                testing.check_against_native(
                    subject.weft, subject.torch, *inputs, **problem.options
                )
            except AssertionError as error:
                raise AssertionError(f"{dtype}, {problem}: {error}") from error


def _numerical(subject: Subject, device: torch.device, check: Callable[..., bool]) -> None:
    for problem in subject.derivative_problems:
        inputs = _tensors(subject, problem, device, torch.float64)
        check(partial(subject.weft, **problem.options), [t.requires_grad_() for t in inputs])


def _results(subject: Subject, problem: Problem, device: torch.device) -> list[Tensor]:
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [t.requires_grad_() for t in _tensors(subject, problem, device, dtype)]
        outputs = subject.weft(*inputs, **problem.options)
        outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
        # The gradient of an output is the output itself: as good as any, and the same in each run.
        results += [*outputs, *torch.autograd.grad(outputs, inputs, [t.detach() for t in outputs])]
    return results


def _same_bits(subject: Subject, device: torch.device, threads: Sequence[int]) -> None:
    for problem in subject.problems:
        testing.check_deterministic(partial(_results, subject, problem, device), threads)


def _run_check(check: str, subject: Subject, device: torch.device) -> None:
    match check:
        case "values":
            _accuracy(subject, device, gradients=False)
        case "gradients":
            _accuracy(subject, device, gradients=True)
        case "gradcheck":
            _numerical(subject, device, torch.autograd.gradcheck)
        case "gradgradcheck":
            _numerical(subject, device, torch.autograd.gradgradcheck)
        case "repeat":
            _same_bits(subject, device, ())
        case "threads":
            _same_bits(subject, device, (1, 2, 3))


def _outcome(check: str, subject: Subject, device: torch.device) -> Outcome:
    detail = ""
    try:
        with torch.random.fork_rng():
            torch.manual_seed(20)
            _run_check(check, subject, device)
    # Whatever an op does wrong is a finding; the other checks still run.
    except Exception as error:
        detail = str(error).strip() or type(error).__name__
    return Outcome(subject.family, subject.name, device.type, check, detail)


def run(family: str | None = None) -> list[Outcome]:
    """Checks every op of `family` (default: of all) on every device of this machine."""
    outcomes = []
    subjects = [s for s in SUBJECTS if family in (None, s.family)]
    tasks = [(s, device) for s in subjects for device in facts.devices()]
    # float32 in full: where TF32 is allowed, PyTorch may or may not take it, problem by problem.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), progress_bar() as progress:
        bar = progress.add_task("", total=len(tasks))
        for subject, device in tasks:
            progress.update(bar, description=f"{subject.name} on {device}")
            # The number of threads is the CPU's.
            checks = CHECKS if device.type == "cpu" else CHECKS[:-1]
            outcomes += [_outcome(check, subject, device) for check in checks]
            progress.advance(bar)
    return outcomes


def show(outcomes: Sequence[Outcome]) -> None:
    """Prints a table of ops and checks, then what went wrong in full."""
    out = console()
    table = Table(
        title=f"weft on this machine, {_C.cpu_target()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}"
    )
    for name in ("family", "op", "device", *CHECKS):
        table.add_column(name)
    cells = {(o.family, o.op, o.device): dict.fromkeys(CHECKS, "") for o in outcomes}
    for o in outcomes:
        cells[o.family, o.op, o.device][o.check] = (
            "[green]pass[/green]" if o.passed else "[red]FAIL[/red]"
        )
    for key, row in cells.items():
        table.add_row(*key, *row.values())
    out.print(table)
    failed = [o for o in outcomes if not o.passed]
    for o in failed:
        out.print(f"{o.op} on {o.device}, {o.check}: {o.detail}", style="red", markup=False)
    out.print(f"{len(outcomes) - len(failed)} checks passed, {len(failed)} failed")
