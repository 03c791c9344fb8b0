"""Exchanging torch's layers for weft's inside a model, and back."""

from __future__ import annotations

from typing import TypeVar

import torch

from weft import nn

Model = TypeVar("Model", bound=torch.nn.Module)

# A weft layer adds no state to torch's class of the same name, so exchanging the class is enough.
_WEFT_CLASS = {
    getattr(torch.nn, name): getattr(nn, name) for name in nn.__all__ if hasattr(torch.nn, name)
}
_TORCH_CLASS = {weft_class: torch_class for torch_class, weft_class in _WEFT_CLASS.items()}


def _exchange(model: Model, classes: dict[type, type]) -> Model:
    for module in model.modules():
        module.__class__ = classes.get(type(module), type(module))
    return model


def convert(model: Model) -> Model:
    """Exchanges, in place, every layer of `model` that weft has for weft's; returns `model`.

    Only exact torch classes are exchanged: a subclass may rely on its base's `forward`. Parameters,
    `state_dict` keys and hooks stay as they are.
    """
    return _exchange(model, _WEFT_CLASS)


def revert(model: Model) -> Model:
    """Undoes `convert`, in place; returns `model`.

    Raises:
        ValueError: for a layer with options that torch's does not have (`peephole`, `layer_norm`,
            ...), which would compute something else; nothing is exchanged then.
    """
    for name, module in model.named_modules():
        if type(module) not in _TORCH_CLASS or not hasattr(module, "own_options"):
            continue
        options: dict[str, object] = module.own_options()
        options.pop("recompute", None)  # computes the same
        if options:
            given = ", ".join(f"{option}={value!r}" for option, value in options.items())
            raise ValueError(
                f"weft.revert: torch has no {type(module).__name__} with {given}, "
                f"got one at {name!r}"
            )
    return _exchange(model, _TORCH_CLASS)
