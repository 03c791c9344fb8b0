"""weft: hand-written C++/CUDA kernels for convolution, pooling and recurrent cells in PyTorch.

import weft
model = weft.convert(model)      # exchange torch's layers for weft's, in place
from weft import nn              # or build with weft's layers
"""

import importlib

import torch


def _load() -> None:
    """Imports weft._C; a build for another torch gets one clear sentence."""
    try:
        from weft._built_for import TORCH_VERSION
    except ImportError:
        raise ImportError(
            "weft is not built: run `pip install --no-build-isolation -e .` in its source folder"
        ) from None
    if torch.__version__ != TORCH_VERSION:
        raise ImportError(
            f"weft was built for torch {TORCH_VERSION}, this is torch {torch.__version__}: "
            "build weft again under this torch"
        )
    importlib.import_module("weft._C")


_load()

from weft import functional, nn  # noqa: E402
from weft.convert import convert, revert  # noqa: E402
from weft.explain import explain  # noqa: E402
from weft.memory import empty_cache  # noqa: E402

__version__ = "0.1.0"
__all__ = ["convert", "empty_cache", "explain", "functional", "nn", "revert"]
