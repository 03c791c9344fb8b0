"""Facts about this machine and this build, for `info`, `check` and every benchmark result."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch

import weft
from weft import _C

_DEFAULT_CACHE_BYTES = 64 << 20


def _first_line(path: str, key: str) -> str | None:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), None)


def memory_bytes() -> int:
    """Bytes of main memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cores() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def cache_bytes(device: torch.device) -> int:
    """Bytes of the device's last-level cache: all level-3 caches together, or the GPU's level 2."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = {}
    for cache_dir in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index3"):
        try:
            kibibytes = int((cache_dir / "size").read_text().strip().removesuffix("K"))
            sizes[(cache_dir / "shared_cpu_list").read_text()] = kibibytes << 10
        except (OSError, ValueError):
            continue
    return sum(sizes.values()) or _DEFAULT_CACHE_BYTES


def cuda_devices() -> list[str]:
    """One line for each GPU that torch sees."""
    lines = []
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        lines.append(f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory >> 30} GiB")
    return lines


def devices() -> list[torch.device]:
    """The devices on which this build of weft runs here."""
    cuda = _C.with_cuda and torch.cuda.is_available()
    return [torch.device("cpu"), *([torch.device("cuda")] if cuda else [])]


def commit() -> str | None:
    """The git commit of weft's source folder; None for an installed copy. "+" marks changes."""
    here = Path(__file__).resolve().parent

    def git(*args: str) -> str:
        command = ["git", "-C", str(here), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def machine() -> dict[str, Any]:
    """What a time depends on."""
    return {
        "cpu": _first_line("/proc/cpuinfo", "model name") or platform.processor() or "unknown",
        "architecture": platform.machine(),
        "cores": cores(),
        "cache_bytes": cache_bytes(torch.device("cpu")),
        "memory_bytes": memory_bytes(),
        "instruction_set": _C.cpu_target(),
        "gpus": cuda_devices(),
        "system": platform.platform(),
    }


def versions() -> dict[str, Any]:
    """What was built, and with what."""
    return {
        "weft": weft.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compiler": _C.compiler,
        "cuda": torch.version.cuda,
        "commit": commit(),
    }
