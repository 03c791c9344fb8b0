"""What each CUDA kernel costs on each architecture, from the compiler's own notes.

    python benchmarks/kernel_report.py build/kernels-cuda [--json FILE]

Reads the `*.resources` files that CMake leaves beside the CUDA objects (`ptxas --resource-usage`):
registers, spills, stack and static shared memory. Occupancy is the share of an SM's threads that
registers and static shared memory allow, at the largest block size that the source names;
dynamic shared memory is chosen at launch and not in it.
Needs neither torch nor a GPU. Exits with 1 where a kernel that the sources mark WEFT_HOT spills.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent

# Threads and blocks that one SM holds (CUDA C++ Programming Guide, compute capabilities); every one
# of these has 65536 registers, given to a warp in units of 256.
_SM_THREADS = {75: 1024, 86: 1536, 87: 1536, 89: 1536, 120: 1536}
_SM_BLOCKS = {75: 16, 80: 32, 86: 16, 87: 16, 89: 24, 90: 32, 100: 32, 120: 24}
_SM_SHARED = {75: 64, 80: 164, 86: 100, 87: 164, 89: 100, 90: 228, 100: 228, 120: 100}
_REGISTERS = 65536
_WARP_REGISTER_UNIT = 256


@dataclass(frozen=True)
class KernelCost:
    """One kernel compiled for one architecture. Spills, stack and shared memory in bytes."""

    source: str
    kernel: str
    architecture: str
    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    static_shared: int
    dynamic_shared: bool
    hot: bool
    threads: int
    occupancy: float

    @property
    def spills(self) -> int:
        return self.spill_stores + self.spill_loads


# ---- the compiler's notes ------------------------------------------------------------------------

_ENTRY = re.compile(r"Compiling entry function '(?P<name>\S+)' for '(?P<architecture>sm_\w+)'")
_FRAME = re.compile(
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads"
)
_USED = re.compile(r"Used (?P<registers>\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass
class Note:
    """What ptxas says of one kernel for one architecture."""

    mangled: str
    architecture: str
    stack: int = 0
    stores: int = 0
    loads: int = 0
    registers: int = 0
    shared: int = 0


def parse(text: str) -> list[Note]:
    """One note per kernel and architecture of `ptxas --resource-usage`."""
    notes: list[Note] = []
    open_note: Note | None = None
    for line in text.splitlines():
        if entry := _ENTRY.search(line):
            open_note = Note(entry["name"], entry["architecture"])
        elif open_note is None:
            continue
        elif frame := _FRAME.search(line):
            open_note.stack = int(frame["stack"])
            open_note.stores = int(frame["stores"])
            open_note.loads = int(frame["loads"])
        elif used := _USED.search(line):
            open_note.registers = int(used["registers"])
            shared = _SHARED.search(line)
            open_note.shared = int(shared[1]) if shared else 0
            notes.append(open_note)
            open_note = None
    return notes


def demangle(names: Iterable[str]) -> dict[str, str]:
    """Readable kernel names; without c++filt, the mangled ones."""
    unique = sorted(set(names))
    tool = shutil.which("c++filt") or shutil.which("cu++filt") or shutil.which("llvm-cxxfilt")
    if tool is None or not unique:
        return {name: name for name in unique}
    lines = subprocess.run(
        [tool], input="\n".join(unique), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return {name: readable(line) for name, line in zip(unique, lines, strict=True)}


def readable(signature: str) -> str:
    """`void weft::cuda::(anonymous namespace)::f<weft::bf16>(...)` as `f<bf16>`."""
    text = re.sub(
        r"\(anonymous namespace\)::|_GLOBAL__N__\w+::|_NV_ANON_NAMESPACE::", "", signature
    )
    text = re.sub(r"\b(?:weft|cuda|device)::", "", text).replace("> >", ">>")
    text = re.sub(r"\((\w+(?: \w+)*)\)(?=-?\d)", "", text)  # (int)4 as a template argument
    depth = 0
    for end, letter in enumerate(text):  # up to the parameter list
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0:
            text = text[:end]
            break
    return text.removeprefix("void ").replace("unsigned ", "u").strip()


# ---- the sources ---------------------------------------------------------------------------------

_KERNEL = re.compile(r"WEFT_GLOBAL\s+(?P<hot>WEFT_HOT\s+)?void\s+(?P<name>\w+)\s*\(")
_THREADS = re.compile(r"constexpr int k\w*Threads\w*\s*=\s*(\d+)\s*;")


@dataclass(frozen=True)
class Source:
    """What a source says of its kernels: which are hot, which take shared memory; block size."""

    hot: frozenset[str]
    dynamic_shared: frozenset[str]
    threads: int


def read_source(text: str) -> Source:
    kernels = list(_KERNEL.finditer(text))
    ends = [*(kernel.start() for kernel in kernels), len(text)][1:]
    return Source(
        hot=frozenset(kernel["name"] for kernel in kernels if kernel["hot"]),
        dynamic_shared=frozenset(
            kernel["name"]
            for kernel, end in zip(kernels, ends, strict=True)
            if "SharedMemory" in text[kernel.end() : end]
        ),
        threads=max(map(int, _THREADS.findall(text)), default=256),
    )


def occupancy(architecture: str, registers: int, threads: int, static_shared: int) -> float:
    """The share of an SM's threads that can be resident."""
    generation = int(re.sub(r"\D", "", architecture))
    most_threads = _SM_THREADS.get(generation, 2048)
    warps = -(-threads // 32)
    per_warp = -(-max(registers, 1) * 32 // _WARP_REGISTER_UNIT) * _WARP_REGISTER_UNIT
    blocks = min(
        most_threads // (warps * 32),
        _SM_BLOCKS.get(generation, 32),
        _REGISTERS // per_warp // warps,
    )
    if static_shared:
        blocks = min(blocks, _SM_SHARED.get(generation, 100) * 1024 // (static_shared + 1024))
    return blocks * warps * 32 / most_threads


# ---- the report ----------------------------------------------------------------------------------


def collect(build: Path, sources: Path) -> list[KernelCost]:
    """Every kernel of a build, sorted by source, name and architecture."""
    texts = {path.stem: path.read_text() for path in sources.glob("*/*.cu")}
    rows = []
    for file in sorted(build.glob("**/*.resources")):
        stem = file.name.split(".")[0]
        source = read_source(texts.get(stem, ""))
        notes = parse(file.read_text())
        names = demangle(note.mangled for note in notes)
        for note in notes:
            name = names[note.mangled]
            plain = name.split("<")[0]
            rows.append(
                KernelCost(
                    source=f"{stem}.cu",
                    kernel=name,
                    architecture=note.architecture,
                    registers=note.registers,
                    spill_stores=note.stores,
                    spill_loads=note.loads,
                    stack=note.stack,
                    static_shared=note.shared,
                    dynamic_shared=plain in source.dynamic_shared,
                    hot=plain in source.hot,
                    threads=source.threads,
                    occupancy=occupancy(
                        note.architecture, note.registers, source.threads, note.shared
                    ),
                )
            )
    return sorted(rows, key=lambda row: (row.source, row.kernel, row.architecture))


def show(rows: list[KernelCost], console: Console) -> None:
    table = Table(
        title="CUDA kernels as compiled",
        caption="occupancy†: as registers and the block "
        "size allow; the source also takes dynamic shared memory, chosen at launch",
    )
    for name in ("source", "kernel", "architecture"):
        table.add_column(name, overflow="fold")
    for name in ("registers", "spill st/ld", "stack", "shared", "threads", "occupancy"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        spill = f"{row.spill_stores}/{row.spill_loads}"
        table.add_row(
            row.source,
            row.kernel + (" (hot)" if row.hot else ""),
            row.architecture,
            str(row.registers),
            f"[red]{spill}[/red]" if row.spills else spill,
            str(row.stack),
            str(row.static_shared),
            str(row.threads),
            f"{row.occupancy:.0%}" + ("†" if row.dynamic_shared else " "),
        )
    console.print(table)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("build", type=Path, help="the folder that CMake built in")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args(arguments)
    rows = collect(options.build, ROOT / "csrc")
    if not rows:
        print(f"kernel_report: no *.resources under {options.build}: build the CUDA kernels first")
        return 1
    wide = sys.stdout.isatty()
    show(rows, Console(width=None if wide else 140, markup=True))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    spilling = [row for row in rows if row.spills]
    failing = [row for row in spilling if row.hot]
    print(f"{len(rows)} kernels, {len(spilling)} spill, {len(failing)} of them hot")
    for row in failing:
        print(
            f"kernel_report: hot kernel {row.kernel} of {row.source} spills on {row.architecture}: "
            f"{row.spill_stores} bytes of stores, {row.spill_loads} of loads"
        )
    return 1 if failing else 0


if __name__ == "__main__":
    raise SystemExit(main())
