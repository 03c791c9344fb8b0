"""Proves a CUDA build of weft without a GPU: it imports, and every op is there for CUDA."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

import weft.functional
import weft.testing
from weft import _C


def check_build() -> None:
    assert _C.with_cuda, "weft was built without CUDA"
    assert not _C.with_host_execution
    assert _C.cuda_architectures


def check_ops() -> list[str]:
    names = sorted(n for n in torch._C._dispatch_get_all_op_names() if n.startswith("weft::"))
    assert names
    for name in names:
        for key in ("CPU", "CUDA"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key), f"{name}: no {key}"
    return names


def check_one_runtime() -> str:
    """weft uses the CUDA runtime that torch loaded, and brings none of its own."""
    mapped = Path("/proc/self/maps").read_text().split()
    loaded = {path for path in mapped if "libcudart" in path}
    assert len(loaded) == 1, f"expected one CUDA runtime, got {loaded or 'none'}"
    assert b"cudaErrorInsufficientDriver" not in Path(_C.__file__).read_bytes(), (
        "the extension holds a CUDA runtime of its own"
    )
    return loaded.pop()


def check_cpu_tensors() -> None:
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(weft.functional.max_pool2d(x, 2), torch.nn.functional.max_pool2d(x, 2))


def message_of(call: Callable[[], object]) -> str:
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return ""


def check_errors() -> None:
    """Without a GPU, a clear sentence and not a crash."""
    told = message_of(lambda: weft.functional.max_pool2d(torch.ones(1, 1, 4, 4).cuda(), 2))
    assert torch.cuda.is_available() or "NVIDIA driver" in told, told
    told = message_of(lambda: weft.testing.host_execution().__enter__())
    assert "build with WEFT_HOST_EXECUTION=1" in told, told


if __name__ == "__main__":
    check_build()
    ops = check_ops()
    runtime = check_one_runtime()
    check_cpu_tensors()
    check_errors()
    print(f"weft for CUDA {_C.cuda_architectures}: {len(ops)} ops, runtime {runtime}")
