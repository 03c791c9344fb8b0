"""SPP-net against R-CNN: one convolution pass and pooled regions, or one pass per window.

A detector looks at 2,000 windows of a photograph. R-CNN cuts each one out, resizes it and sends it
through the network; SPP-net (He et al., 2014) sends the photograph through once and pools each
window's part of the last map to a vector of fixed length. The network is a small ZF-5 (five
convolutions, stride 16) with its pyramid of 6, 3, 2 and 1 bins, the photograph is one that
scikit-learn carries, at SPP-net's scale of 688; windows and parameters are random. Everything runs
on weft's layers, so the ratio is the algorithm's. Asserts that a window's vector is what pooling
the cut-out map gives, bit for bit, and that a window over the whole photograph gets the vector of
its own pass.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

import common
import weft
from weft.bench import report

WINDOWS = 2000
SIDE = 688  # of the photograph's shorter side, in pixels
WINDOW_SIDE = 224  # of a window that R-CNN has resized
STRIDE = 16  # pixels per position of the last map
LEVELS = (6, 3, 2, 1)
CLASSES = 21
BATCH = 40  # windows in one of R-CNN's passes
CHECKED = 50  # windows that are compared with their cut-outs
REPEATS = 5
# He et al., table 10: seconds per image on a 2014 GPU, 2,000 windows, one scale.
PUBLISHED = {"R-CNN": 14.46, "SPP-net": 0.142}


def network() -> nn.Sequential:
    """[N, 3, H, W] → [N, 48, about H/16, about W/16]: ZF-5 with a fraction of its channels."""
    stages: list[nn.Module] = []
    for inputs, outputs, size, stride, pooled in (
        (3, 16, 7, 2, True),
        (16, 48, 5, 2, True),
        (48, 64, 3, 1, False),
        (64, 64, 3, 1, False),
        (64, 48, 3, 1, False),
    ):
        stages += [nn.Conv2d(inputs, outputs, size, stride, size // 2), nn.ReLU()]
        if pooled:
            stages.append(nn.MaxPool2d(3, 2, 1))
    return weft.convert(nn.Sequential(*stages)).eval()


def photograph(side: int) -> Tensor:
    """scikit-learn's "china.jpg" as [1, 3, H, W], its shorter side `side` pixels."""
    from sklearn.datasets import load_sample_image

    pixels = torch.tensor(load_sample_image("china.jpg")).permute(2, 0, 1)[None].float()
    scale = side / min(pixels.shape[2:])
    size = [round(extent * scale) for extent in pixels.shape[2:]]
    return F.interpolate(pixels / 128 - 1, size=size, mode="bilinear", align_corners=False)


def random_windows(count: int, height: int, width: int) -> Tensor:
    """[count, 4] of (x1, y1, x2, y2) in pixels: many sizes and aspects, inside the photograph."""
    generator = torch.Generator().manual_seed(20)
    least, most = math.log(3 * STRIDE), math.log(0.8 * min(height, width))
    draw = torch.rand(count, 4, generator=generator)
    size, aspect = (least + draw[:, 0] * (most - least)).exp(), 2 ** (draw[:, 1] - 0.5)
    extents = torch.stack([size * aspect, size / aspect], 1).clamp(
        max=torch.tensor([width, height]) - 1
    )
    corners = draw[:, 2:] * (torch.tensor([width, height]) - 1 - extents)
    return torch.cat([corners, corners + extents], 1)


class Detector(nn.Module):
    """Scores of windows, from one pass (`spp`) or from a pass each (`rcnn`)."""

    def __init__(self, window_side: int) -> None:
        super().__init__()
        self.features = network()
        self.pyramid = weft.nn.SpatialPyramidPool2d(LEVELS, spatial_scale=1 / STRIDE)
        self.score = nn.Linear(48 * sum(level**2 for level in LEVELS), CLASSES)
        self.window_side = window_side

    def spp(self, image: Tensor, windows: Tensor) -> Tensor:
        return self.score(self.pyramid(self.features(image), [windows]))

    def rcnn(self, image: Tensor, windows: Tensor) -> Tensor:
        side = (self.window_side, self.window_side)
        resized = [
            F.interpolate(image[:, :, y1 : y2 + 1, x1 : x2 + 1], side, mode="bilinear")
            for x1, y1, x2, y2 in windows.round().long().tolist()
        ]
        return self.score(self.pyramid(self.features(torch.cat(resized))))


