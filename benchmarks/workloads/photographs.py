"""Depthwise-separable networks on photographs, once on PyTorch's layers and once on weft's.

The photographs are the two that scikit-learn carries, a temple and a flower, cut into patches; the
left three quarters are learnt from, the right quarter is for testing. The networks are built as
MobileNet (Howard et al., 2017) of depthwise and pointwise convolutions, each with bias and ReLU,
which on weft's side are one `ConvBlock2d`, its pooling included. Two tasks:

- `origin`: which of the two photographs is a patch of 32×32 from?
- `resolution`: a patch of 16×16 at twice the resolution, by a transposed convolution that corrects
  bilinear interpolation.

Asserts that the two loss curves of a task agree, that both networks tell the origin of at least
90 % of the test patches, and that both come closer to the finer test patches than interpolation
does; prints the time of a step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

import common
import weft
from weft.bench import report

SIDE = 32  # of a patch
BATCH = 32
UPDATES = {"origin": 160, "resolution": 600}
RATE = {"origin": 1e-3, "resolution": 3e-3}
LEAST_ACCURACY = 0.90
LEAST_GAIN = 0.3  # dB over interpolation
AGREEMENT = common.Agreement(early_steps=10, early=1e-5, late=0.1, floor=0.5)


class Stage(nn.Sequential):
    """Convolution, ReLU and, if asked for, pooling by 2, as PyTorch has them."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int,
        stride: int = 1,
        groups: int = 1,
        pooled: bool = False,
    ) -> None:
        convolution = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups)
        super().__init__(convolution, nn.ReLU(), *([nn.MaxPool2d(2)] if pooled else []))

    def as_block(self) -> weft.nn.ConvBlock2d:
        """The same layers, with the same parameters, as one."""
        c = self[0]
        pooling = "max" if len(self) > 2 else None
        block = weft.nn.ConvBlock2d(
            c.in_channels,
            c.out_channels,
            c.kernel_size,
            c.stride,
            c.padding,
            groups=c.groups,
            pooling=pooling,
        )
        block.load_state_dict(c.state_dict())
        return block


def separable(inputs: int, outputs: int, pooled: bool = False) -> list[nn.Module]:
    """A 3×3 convolution of each channel, then one of a position's channels."""
    return [Stage(inputs, inputs, 3, groups=inputs), Stage(inputs, outputs, 1, pooled=pooled)]


def origin_network() -> nn.Sequential:
    """[N, 3, 32, 32] → [N, 2]."""
    return nn.Sequential(
        Stage(3, 24, 3, stride=2),
        *separable(24, 48, pooled=True),
        *separable(48, 96, pooled=True),
        *separable(96, 96),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(96, 2),
    )


