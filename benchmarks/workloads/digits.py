"""LeNet-5 on handwritten digits, once on PyTorch's layers and once on weft's.

The digits are the 1797 that scikit-learn carries, scaled from 8×8 to LeNet-5's 32×32. The network
is LeNet-5 with the first pooling an average, as LeCun's subsampling, and the second a maximum, so
that both are trained through. Asserts that the two loss curves agree and that both networks know at
least 97 % of the test digits; prints the time of a step.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

import common
from weft.bench import report

BATCH = 64
UPDATES = 276  # 12 epochs
TEST_DIGITS = 360
LEAST_ACCURACY = 0.97
AGREEMENT = common.Agreement(early_steps=10, early=1e-5, late=0.05)


def lenet5() -> nn.Sequential:
    """[N, 1, 32, 32] → [N, 10]."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.Tanh(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 5 * 5, 120),
        nn.Tanh(),
        nn.Linear(120, 84),
        nn.Tanh(),
        nn.Linear(84, 10),
    )


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(images [N, 1, 32, 32], labels [N]) to train on, and to test on; a fixed split."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, size=(32, 32), mode="bilinear", align_corners=False)
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(20))
    test, train = order[:TEST_DIGITS], order[TEST_DIGITS:]
    return (images[train], labels[train]), (images[test], labels[test])


def run(updates: int = UPDATES, check_accuracy: bool = True) -> dict[str, Any]:
    """Trains both; returns what was found.

    Raises:
        AssertionError: if the curves or the accuracy are not as promised.
    """
    torch.manual_seed(20)
    runs = common.pair(lenet5())
    (images, labels), (test_images, test_labels) = digits()
    batches: list[Tensor] = []
    while len(batches) < updates:
        batches += torch.randperm(len(labels)).split(BATCH)
    optimizers = {
        name: torch.optim.AdamW(r.model.parameters(), lr=2e-3) for name, r in runs.items()
    }

    def step(library: str, index: int) -> float:
        batch = batches[index]
        loss = F.cross_entropy(runs[library].model(images[batch]), labels[batch])
        optimizers[library].zero_grad()
        loss.backward()
        optimizers[library].step()
        return loss.item()

    common.train(runs, updates, step, "LeNet-5")
    least = LEAST_ACCURACY if check_accuracy else None
    accuracy = common.accuracies(runs, test_images, test_labels, least)
    return common.result(runs, AGREEMENT.check(runs), accuracy=accuracy)


def show(found: dict[str, Any]) -> None:
    table = Table(title="LeNet-5 on scikit-learn's digits")
    for name in ("layers", "last loss", "test accuracy", "time per step", "ratio"):
        table.add_column(name, justify="right")
    for name in common.LIBRARIES:
        table.add_row(
            name,
            f"{found[f'{name}_losses'][-1]:.4f}",
            f"{found['accuracy'][name]:.2%}",
            report.seconds(found[f"{name}_step_s"]),
            f"{found['ratio']:.2f}" if name == "weft" else "",
        )
    out = report.console()
    out.print(table)
    out.print(AGREEMENT.sentence(found))


def main() -> dict[str, Any]:
    found = run()
    show(found)
    return {"digits": found}


if __name__ == "__main__":
    common.command_line("LeNet-5 on handwritten digits, native and weft", main)
