"""How weft's ops become differentiable."""

from __future__ import annotations

from typing import Any

import torch


class Function:
    """A `torch.autograd.Function` that is cheap in eager mode and works under `torch.func`.

    A subclass defines three static methods:

    - ``compute(*args)``: the forward op; returns what ``apply`` returns.
    - ``save(ctx, args, outputs)``: keeps what backward needs.
    - ``backward(ctx, *grads)``: as in `torch.autograd.Function`.

    `torch.func` demands the form with ``setup_context``, which costs 11 µs a call more than
    ``forward(ctx, ...)``; so each subclass is made into both, and ``apply`` takes the first only
    inside a transform.
    """

    _eager: type[torch.autograd.Function]
    _functorch: type[torch.autograd.Function]

    compute: Any
    save: Any
    backward: Any

    def __init_subclass__(cls) -> None:
        compute, save, backward = cls.compute, cls.save, cls.backward

        def forward(ctx: Any, *args: Any) -> Any:
            outputs = compute(*args)
            save(ctx, args, outputs)
            return outputs

        cls._eager = type(
            cls.__name__,
            (torch.autograd.Function,),
            {"forward": staticmethod(forward), "backward": staticmethod(backward)},
        )
        cls._functorch = type(
            cls.__name__,
            (torch.autograd.Function,),
            {
                "generate_vmap_rule": True,
                "forward": staticmethod(compute),
                "setup_context": staticmethod(save),
                "backward": staticmethod(backward),
            },
        )

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if inside_transform():
            return cls._functorch.apply(*args)
        return cls._eager.apply(*args)


def eagerly(function: Any, *args: Any) -> Any:
    """What `function`, an eager path in C++ (csrc/eager.h), gives; None where it declines.

    It spares a small op most of what a call costs. A compiler has to see an op instead.
    """
    return None if torch.compiler.is_compiling() else function(*args)


def inside_transform() -> bool:
    """True inside a `torch.func` transform, where `requires_grad` does not tell the whole story."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """True if autograd may ask for a gradient of one of `tensors`."""
    if not torch.is_grad_enabled():
        return False
    return any(t is not None and t.requires_grad for t in tensors) or inside_transform()


def autocast_arguments(*tensors: Any) -> Any:
    """`tensors` as an op of autocast's lower-precision list gets them.

    Where autocast is on for the first one's device, floating tensors (None stays None, float64
    stays float64) are cast to its dtype; elsewhere they come back as they are.
    """
    device_type = tensors[0].device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)

    def cast(tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
            return tensor
        return tensor.to(dtype)

    return tuple(map(cast, tensors))