class Resolution(nn.Module):
    """[N, 3, H, W] → [N, 3, 2H, 2W]."""

    def __init__(self) -> None:
        super().__init__()
        self.correction = nn.Sequential(
            Stage(3, 32, 3),
            *separable(32, 64),
            *separable(64, 32),
            nn.ConvTranspose2d(32, 3, 4, stride=2, padding=1),
        )
        with torch.no_grad():  # it begins as the interpolation
            self.correction[-1].weight.mul_(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return interpolated(x) + self.correction(x)


def interpolated(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)


def pair(model: nn.Module) -> dict[str, common.Run]:
    """As `common.pair`, with each stage as one layer on weft's side."""
    fused = copy.deepcopy(model)
    for module in list(fused.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Stage):
                setattr(module, name, child.as_block())
    return {"native": common.Run(model), "weft": common.Run(weft.convert(fused))}


def patches() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(patches [N, 3, 32, 32] in -1 … 1, photograph [N]) to learn from, and to test on."""
    from sklearn.datasets import load_sample_images

    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for pixels in load_sample_images().images:
        image = torch.tensor(pixels).permute(2, 0, 1).float() / 128 - 1
        border = image.shape[2] * 3 // 4
        for part, half in zip(parts, (image[:, :, :border], image[:, :, border:]), strict=True):
            cut = half.unfold(1, SIDE, SIDE // 2).unfold(2, SIDE, SIDE // 2)
            part.append(cut.permute(1, 2, 0, 3, 4).reshape(-1, 3, SIDE, SIDE))
    learnt, tested = (
        (
            torch.cat(part),
            torch.cat([torch.full((len(p),), i) for i, p in enumerate(part)]),
        )
        for part in parts
    )
    return learnt, tested


def decibels(errors: Tensor) -> float:
    """Peak signal-to-noise ratio of values in -1 … 1."""
    return float(10 * torch.log10(4 / errors.square().mean()))


def _train(
    title: str,
    model: nn.Module,
    loss_of: Callable[[nn.Module, Tensor], Tensor],
    count: int,
    updates: int,
) -> dict[str, common.Run]:
    """Trains both; `loss_of(model, indices)` is the loss of some of `count` patches."""
    runs = pair(model)
    batches: list[Tensor] = []
    while len(batches) < updates:
        batches += [b for b in torch.randperm(count).split(BATCH) if len(b) == BATCH]
    optimizers = {
        name: torch.optim.AdamW(r.model.parameters(), lr=RATE[title]) for name, r in runs.items()
    }

    def step(library: str, index: int) -> float:
        loss = loss_of(runs[library].model, batches[index])
        optimizers[library].zero_grad()
        loss.backward()
        optimizers[library].step()
        return loss.item()

    common.train(runs, updates, step, title)
    return runs


def run_origin(updates: int = UPDATES["origin"], check: bool = True) -> dict[str, Any]:
    """Learns which photograph a patch is from.

    Raises:
        AssertionError: if the curves or the accuracy are not as promised.
    """
    torch.manual_seed(20)
    (images, labels), (test_images, test_labels) = patches()

    def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
        return F.cross_entropy(model(images[batch]), labels[batch])

    runs = _train("origin", origin_network(), loss_of, len(labels), updates)
    least = LEAST_ACCURACY if check else None
    accuracy = common.accuracies(runs, test_images, test_labels, least)
    return common.result(runs, AGREEMENT.check(runs), found=accuracy)


def run_resolution(updates: int = UPDATES["resolution"], check: bool = True) -> dict[str, Any]:
    """Learns to double the resolution.

    Raises:
        AssertionError: if the curves or the gain over interpolation are not as promised.
    """
    torch.manual_seed(20)
    (images, _), (test_images, _) = patches()
    coarse, test_coarse = F.avg_pool2d(images, 2), F.avg_pool2d(test_images, 2)

    def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
        return 100 * F.mse_loss(model(coarse[batch]), images[batch])

    runs = _train("resolution", Resolution(), loss_of, len(images), updates)
    baseline = decibels(interpolated(test_coarse) - test_images)
    gain = {}
    for name, r in runs.items():
        with torch.no_grad():
            gain[name] = decibels(r.model(test_coarse) - test_images) - baseline
        if check and gain[name] < LEAST_GAIN:
            raise AssertionError(f"{name} gains {gain[name]:.2f} dB over interpolation")
    return common.result(runs, AGREEMENT.check(runs), found=gain, interpolation_db=baseline)


TASKS = {"origin": run_origin, "resolution": run_resolution}


def show(found: dict[str, dict[str, Any]]) -> None:
    table = Table(title="Depthwise-separable networks on scikit-learn's photographs")
    for name in ("task", "layers", "last loss", "on test patches", "time per step", "ratio"):
        table.add_column(name, justify="right")
    formats = {"origin": "{:.1%} right", "resolution": "{:+.2f} dB"}
    for task, result in found.items():
        for name in common.LIBRARIES:
            table.add_row(
                task,
                name,
                f"{result[f'{name}_losses'][-1]:.4f}",
                formats[task].format(result["found"][name]),
                report.seconds(result[f"{name}_step_s"]),
                f"{result['ratio']:.2f}" if name == "weft" else "",
            )
    out = report.console()
    out.print(table)
    for task, result in found.items():
        out.print(f"{task}: {AGREEMENT.sentence(result)}")


def main() -> dict[str, Any]:
    found = {task: run() for task, run in TASKS.items()}
    show(found)
    return {"photographs": found}


if __name__ == "__main__":
    common.command_line("Depthwise-separable networks on photographs, native and weft", main)
