"""Instruments for tests: CUDA kernels executed on the CPU, and the choice of CPU kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from weft import _C


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
    """The launches made so far inside a `host_execution` block."""

    @property
    def launches(self) -> list[Launch]:
        return [Launch(**report) for report in _C.launch_reports()]


@contextmanager
def host_execution() -> Iterator[HostRun]:
    """Runs every weft op on CPU tensors through the CUDA kernels' own source.

    Process-wide. Strict: see "Host execution" in CONTRIBUTING.md. A fault of a kernel is a
    RuntimeError that names the kernel, the block and the threads.

    Raises:
        RuntimeError: if weft was built without `WEFT_HOST_EXECUTION=1`.
    """
    before = _C.host_execution()
    _C.set_host_execution(True)
    _C.clear_launch_reports()
    try:
        yield HostRun()
    finally:
        _C.set_host_execution(before)


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
