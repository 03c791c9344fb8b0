"""The README says what was measured; it and the pages of docs name files that exist."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_results_are_the_committed_run() -> None:
    (name,) = re.findall(r"<!-- results: (\S+) -->", README)
    section = runpy.run_path(str(ROOT / "benchmarks" / "readme_table.py"))["section"]
    assert section(json.loads((ROOT / name).read_text()), name) in README


def test_named_files_exist() -> None:
    names = set(re.findall(r"\b(?:csrc|python|tests|benchmarks|docs)/[\w./-]+\w", README))
    names |= set(re.findall(r"\]\(([^):]+)\)", README))
    assert names
    assert not {name for name in names if not (ROOT / name).exists()}


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda p: p.name)
def test_pages_name_sources_that_exist(page: Path) -> None:
    names = set(re.findall(r"\b(?:csrc|python|tests|benchmarks)/[\w./-]+\w", page.read_text()))
    assert names
    assert not {name for name in names if not (ROOT / name).exists()}


def test_drop_in_example_runs() -> None:
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(block, "README.md", "exec"), {})