def check_pooled_windows(detector: Detector, image: Tensor, windows: Tensor) -> None:
    """Compares vectors of windows with those of cut-out maps and of a pass of their own.

    Raises:
        AssertionError: if one differs.
    """
    map_ = detector.features(image)
    vectors = detector.pyramid(map_, [windows])
    for vector, window in zip(vectors, windows.tolist(), strict=True):
        x1, y1, x2, y2 = (math.floor(edge / STRIDE + 0.5) for edge in window)
        cut = map_[:, :, y1 : y2 + 1, x1 : x2 + 1]
        expected = torch.cat([F.adaptive_max_pool2d(cut, level).flatten() for level in LEVELS])
        # A bin that lies beyond the map is 0; only whole regions have a cut-out to compare with.
        inside = x2 < map_.shape[3] and y2 < map_.shape[2]
        if inside and not torch.equal(vector, expected):
            raise AssertionError(f"window {window}: its vector is not that of the cut-out map")
    height, width = map_.shape[2:]
    everything = image.new_tensor([[0, 0, (width - 1) * STRIDE, (height - 1) * STRIDE]])
    if not torch.equal(detector.pyramid(map_, [everything]), detector.pyramid(map_)):
        raise AssertionError("the window over the whole photograph has not the photograph's vector")


def _seconds(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


@torch.no_grad()
def run(windows: int = WINDOWS, side: int = SIDE, window_side: int = WINDOW_SIDE) -> dict[str, Any]:
    """Scores the windows both ways; returns the seconds of each part.

    Raises:
        AssertionError: if pooled windows are not what they must be.
    """
    torch.manual_seed(20)
    detector, image = Detector(window_side), photograph(side)
    boxes = random_windows(windows, *image.shape[2:])
    check_pooled_windows(detector, image, boxes[:CHECKED])
    map_ = detector.features(image)
    parts = {
        "convolution": lambda: detector.features(image),
        "pooling": lambda: detector.pyramid(map_, [boxes]),
        "total": lambda: detector.spp(image, boxes),
    }
    spp = {
        name: statistics.median(_seconds(part) for _ in range(REPEATS))
        for name, part in parts.items()
    }
    rcnn = 0.0
    with report.progress_bar() as progress:
        bar = progress.add_task("R-CNN: windows", total=windows)
        for batch in boxes.split(BATCH):
            rcnn += _seconds(lambda some=batch: detector.rcnn(image, some))
            progress.advance(bar, len(batch))
    return {
        "windows": windows,
        "photograph": list(image.shape[2:]),
        "window_side": window_side,
        "spp_s": spp["total"],
        "spp_convolution_s": spp["convolution"],
        "spp_pooling_s": spp["pooling"],
        "rcnn_s": rcnn,
        "ratio": rcnn / spp["total"],
        "published_ratio": PUBLISHED["R-CNN"] / PUBLISHED["SPP-net"],
    }


def show(found: dict[str, Any]) -> None:
    height, width = found["photograph"]
    table = Table(title=f"{found['windows']} windows of a {width}x{height} photograph, small ZF-5")
    for name in ("", "this machine", "He et al. 2014, ZF-5, GPU"):
        table.add_column(name, justify="right" if name else "left")
    side = found["window_side"]
    table.add_row(
        f"R-CNN: a pass per window, {side}x{side}",
        report.seconds(found["rcnn_s"]),
        report.seconds(PUBLISHED["R-CNN"]),
    )
    table.add_row(
        "SPP-net: one pass, pooled windows",
        report.seconds(found["spp_s"]),
        report.seconds(PUBLISHED["SPP-net"]),
    )
    table.add_row("  of it convolution", report.seconds(found["spp_convolution_s"]), "")
    table.add_row("  of it pooling", report.seconds(found["spp_pooling_s"]), "")
    table.add_row("ratio", f"{found['ratio']:.0f}", f"{found['published_ratio']:.0f}")
    out = report.console()
    out.print(table)
    out.print("vectors of windows equal those of the cut-out maps, bit for bit")


def main() -> dict[str, Any]:
    found = run()
    show(found)
    return {"regions": found}


if __name__ == "__main__":
    common.command_line("SPP-net against R-CNN on weft's layers", main)
