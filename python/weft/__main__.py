"""`python -m weft info | check [family] | bench [family]`."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.table import Table

from weft import _C, facts
from weft.bench import report
from weft.bench.rows import FAMILIES
from weft.bench.unlisted import GENERATORS


def _info() -> int:
    versions, machine = facts.versions(), facts.machine()
    targets = ", ".join(_C.available_cpu_targets())
    built = ", ".join(filter(None, _C.cuda_architectures.split(";"))) or "none (built without CUDA)"
    rows = {
        "weft": f"{versions['weft']}, commit {versions['commit'] or 'unknown'}",
        "torch": f"{versions['torch']}, CUDA {versions['cuda'] or 'none'}",
        "Python": versions["python"],
        "compiler": versions["compiler"],
        "CPU": f"{machine['cpu']}, {machine['cores']} cores, "
        f"{torch.get_num_threads()} threads used",
        "last-level cache": report.byte_count(machine["cache_bytes"]),
        "memory": report.byte_count(machine["memory_bytes"]),
        "instruction set": f"{machine['instruction_set']} (available: {targets})",
        "GPUs": "\n".join(machine["gpus"]) or "none",
        "CUDA architectures": built,
        "host execution": "built" if _C.with_host_execution else "not built",
        "runs on": ", ".join(map(str, facts.devices())),
    }
    table = Table(show_header=False)
    for name, value in rows.items():
        table.add_row(name, str(value))
    report.console().print(table)
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from weft import check

    outcomes = check.run(arguments.family)
    check.show(outcomes)
    return 0 if all(outcome.passed for outcome in outcomes) else 1


def _bench(arguments: argparse.Namespace) -> int:
    device = torch.device(arguments.device or facts.devices()[-1])
    if device not in facts.devices():
        raise SystemExit(f"weft bench: device {device} is not there, or weft was built without it")
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("weft bench: --plot needs matplotlib: pip install matplotlib")
    # Found out before minutes of measuring, not after.
    for path in filter(None, (arguments.json, arguments.plot)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        except OSError as error:
            raise SystemExit(f"weft bench: cannot write {path}: {error.strerror}") from None
    families = [arguments.family] if arguments.family else []
    if arguments.unlisted and not set(families) <= set(GENERATORS):
        raise SystemExit(f"weft bench: no random problems of family {arguments.family}")
    result = report.run(
        families,
        device,
        arguments.full,
        arguments.unlisted,
        arguments.seed,
        arguments.json,
        not arguments.one_process,
    )
    report.show(result)
    if arguments.plot:
        report.plot(result, arguments.plot)
    for failure in result.get("failed", []):
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if "failed" in result else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m weft", description="weft on this machine")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, devices, instruction sets")
    check = commands.add_parser("check", help="every op against float64, differentiated, repeated")
    bench = commands.add_parser("bench", help="time and memory against PyTorch")
    for command in (check, bench):
        command.add_argument("family", nargs="?", choices=list(FAMILIES), help="only this family")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write what was measured")
    bench.add_argument("--plot", type=Path, metavar="FILE", help="draw the ratios (.png, .svg)")
    bench.add_argument("--full", action="store_true", help="all published rows, more repetitions")
    bench.add_argument(
        "--one-process", action="store_true", help="all rows in one process, one after another"
    )
    bench.add_argument(
        "--unlisted", type=int, default=0, metavar="COUNT", help="random problems instead of rows"
    )
    bench.add_argument("--seed", type=int, default=0, help="of the random problems (default 0)")
    bench.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where weft runs on it"
    )
    arguments = parser.parse_args(argv)
    if arguments.command == "info":
        return _info()
    return _check(arguments) if arguments.command == "check" else _bench(arguments)


if __name__ == "__main__":
    sys.exit(main())
