"""Instruments for tests: CUDA kernels executed on the CPU, and the choice of CPU kernels."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from weft import _C

if hasattr(torch.ops.weft, "device_selftest"):

    @torch.library.register_fake("weft::device_selftest")
    def _(input: torch.Tensor, word: str) -> torch.Tensor:
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


_lock = threading.Lock()
_open_blocks = 0


@contextmanager
def host_execution() -> Iterator[HostRun]:
    """Runs every weft op on CPU tensors through the CUDA kernels' own source.

    Process-wide; blocks may nest and overlap. Strict: see "Host execution" in CONTRIBUTING.md. A
    fault of a kernel is a RuntimeError that names the kernel, the block and the threads.

    Raises:
        RuntimeError: if weft was built without `WEFT_HOST_EXECUTION=1`.
    """
    global _open_blocks
    with _lock:
        _C.set_host_execution(True)
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
