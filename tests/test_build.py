"""What the build promises: code for one instruction set stays in its target, and one OpenMP."""

from __future__ import annotations

import subprocess
from pathlib import Path
from platform import machine

import pytest
import torch

import weft

ROOT = Path(__file__).resolve().parent.parent
X86_TARGETS = ["avx2", "avx512"] if machine() in ("x86_64", "AMD64") else []
OBJECTS = ROOT / "build" / "kernels" / "CMakeFiles"


def _symbols(target: str) -> list[tuple[str, str]]:
    """(type, demangled name) of every symbol that the objects of a CPU target define."""
    objects = sorted((OBJECTS / f"weft_{target}.dir").glob("**/*.o"))
    assert objects, (
        f"no objects of target {target} in {OBJECTS}: build the kernels first (`make build`), "
        "in the source folder that these tests lie in"
    )
    listing = subprocess.run(
        ["nm", "--demangle", "--defined-only", *map(str, objects)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    fields = [line.split(maxsplit=2) for line in listing.splitlines()]
    return [(kind, name) for _, kind, name in (f for f in fields if len(f) == 3)]


@pytest.mark.parametrize("target", ["baseline", *X86_TARGETS])
def test_a_target_leaks_no_code(target: str) -> None:
    """The linker keeps one of several weak functions of a name, whatever ISA it was compiled for.

    So an object built for one instruction set may define nothing that another could pick up: each
    global symbol is in the target's own namespace. DW.ref.* is data, pointers of the exception
    tables that are equal in all objects.
    """
    own = (f"weft::{target}::", "DW.ref.")
    shared = [
        f"{kind} {name}"
        for kind, name in _symbols(target)
        if (kind.isupper() or kind in "uvw") and not any(part in name for part in own)
    ]
    assert not shared, "defined outside weft::" + target + ": " + ", ".join(sorted(set(shared)))


def test_the_targets_are_not_empty() -> None:
    tables = [name for kind, name in _symbols("baseline") if name.endswith("_kernels")]
    assert "weft::baseline::pool_kernels" in tables


def test_one_openmp_runtime() -> None:
    """weft's kernels and torch share one pool of threads."""
    mapped = Path("/proc/self/maps").read_text().split()
    runtimes = {Path(path).resolve() for path in mapped if "/libgomp" in path or "/libiomp" in path}
    assert len(runtimes) == 1, runtimes


def test_every_op_is_there_for_both_devices() -> None:
    assert weft.functional  # imported, so the ops are registered
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("weft::")]
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    missing = [f"{n} on {key}" for n in names for key in ("CPU", "CUDA") if not has(n, key)]
    assert names
    assert not missing, missing
