"""The register and spill report reads what ptxas prints, and fails for a hot kernel that spills."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From nvcc 13.0 --resource-usage, shortened; the second kernel's spill is as ptxas words one.
NOTES = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN4weft4cuda39_GLOBAL__N__93ef9da0_7_pool_cu_82a4b5e616\
avg_pool_forwardIfEEvNS_11PoolProblemEPKT_PS3_' for 'sm_80'
ptxas info    : Function properties for _ZN4weft4cuda39_GLOBAL__N__93ef9da0_7_pool_cu_82a4b5e616\
avg_pool_forwardIfEEvNS_11PoolProblemEPKT_PS3_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers, 592 bytes cmem[0]
ptxas info    : Compile time = 1.080 ms
ptxas info    : Compiling entry function '_Z6matmulPKfPf' for 'sm_90a'
ptxas info    : Function properties for _Z6matmulPKfPf
    24 bytes stack frame, 16 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 2048 bytes smem, 592 bytes cmem[0]
"""

SOURCE = """
constexpr int kThreads = 128;
WEFT_GLOBAL WEFT_HOT void matmul(const float* a, float* c) {
  device::SharedMemory shared;
}
template <class T>
WEFT_GLOBAL void avg_pool_forward(PoolProblem p, const T* x, T* y) {}
"""


@pytest.fixture(scope="module")
def report() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "kernel_report", ROOT / "benchmarks" / "kernel_report.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_parse(report: ModuleType) -> None:
    pool, matmul = report.parse(NOTES)
    assert (pool.architecture, pool.registers, pool.stack) == ("sm_80", 40, 0)
    assert (pool.stores, pool.loads, pool.shared) == (0, 0, 0)
    assert (matmul.architecture, matmul.registers, matmul.stack) == ("sm_90a", 255, 24)
    assert (matmul.stores, matmul.loads, matmul.shared) == (16, 20, 2048)


@pytest.mark.parametrize(
    ("signature", "name"),
    [
        (
            "void weft::cuda::(anonymous namespace)::f<weft::bf16, unsigned char, (bool)1>"
            "(weft::PoolProblem, weft::bf16 const*, unsigned char*)",
            "f<bf16, uchar, 1>",
        ),
        (
            "void weft::cuda::_GLOBAL__N__4223ca04_4_x_cu_988a::g<float, (int)4>(float*)",
            "g<float, 4>",
        ),
        ("weft::cuda::(anonymous namespace)::any(unsigned int const*, unsigned int*)", "any"),
    ],
)
def test_readable_names(report: ModuleType, signature: str, name: str) -> None:
    assert report.readable(signature) == name


def test_sources_tell_what_is_hot(report: ModuleType) -> None:
    source = report.read_source(SOURCE)
    assert source.hot == {"matmul"}
    assert source.dynamic_shared == {"matmul"}
    assert source.threads == 128
    assert not report.read_source("// the table of kernels alone").hot


@pytest.mark.parametrize(
    ("architecture", "registers", "threads", "shared", "expected"),
    [
        ("sm_80", 32, 256, 0, 1.0),
        ("sm_90a", 64, 256, 0, 0.5),  # 65536 registers / 64 = 1024 of 2048 threads
        ("sm_90a", 255, 128, 0, 0.125),  # 2 blocks of 4 warps at 8192 registers a warp
        ("sm_89", 32, 64, 0, 1.0),  # 24 blocks of 64 are all of 1536 threads
        ("sm_80", 32, 32, 0, 0.5),  # 32 blocks is all an SM holds
        ("sm_90a", 32, 128, 100 * 1024, 0.125),  # two blocks' shared memory fit
    ],
)
def test_occupancy(
    report: ModuleType,
    architecture: str,
    registers: int,
    threads: int,
    shared: int,
    expected: float,
) -> None:
    assert report.occupancy(architecture, registers, threads, shared) == expected


def _write(folder: Path, monkeypatch: pytest.MonkeyPatch, report: ModuleType, source: str) -> Path:
    (folder / "csrc" / "gemm").mkdir(parents=True)
    (folder / "csrc" / "gemm" / "gemm.cu").write_text(source)
    (folder / "build" / "cuda").mkdir(parents=True)
    (folder / "build" / "cuda" / "gemm.o.resources").write_text(NOTES)
    monkeypatch.setattr(report, "ROOT", folder)
    return folder / "build"


def test_a_hot_kernel_that_spills_fails(
    report: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    build = _write(tmp_path, monkeypatch, report, SOURCE)
    assert report.main([str(build), "--json", str(tmp_path / "rows.json")]) == 1
    told = capsys.readouterr().out
    assert "hot kernel matmul of gemm.cu spills on sm_90a: 16 bytes of stores, 20 of loads" in told
    assert "2 kernels, 1 spill, 1 of them hot" in told
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {row["kernel"].split("<")[0]: row["spill_loads"] for row in rows} == {
        "avg_pool_forward": 0,
        "matmul": 20,
    }


def test_a_cold_kernel_may_spill(
    report: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = _write(tmp_path, monkeypatch, report, SOURCE.replace("WEFT_HOT ", ""))
    assert report.main([str(build)]) == 0


def test_nothing_built_is_said(
    report: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main([str(tmp_path)]) == 1
    assert "build the CUDA kernels first" in capsys.readouterr().out
