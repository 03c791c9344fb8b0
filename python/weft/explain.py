"""What a call would run: the path of each weft op, its tile, its traffic and what bounds it."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from weft import _C

# Operations a byte from which on arithmetic counts, where no ceilings are given: every current CPU
# and GPU waits for memory below it.
_BALANCE = 8.0


class Ceilings(Protocol):
    """What a device can do at most; `weft.bench.measure.Ceilings` measures it."""

    def bytes_per_second(self) -> float: ...
    def flops_per_second(self, dtype: torch.dtype) -> float: ...


@dataclass(frozen=True)
class PlannedLaunch:
    """One kernel launch of one weft op, or `launches` alike, such as the steps of a sequence.

    Bytes and operations are of all of them. `threads` are a block's; on CPU, where `blocks` is 0,
    as many as the work is worth, or 0 where the plan leaves that open.
    `kernel` is None for an op whose family has no plans yet: its bytes are then those of its
    operands, and its operations are not known.
    """

    op: str
    phase: Literal["forward", "backward"]
    dtype: torch.dtype
    kernel: str | None
    path: str
    tile: dict[str, int] = field(default_factory=dict)
    blocks: int = 0  # 0: not a CUDA launch
    threads: int = 0
    launches: int = 1
    shared_bytes: int = 0
    bytes: int = 0
    least_bytes: int = 0
    flops: int | None = None
    bound: Literal["memory", "arithmetic"] | None = None
    seconds: float | None = None  # that the ceilings allow at best


class Explanation(list[PlannedLaunch]):
    """The launches in the order in which they would run; `print` shows them as a table."""

    def __init__(self, target: str) -> None:
        super().__init__()
        self.target = target

    def table(self) -> Table:
        """The launches as a `rich` table."""
        timed = any(launch.seconds is not None for launch in self)
        table = Table(title=f"weft on {self.target}")
        for name in ("op", "kernel", "path", "tile"):
            table.add_column(name, overflow="fold")
        for name in ("launches", "blocks", "threads", "shared", "MB", "of least", "MFLOP"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("bound")
        if timed:
            table.add_column("at best", justify="right", no_wrap=True)
        for launch in self:
            cells = [
                launch.op,
                launch.kernel or "no plan",
                launch.path,
                " ".join(f"{axis}{extent}" for axis, extent in launch.tile.items() if extent > 1),
                str(launch.launches),
                str(launch.blocks or ""),
                str(launch.threads or ""),
                f"{launch.shared_bytes / 1024:.0f} KiB" if launch.shared_bytes else "",
                f"{launch.bytes / 1e6:.3f}",
                f"{launch.bytes / max(launch.least_bytes, 1):.2f}",
                "unknown" if launch.flops is None else f"{launch.flops / 1e6:.3f}",
                launch.bound or "unknown",
            ]
            if timed:
                cells.append("" if launch.seconds is None else f"{launch.seconds * 1e6:.1f} µs")
            table.add_row(*cells)
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=160).print(self.table())
        return text.getvalue()


class _Watch(TorchDispatchMode):
    """Asks each weft op that runs under it for its plans, and lets it run."""

    def __init__(self, explanation: Explanation, ceilings: Ceilings | None) -> None:
        super().__init__()
        self.phase: Literal["forward", "backward"] = "forward"
        self._explanation = explanation
        self._ceilings = ceilings

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace != "weft":
            return func(*args, **kwargs)
        name = func._schema.name.removeprefix("weft::")
        if name in _C.planned_ops():  # first of all: it has the better words for bad arguments
            self._explanation.extend(self._planned(name, func, args, kwargs))
            return func(*args, **kwargs)
        outputs = func(*args, **kwargs)
        operands = _tensors((args, kwargs, outputs))
        moved = sum(t.numel() * t.element_size() for t in operands)
        self._explanation.append(
            PlannedLaunch(
                name, self.phase, _dtype(operands), None, "", bytes=moved, least_bytes=moved
            )
        )
        return outputs

    def _planned(self, name: str, func: Any, args: tuple, kwargs: dict) -> Iterator[PlannedLaunch]:
        dtype = _dtype(_tensors((args, kwargs)))
        meta_args, meta_kwargs = tree_map(_meta, (args, kwargs))
        # The op's own code, given tensors without memory: it checks, plans, and runs nothing.
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
        call = partial(func.redispatch, keys, *meta_args, **meta_kwargs)
        for plan in _C.plans_of(self._explanation.target, call):
            bound, seconds = self._bound(plan["bytes"], plan["flops"], dtype)
            yield PlannedLaunch(name, self.phase, dtype, **plan, bound=bound, seconds=seconds)

    def _bound(
        self, moved: int, flops: int, dtype: torch.dtype
    ) -> tuple[Literal["memory", "arithmetic"], float | None]:
        if self._ceilings is None:
            return "memory" if flops < _BALANCE * moved else "arithmetic", None
        by_bytes = moved / self._ceilings.bytes_per_second()
        by_flops = flops / self._ceilings.flops_per_second(dtype)
        return "memory" if by_bytes >= by_flops else "arithmetic", max(by_bytes, by_flops)


def _meta(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _dtype(operands: list[Tensor]) -> torch.dtype:
    """Of the first floating tensor."""
    return next((t.dtype for t in operands if t.is_floating_point()), torch.float32)


def _tensors(value: Any) -> list[Tensor]:
    return [t for t in tree_leaves(value) if isinstance(t, Tensor)]


def explain(
    function: Callable[..., Any],
    *args: Any,
    backward: bool = False,
    target: str | None = None,
    ceilings: Ceilings | None = None,
    **kwargs: Any,
) -> Explanation:
    """What ``function(*args, **kwargs)`` would run, without running it.

    The call is traced on tensors that have shapes and no values, so it costs no memory and works
    for problems that this machine could not hold. Every weft op that it reaches is asked for its
    launch plan: kernel, path, tile, threads, shared memory, expected bytes (and how many times the
    least that is), operations, and which of memory and arithmetic bounds it.

    Args:
        function: a module or a function of tensors.
        backward: also explain the backward of the sum of its outputs, for every floating tensor
            that requires a gradient (arguments, and a module's parameters).
        target: ``"cuda"``, or a CPU's instruction set (``"avx512"``, ``"avx2"``, ``"baseline"``);
            default: what would run ``args``. ``"cuda"`` needs no GPU.
        ceilings: what the device can do at most, in bytes/s and FLOP/s, such as
            `weft.bench.measure.Ceilings`; gives each launch the time it takes at best. Without,
            launches of fewer than 8 operations a byte count as bound by memory.

    Returns:
        The launches, in order; ``print`` it for a table. Ops of a family without plans are listed
        as "no plan" with the bytes of their operands.

    Raises:
        ValueError: for a target that weft does not know.
    """
    parameters = list(function.parameters()) if isinstance(function, torch.nn.Module) else []
    given = _tensors((args, kwargs))
    if target is None:
        on_gpu = any(t.is_cuda for t in (*given, *parameters))
        target = "cuda" if on_gpu else "cuda-on-host" if _C.host_execution() else _C.cpu_target()
    _C.plans_of(target, lambda: None)  # an unknown target is an error even where nothing runs
    explanation = Explanation(target)
    watch = _Watch(explanation, ceilings)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:

        def without_values(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return fake.from_tensor(value.detach()).requires_grad_(value.requires_grad)

        fake_args, fake_kwargs = tree_map(without_values, (args, kwargs))
        with watch:
            outputs = function(*fake_args, **fake_kwargs)
            leaves = (*_tensors((fake_args, fake_kwargs)), *parameters)
            sources = [t for t in leaves if t.requires_grad]
            ends = [t for t in _tensors(outputs) if t.requires_grad]
            if backward and sources and ends:
                watch.phase = "backward"
                seeds = [torch.ones_like(t) for t in ends]
                torch.autograd.grad(ends, sources, seeds, allow_unused=True)
    return explanation
