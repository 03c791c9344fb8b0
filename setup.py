"""Builds weft._C: the torch-free kernels with CMake, the rest with torch's own builder.

Environment:
    WEFT_CUDA             0 or 1; default: 1 where torch is a CUDA build and nvcc is there
    WEFT_HOST_EXECUTION   1 builds the CUDA kernels for execution on the CPU as well (tests)
    WEFT_SANITIZE         1 builds with the address and undefined-behaviour sanitizers
    WEFT_BUILD_DIR        where kernels are built (default build/kernels)
    TORCH_CUDA_ARCH_LIST  default "8.0;9.0a+PTX"
    MAX_JOBS              parallel compilations
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension

ROOT = Path(__file__).parent.resolve()


def switch(name: str, default: bool) -> bool:
    value = os.environ.get(name, "1" if default else "0")
    if value not in ("0", "1"):
        raise SystemExit(f"weft: {name} must be 0 or 1, got {value!r}")
    return value == "1"


def nvcc() -> str | None:
    """CUDA_HOME where it is set, else the nvcc on PATH, else where torch finds a toolkit."""
    homes = [os.environ.get("CUDA_HOME"), None, CUDA_HOME]
    for home in homes:
        found = shutil.which(str(Path(home, "bin", "nvcc")) if home else "nvcc")
        if found:
            return found
    return None


def toolkit() -> Path:
    """The folder that nvcc belongs to; the nvcc on PATH may be a script that calls it."""
    told = subprocess.run(
        [nvcc() or "nvcc", "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True
    )
    top = re.search(r"TOP=(.+)", told.stderr)
    if top is None:
        raise SystemExit(f"weft: cannot tell where {nvcc()} has its headers; set CUDA_HOME")
    return Path(top[1].strip()).resolve()


def cuda_runtime() -> Path:
    """The very libcudart that torch loads, so that a process has one CUDA runtime only.

    NVIDIA's wheels beside torch, where torch came with them, else the toolkit's.
    """
    name = f"libcudart.so.{torch.version.cuda.split('.')[0]}"
    beside_torch = Path(torch.__file__).parent.parent / "nvidia"
    for folder in (*beside_torch.glob("*/lib"), toolkit() / "lib64", toolkit() / "lib"):
        if (folder / name).exists():
            return folder / name
    raise SystemExit(f"weft: {name}, which torch {torch.__version__} uses, is not there")


HOST_EXECUTION = switch("WEFT_HOST_EXECUTION", default=False)
SANITIZE = switch("WEFT_SANITIZE", default=False)
CUDA = switch("WEFT_CUDA", default=torch.version.cuda is not None and nvcc() is not None)
ARCH_LIST = os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;9.0a+PTX").replace(" ", ";")
BUILD_DIR = ROOT / os.environ.get("WEFT_BUILD_DIR", "build/kernels")

if CUDA and torch.version.cuda is None:
    raise SystemExit("weft: WEFT_CUDA=1 needs a CUDA build of torch; this one is CPU only")
if CUDA and nvcc() is None:
    raise SystemExit("weft: WEFT_CUDA=1 needs nvcc; set CUDA_HOME or put it on PATH")


class BuildWeft(BuildExtension):
    """Builds the kernel library before the extension that links it."""

    def build_extensions(self) -> None:
        in_place = self.inplace or "--inplace" in sys.argv  # setuptools clears the former
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "WEFT_CUDA": int(CUDA),
            "WEFT_HOST_EXECUTION": int(HOST_EXECUTION),
            "WEFT_SANITIZE": int(SANITIZE),
            "WEFT_CUDA_ARCH_LIST": ARCH_LIST,
            "WEFT_NVCC": nvcc() or "nvcc",
        }
        defines = [f"-D{name}={value}" for name, value in options.items()]
        subprocess.run(
            ["cmake", "-S", str(ROOT), "-B", str(BUILD_DIR), "-G", "Ninja", *defines], check=True
        )
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        subprocess.run(
            ["cmake", "--build", str(BUILD_DIR), "--target", "weft_kernels", *jobs], check=True
        )
        self.force = True  # relink: setuptools does not see the library change
        super().build_extensions()
        beside_sources = in_place or getattr(self, "editable_mode", False)
        package = ROOT / "python/weft" if beside_sources else Path(self.build_lib) / "weft"
        (package / "_built_for.py").write_text(f'TORCH_VERSION = "{torch.__version__}"\n')


# vptr needs type information that torch hides.
sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize=vptr"] if SANITIZE else []
if SANITIZE:
    sanitizers += ["-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g"]
macros = {
    "WEFT_X86": int(os.uname().machine in ("x86_64", "AMD64")),
    "WEFT_WITH_CUDA": int(CUDA),
    "WEFT_WITH_HOST_EXECUTION": int(HOST_EXECUTION),
    "WEFT_CUDA_ARCHITECTURES": f'"{ARCH_LIST if CUDA else ""}"',
}
sources = [
    *ROOT.glob("csrc/*.cpp"),
    *ROOT.glob("csrc/*/*_ops.cpp"),
]
cuda_include = [str(toolkit() / "include")] if CUDA else []
cuda_link = []
if CUDA:
    cuda_link = ["-lc10_cuda", f"-L{cuda_runtime().parent}", f"-l:{cuda_runtime().name}"]

setup(
    ext_modules=[
        CppExtension(
            "weft._C",
            sources=sorted(str(s.relative_to(ROOT)) for s in sources),
            include_dirs=[str(ROOT / "csrc"), *cuda_include],
            define_macros=list(macros.items()),
            extra_compile_args=["-O2", "-fopenmp", "-fvisibility=hidden", *sanitizers],
            extra_objects=[str(BUILD_DIR / "libweft_kernels.a")],
            extra_link_args=["-fopenmp", *sanitizers, *cuda_link],
        )
    ],
    cmdclass={"build_ext": BuildWeft},
)
