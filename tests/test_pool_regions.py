"""Pooling over regions and pyramids, against a plain definition and float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import weft
import weft.functional as W
from harness import check_against_native, check_deterministic, check_gradients, sliced
from pool_cases import each_dtype, each_last, each_layout, in_layout
from weft import _C, reference
from weft.testing import cpu_target, host_execution

each_mode = pytest.mark.parametrize("mode", ["max", "mean"])

# (image, x1, y1, x2, y2): inside, one position, over each edge, the whole map, turned round.
BOXES = torch.tensor(
    [
        [0, 1.0, 2.0, 6.4, 8.5],
        [2, 3.0, 3.0, 3.0, 3.0],
        [1, -4.0, -2.5, 3.0, 4.0],
        [2, 7.0, 6.0, 30.0, 40.0],
        [0, 0.0, 0.0, 12.0, 10.0],
        [1, 8.0, 7.0, 5.0, 2.0],
        [1, -30.0, 2.0, 40.0, 3.0],
    ]
)


def check(x: torch.Tensor, boxes: torch.Tensor, *rest: Any) -> None:
    """Against the plain definition; the boxes, which have no gradient, stay as they are."""
    check_against_native(
        lambda t: W.roi_pool(t, boxes, *rest), lambda t: reference.roi_pool(t, boxes, *rest), x
    )


def distinct(*size: int) -> torch.Tensor:
    """Values far apart: a maximum among near equals has no derivative."""
    return torch.randperm(torch.Size(size).numel()).double().reshape(size) / 7


# ---- values and gradients ------------------------------------------------------------------------


@each_mode
@each_dtype
@each_layout
@pytest.mark.parametrize("channels", [3, 70])
def test_against_the_plain_definition(
    mode: str, dtype: torch.dtype, layout: torch.memory_format, channels: int, device: torch.device
) -> None:
    x = torch.randn(3, channels, 11, 13, device=device).to(dtype).contiguous(memory_format=layout)
    x.requires_grad_()
    boxes = BOXES.to(device)
    for size, scale in ((1, 1.0), ((3, 2), 0.5)):
        check(x, boxes, size, scale, mode)
        y = W.roi_pool(x, boxes, size, scale, mode)
        assert y.is_contiguous(memory_format=layout)
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert grad.is_contiguous(memory_format=layout)


@st.composite
def problems(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int], float]:
    n, c, h, w = (draw(st.integers(1, most)) for most in (3, 40, 20, 20))
    scale = draw(st.sampled_from([1.0, 0.5, 1 / 16, 0.3]))
    places = st.floats(-1, 1.5, width=32)
    boxes = [
        [float(draw(st.integers(0, n - 1))), *(draw(places) * e / scale for e in (w, h, w, h))]
        for _ in range(draw(st.integers(1, 4)))
    ]
    for box in boxes:  # within reach of the map
        for axis, extent in ((1, w), (2, h)):
            box[axis] = min(box[axis], extent / scale)
            box[axis + 2] = max(box[axis + 2], 0.0)
    size = (draw(st.integers(1, 7)), draw(st.integers(1, 3)))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    return torch.randn(n, c, h, w), torch.tensor(boxes).reshape(-1, 5), size, scale


@settings(max_examples=40, deadline=None, database=None, derandomize=True)
@given(problem=problems(), mode=st.sampled_from(["max", "mean"]), last=st.booleans())
def test_random_problems(problem: tuple, mode: str, last: bool) -> None:
    x, boxes, size, scale = problem
    x = in_layout(x, 2, last).requires_grad_()
    for host in (False, True):
        _C.set_host_execution(host)
        try:
            check(x, boxes, size, scale, mode)
        finally:
            _C.set_host_execution(False)


@each_mode
@each_last
def test_a_box_is_its_crop(mode: str, last: bool, device: torch.device) -> None:
    """A region of the map pools to what adaptive pooling makes of that part of it."""
    x = in_layout(torch.randn(2, 19, 17, 23, device=device), 2, last)
    crop = x[1:, :, 3:14, 2:21]
    boxes = torch.tensor([[1.0, 2, 3, 20, 13]], device=device)
    for size in (1, 2, 4, 5, 7):
        adaptive = F.adaptive_max_pool2d if mode == "max" else F.adaptive_avg_pool2d
        found, expected = W.roi_pool(x, boxes, size, mode=mode), adaptive(crop, size)
        if mode == "max":
            assert torch.equal(found, expected)
        else:
            torch.testing.assert_close(found, expected)


def test_torchvision_rounding(device: torch.device) -> None:
    """Halves go away from zero, far edges are included, windows reach over shared borders."""
    x = torch.arange(64.0, device=device).reshape(1, 1, 8, 8)

    def pooled(*box: float, size: Any = 1, scale: float = 1.0) -> list:
        boxes = torch.tensor([[0.0, *box]], device=device)
        return W.roi_pool(x, boxes, size, scale).flatten().tolist()

    assert pooled(0.5, 0.5, 2.5, 2.5) == [3 * 8 + 3]  # 1 … 3 along both axes
    assert pooled(-0.5, -0.5, 1.4, 1.4) == [1 * 8 + 1]
    assert pooled(0, 0, 2, 0, size=(1, 2)) == [1, 2]  # ⌊3/2⌋ … and … ⌈3/2⌉ − 1
    assert pooled(8, 24, 24, 40, scale=1 / 8) == [5 * 8 + 3]
    assert pooled(5, 5, 2, 2) == [5 * 8 + 5]  # turned round: one position
    assert pooled(6, 0, 11, 0, size=(1, 3)) == [7, 0, 0]  # bins beyond the map are empty


def test_special_values(device: torch.device) -> None:
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0])
    for drawn in (values, values[1:], values[2:3], values[:1]):
        x = drawn[torch.randint(0, len(drawn), (3, 18, 11, 13))].to(device)
        for last in (False, True):
            mine = in_layout(x, 2, last).requires_grad_()
            theirs = x.clone().requires_grad_()
            y = W.roi_pool(mine, BOXES.to(device), 3)
            expected = reference.roi_pool(theirs, BOXES.to(device), 3)
            torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
            seed = torch.randint(-8, 9, y.shape, device=device).float()
            (a,) = torch.autograd.grad(y, mine, seed)
            (e,) = torch.autograd.grad(expected, theirs, seed)
            assert torch.equal(a, e)


@each_mode
@each_last
def test_gradients(mode: str, last: bool, device: torch.device) -> None:
    x = in_layout(distinct(2, 3, 5, 6).to(device), 2, last).requires_grad_()
    boxes = torch.tensor([[0, 0, 0, 3, 4], [1, 1, 2, 7, 3], [0, -2, 1, 2, 2.0]], device=device)
    check_gradients(partial(W.roi_pool, boxes=boxes, output_size=(2, 3), mode=mode), x)


@each_mode
@each_last
@each_dtype
def test_deterministic(mode: str, last: bool, dtype: torch.dtype, device: torch.device) -> None:
    x = in_layout(torch.randn(3, 70, 11, 13, device=device).to(dtype), 2, last).requires_grad_()
    boxes = BOXES.to(device).repeat(3, 1)
    seed = torch.randn_like(W.roi_pool(x, boxes, 4))

    def run() -> list[torch.Tensor]:
        y = W.roi_pool(x, boxes, 4, mode=mode)
        return [y, *torch.autograd.grad(y, x, seed)]

    check_deterministic(run)


@each_mode
def test_every_backend_adds_in_one_order(mode: str) -> None:
    """Regions in order: CPU and CUDA kernels give the same bits of a gradient in float32."""
    x = torch.randn(3, 20, 11, 13, requires_grad=True)
    seed = torch.randn(len(BOXES), 20, 4, 4)

    def gradient() -> torch.Tensor:
        return torch.autograd.grad(W.roi_pool(x, BOXES, 4, mode=mode), x, seed)[0]

    on_cpu = gradient()
    with host_execution():
        assert torch.equal(gradient(), on_cpu)


@pytest.mark.parametrize("target", _C.available_cpu_targets())
@each_mode
@each_dtype
def test_every_cpu_target(target: str, mode: str, dtype: torch.dtype) -> None:
    x = torch.randn(3, 37, 11, 13).to(dtype).requires_grad_()
    with cpu_target(target):
        check(x, BOXES, 3, 1.0, mode)


# ---- arguments -----------------------------------------------------------------------------------


@each_mode
def test_strided_inputs_and_lists_of_boxes(mode: str, device: torch.device) -> None:
    x = torch.randn(3, 5, 11, 13, device=device)
    boxes = BOXES.to(device)
    per_image = [boxes[boxes[:, 0] == i, 1:] for i in range(3)]
    for variant in (sliced(x), x[:, :1].expand(x.shape), x.transpose(2, 3).clone().mT):
        y = W.roi_pool(variant, boxes, (2, 3), mode=mode)
        torch.testing.assert_close(y, reference.roi_pool(variant, boxes, (2, 3), mode=mode))
        order = torch.cat([torch.nonzero(boxes[:, 0] == i)[:, 0] for i in range(3)])
        assert torch.equal(W.roi_pool(variant, per_image, (2, 3), mode=mode), y[order])
        wide = boxes.double().mT.contiguous().mT
        assert torch.equal(W.roi_pool(variant, wide, (2, 3), mode=mode), y)
    half = W.roi_pool(x, [b.bfloat16() for b in per_image], 2, mode=mode)
    assert half.shape == (len(boxes), 5, 2, 2)


@each_mode
def test_no_boxes_and_no_images(mode: str, device: torch.device) -> None:
    x = torch.randn(2, 3, 5, 5, device=device, requires_grad=True)
    none = torch.empty(0, 5, device=device)
    for boxes in (none, [none[:, 1:], none[:, 1:]]):
        y = W.roi_pool(x, boxes, (2, 3), mode=mode)
        assert y.shape == (0, 3, 2, 3)
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(grad, torch.zeros_like(x))
    assert W.roi_pool(x[:0], none, 2, mode=mode).shape == (0, 3, 2, 2)
    assert W.roi_pool(x[:0], [], 2, mode=mode).shape == (0, 3, 2, 2)


def box(*numbers: float) -> torch.Tensor:
    return torch.tensor([numbers], dtype=torch.float32)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"boxes": box(0, 1, 1, 2)}, RuntimeError, r"\[K, 5\]"),
    ({"boxes": box(0, 1, 1, 2, 2)[0]}, RuntimeError, r"\[K, 5\]"),
    ({"boxes": box(0, 1, 1, 2, 2).long()}, RuntimeError, "floating dtype"),
    ({"boxes": [box(1, 1, 2, 2)]}, RuntimeError, "one tensor per image"),
    ({"boxes": [box(1, 1, 2, 2), box(1, 1, 2, 2, 2)]}, RuntimeError, r"floating \[L, 4\]"),
    ({"boxes": [box(1, 1, 2, 2).long()] * 2}, RuntimeError, r"floating \[L, 4\]"),
    ({"boxes": box(2, 1, 1, 2, 2)}, IndexError, "box 0 is of image 2, but input has 2"),
    ({"boxes": box(-1, 1, 1, 2, 2)}, IndexError, "image -1"),
    ({"boxes": box(0, float("nan"), 1, 2, 2)}, ValueError, "finite"),
    ({"boxes": box(float("inf"), 1, 1, 2, 2)}, ValueError, "finite"),
    ({"boxes": box(0, 100, 1, 120, 2)}, ValueError, "outside the 8x9 map: along x.*spatial_scale"),
    ({"boxes": box(0, 1, -9, 2, -3)}, ValueError, "outside the 8x9 map: along y"),
    ({"boxes": box(0, 1, 1, 2, 2), "spatial_scale": 0.0}, ValueError, "spatial_scale"),
    ({"boxes": box(0, 1, 1, 2, 2), "spatial_scale": float("nan")}, ValueError, "spatial_scale"),
    ({"boxes": box(0, 1, 1, 2, 2), "mode": "median"}, ValueError, "mode must be"),
    ({"boxes": box(0, 1, 1, 2, 2), "output_size": 0}, RuntimeError, "output_size"),
    ({"boxes": box(0, 1, 1, 2, 2), "output_size": (1, 2, 3)}, RuntimeError, "output_size"),
    ({"boxes": box(0, 1, 1, 2, 2), "output_size": (2**20, 2**20)}, RuntimeError, "output_size"),
]


@pytest.mark.parametrize(("arguments", "error", "text"), BAD)
def test_bad_arguments(
    arguments: dict[str, Any], error: type[Exception], text: str, device: torch.device
) -> None:
    x = torch.randn(2, 3, 8, 9, device=device)
    boxes = arguments["boxes"]
    on_device = [b.to(device) for b in boxes] if isinstance(boxes, list) else boxes.to(device)
    with pytest.raises(error, match=text):
        W.roi_pool(x, **({"output_size": 2} | arguments | {"boxes": on_device}))


def test_bad_maps(device: torch.device) -> None:
    boxes = torch.zeros(1, 5, device=device)
    with pytest.raises(RuntimeError, match="Expected 4D"):
        W.roi_pool(torch.randn(3, 8, 8, device=device), boxes, 2)
    with pytest.raises(RuntimeError, match="non-zero size"):
        W.roi_pool(torch.randn(1, 3, 0, 8, device=device), boxes, 2)
    with pytest.raises(NotImplementedError, match="float32, float64, bfloat16 or float16"):
        W.roi_pool(torch.ones(1, 3, 8, 8, dtype=torch.int64, device=device), boxes, 2)
    with pytest.raises(RuntimeError, match="same device"):
        W.roi_pool(torch.randn(1, 3, 8, 8, device=device), boxes.to("meta"), 2)


@each_mode
def test_far_edges_do_not_overflow(mode: str, device: torch.device) -> None:
    x = torch.randn(1, 2, 5, 6, device=device)
    everywhere = torch.tensor([[0, -1e30, -1e30, 1e30, 1e30]], device=device)
    y = W.roi_pool(x, everywhere, 1, mode=mode).flatten()
    expected = x.amax((2, 3)) if mode == "max" else x.mean((2, 3))
    torch.testing.assert_close(y, expected.flatten())


def test_regions_that_no_box_gave_do_no_harm(device: torch.device) -> None:
    """The inner ops are there for anyone to call."""
    ops = torch.ops.weft
    x = torch.randn(2, 3, 5, 6, device=device)
    big = 2**62
    wild = torch.tensor(
        [[9, 0, 0, 3, 3], [-1, 0, 0, 3, 3], [0, big, -big, big, big], [1, 0, 0, -5, 2]],
        device=device,
    )
    y, places = ops.region_max_pool(x, wild, [2, 2], True)
    assert torch.equal(y, torch.zeros_like(y))
    assert torch.equal(places, torch.full_like(places, -1))
    wilder = torch.full_like(places, 10**6)
    assert torch.equal(ops.region_max_pool_pick(x, wilder, wild), torch.zeros_like(y))
    for grad in (
        ops.region_max_pool_backward(y, wilder, wild, x.shape, False),
        ops.region_avg_pool_backward(y, wild, x.shape, False),
    ):
        assert torch.equal(grad, torch.zeros_like(x))
    with pytest.raises(RuntimeError, match=r"int64 \[K, 5\]"):
        ops.region_avg_pool(x, wild.int(), [2, 2])
    with pytest.raises(RuntimeError, match="grad must have the output's"):
        ops.region_avg_pool_backward(y[0, 0, 0], wild, x.shape, False)
    with pytest.raises(RuntimeError, match="places must be int32"):
        ops.region_max_pool_pick(x, wilder.long(), wild)


# ---- pyramids ------------------------------------------------------------------------------------


@each_mode
@each_layout
def test_pyramids(mode: str, layout: torch.memory_format, device: torch.device) -> None:
    x = torch.randn(3, 5, 11, 13, device=device).contiguous(memory_format=layout).requires_grad_()
    op, plain = W.spatial_pyramid_pool2d, reference.spatial_pyramid_pool2d
    for levels in ((1,), (1, 2, 4), (6, 3)):
        check_against_native(op, plain, x, levels, mode)
        y = op(x, levels, mode, BOXES.to(device))
        torch.testing.assert_close(y, plain(x, levels, mode, BOXES.to(device)))
        layer = weft.nn.SpatialPyramidPool2d(levels, mode)
        length = 5 * sum(level**2 for level in levels)
        assert layer(x).shape == (3, length)
        assert layer(x, BOXES.to(device)).shape == (len(BOXES), length)


def test_a_pyramid_is_of_one_length_for_maps_of_any_size(device: torch.device) -> None:
    layer = weft.nn.SpatialPyramidPool2d()
    lengths = {
        layer(torch.randn(1, 3, h, w, device=device)).shape[1] for h, w in ((1, 1), (3, 9), (16, 5))
    }
    assert lengths == {3 * 21}


def test_bad_pyramids(device: torch.device) -> None:
    x = torch.randn(2, 3, 8, 9, device=device)
    with pytest.raises(ValueError, match="levels"):
        W.spatial_pyramid_pool2d(x, ())
    with pytest.raises(ValueError, match="mode must be"):
        W.spatial_pyramid_pool2d(x, mode="median")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="Expected 4D"):
        W.spatial_pyramid_pool2d(x[0])


# ---- transforms ----------------------------------------------------------------------------------


@each_last
def test_opcheck(last: bool, device: torch.device) -> None:
    ops = torch.ops.weft
    x = in_layout(torch.randn(3, 5, 11, 13, device=device), 2, last)
    boxes = BOXES.to(device)
    regions = ops.regions(boxes, 1.0, x.shape)
    y, places = ops.region_max_pool(x, regions, [2, 3], True)
    for op, args in (
        (ops.regions, (boxes, 1.0, x.shape)),
        (ops.region_max_pool, (x, regions, [2, 3], True)),
        (ops.region_max_pool, (x, regions, [2, 3], False)),
        (ops.region_max_pool_backward, (y, places, regions, x.shape, last)),
        (ops.region_max_pool_pick, (x, places, regions)),
        (ops.region_avg_pool, (x, regions, [2, 3])),
        (ops.region_avg_pool_backward, (y, regions, x.shape, last)),
    ):
        torch.library.opcheck(op.default, args)


def transforms(mode: str, boxes: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda t: W.roi_pool(t, boxes, (2, 3), mode=mode).sin()


@each_mode
@each_last
def test_compile_and_export(mode: str, last: bool, device: torch.device) -> None:
    x = in_layout(torch.randn(3, 5, 11, 13, device=device), 2, last).requires_grad_()
    boxes = BOXES.to(device)
    torch._dynamo.reset()
    function = transforms(mode, boxes)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    y, expected = compiled(x), function(x)
    assert torch.equal(y, expected)
    assert y.stride() == expected.stride()
    (a,) = torch.autograd.grad(y.sum(), x)
    (e,) = torch.autograd.grad(expected.sum(), x)
    assert torch.equal(a, e)
    layer = weft.nn.RoIPool((2, 3), mode=mode)
    exported = torch.export.export(layer, (x.detach(), boxes)).module()
    assert torch.equal(exported(x.detach(), boxes), layer(x, boxes))


@each_mode
@pytest.mark.filterwarnings("error")
def test_torch_func(mode: str, device: torch.device) -> None:
    x = torch.randn(2, 3, 4, 5, 6, device=device)
    boxes = torch.tensor([[0, 0, 0, 3, 4], [2, 1, 2, 5, 3.0]], device=device)
    more = torch.stack([boxes, boxes.flip(0)])

    def loss(op: Callable, x: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        return op(x, boxes, (2, 3), mode=mode).sin().sum()

    for in_dims, args in (((0, None), (x, boxes)), ((0, 0), (x, more)), ((None, 0), (x[0], more))):
        mapped = torch.func.vmap(torch.func.grad(partial(loss, W.roi_pool)), in_dims)(*args)
        for i in range(2):
            one = [a if d is None else a[i] for a, d in zip(args, in_dims, strict=True)]
            leaf = one[0].clone().requires_grad_()
            value = loss(reference.roi_pool, leaf, one[1])
            torch.testing.assert_close(mapped[i], torch.autograd.grad(value, leaf)[0])
    found = torch.func.jacrev(lambda t: W.roi_pool(t, boxes, 2, mode=mode))(x[0].double())
    plain = torch.autograd.functional.jacobian(
        lambda t: reference.roi_pool(t, boxes, 2, mode=mode), x[0].double()
    )
    torch.testing.assert_close(found, plain)
    with torch.no_grad():
        pooled = torch.func.vmap(lambda t: W.roi_pool(t, boxes, 2, mode=mode))(x)
    torch.testing.assert_close(pooled[1], W.roi_pool(x[1], boxes, 2, mode=mode))


# ---- traffic -------------------------------------------------------------------------------------


@each_last
def test_traffic_of_touching_boxes_is_small(last: bool) -> None:
    """Boxes that cover the map once read it once, and write each output once."""
    x = in_layout(torch.randn(1, 64, 32, 32), 2, last)
    corners = [(16 * i, 16 * j) for i in range(2) for j in range(2)]
    boxes = torch.tensor([[0, w, h, w + 15, h + 15] for w, h in corners], dtype=torch.float32)
    with host_execution() as run:
        y = W.roi_pool(x, boxes, 4)
    (launch,) = run.launches
    assert launch.kernel == "region_max_forward"
    assert launch.bytes_stored == y.nbytes
    numbers = 8 * 5 * y.numel()  # of the regions, from cache
    assert launch.bytes_loaded == x.nbytes + numbers
    assert launch.traffic <= 1.25 * (x.nbytes + y.nbytes)


@each_last
@each_mode
def test_traffic_of_the_gradient_is_small(mode: str, last: bool) -> None:
    """A block reads each bin of its tile once, however many positions the bin has."""
    x = in_layout(torch.randn(1, 64, 32, 32), 2, last).requires_grad_()
    corners = [(16 * i, 16 * j) for i in range(2) for j in range(2)]
    boxes = torch.tensor([[0, w, h, w + 15, h + 15] for w, h in corners], dtype=torch.float32)
    y = W.roi_pool(x, boxes, 4, mode=mode)
    seed = torch.randn_like(y)
    with host_execution() as run:
        (grad,) = torch.autograd.grad(y, x, seed)
    (launch,) = run.launches
    assert launch.bytes_stored == grad.nbytes
    places = seed.numel() * 4 if mode == "max" else 0
    assert launch.traffic <= 1.25 * (grad.nbytes + seed.nbytes + places)
