"""A character language model, once on PyTorch's recurrent layers and once on weft's.

The text is source code of Python's standard library, which every installation carries. The model is
embedding → recurrent layers → linear, trained to predict the next character by back-propagation
through 64 steps with gradients clipped by norm: with LSTM, GRU and Elman layers, one and two of
them. Asserts that the loss curves of both libraries agree and that the models have learned; then
lets both write by feeding their predictions back, and prints characters per second.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

import common
from weft.bench import report

FILES = ("argparse.py", "textwrap.py", "inspect.py", "tarfile.py", "typing.py")
CHARACTERS = 300_000
BATCH = 16
STEPS = 64  # of back-propagation through time
HIDDEN = 128
UPDATES = 250
CLIP = 1.0
TEMPERATURE = 0.6
# A model that knows only how frequent characters are has the text's unigram entropy as its loss.
LEAST_GAIN = 0.75
AGREEMENT = common.Agreement(early_steps=10, early=1e-5, late=0.05)
CELLS = {"LSTM": nn.LSTM, "GRU": nn.GRU, "Elman": nn.RNN}
LAYERS = (1, 2)


class CharacterModel(nn.Module):
    """Next-character logits from recurrent layers."""

    def __init__(self, cell: str, layers: int, alphabet: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(alphabet, HIDDEN)
        self.layers = CELLS[cell](HIDDEN, HIDDEN, layers)
        self.output = nn.Linear(HIDDEN, alphabet)

    def forward(self, characters: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """characters [T, B] → logits [T, B, alphabet], and the state after the last step."""
        hidden, state = self.layers(self.embedding(characters), state)
        return self.output(hidden), state


def text() -> str:
    """The first `CHARACTERS` characters of `FILES`, as they are in this Python."""
    folder = Path(sysconfig.get_path("stdlib"))
    whole = "".join((folder / name).read_text(encoding="utf-8") for name in FILES)
    return whole[:CHARACTERS]


def encode(source: str) -> tuple[Tensor, str]:
    """The text as indices [characters] into its alphabet, and the alphabet."""
    alphabet = "".join(sorted(set(source)))
    index = {c: i for i, c in enumerate(alphabet)}
    return torch.tensor([index[c] for c in source]), alphabet


def unigram_entropy(encoded: Tensor) -> float:
    """In nats a character."""
    share = encoded.bincount().double() / len(encoded)
    return float(-(share * share.clamp(min=1e-12).log()).sum())


def _detached(state: Any) -> Any:
    return tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()


@torch.no_grad()
def sample(
    model: nn.Module, alphabet: str, start: str, length: int, temperature: float, seed: int
) -> str:
    """`start` continued by `length` characters, each drawn from softmax(logits / temperature)."""
    generator = torch.Generator().manual_seed(seed)
    written = start
    logits, state = model(torch.tensor([[alphabet.index(c)] for c in start]))
    for _ in range(length):
        chance = (logits[-1, 0] / temperature).softmax(0)
        drawn = torch.multinomial(chance, 1, generator=generator)
        written += alphabet[int(drawn)]
        logits, state = model(drawn[None], state)
    return written


def run(
    cell: str,
    layers: int,
    updates: int = UPDATES,
    check_gain: bool = True,
    sample_length: int = 200,
) -> dict[str, Any]:
    """Trains both models of one kind; returns what was found.

    Raises:
        AssertionError: if the curves or the last losses are not as promised.
    """
    encoded, alphabet = encode(text())
    # BATCH readers, each going through its own part of the text.
    columns = encoded[: len(encoded) // BATCH * BATCH].reshape(BATCH, -1).t().contiguous()
    torch.manual_seed(20)
    runs = common.pair(CharacterModel(cell, layers, len(alphabet)))
    states: dict[str, Any] = dict.fromkeys(runs)
    optimizers = {name: torch.optim.Adam(r.model.parameters(), lr=3e-3) for name, r in runs.items()}
    per_pass = (len(columns) - 1) // STEPS

    def step(library: str, index: int) -> float:
        begin = index % per_pass * STEPS
        if begin == 0:
            states[library] = None
        characters, following = (columns[b : b + STEPS] for b in (begin, begin + 1))
        model = runs[library].model
        logits, state = model(characters, states[library])
        states[library] = _detached(state)
        loss = F.cross_entropy(logits.flatten(0, 1), following.flatten())
        optimizers[library].zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizers[library].step()
        return loss.item()

    common.train(runs, updates, step, f"{cell} x{layers}")
    entropy = unigram_entropy(encoded)
    last = {name: sum(r.losses[-20:]) / len(r.losses[-20:]) for name, r in runs.items()}
    for name, loss in last.items():
        if check_gain and loss > LEAST_GAIN * entropy:
            raise AssertionError(
                f"{cell}, {name}: the last loss is {loss:.3f}, the unigram entropy {entropy:.3f}"
            )
    speed = {name: BATCH * STEPS / r.step_seconds for name, r in runs.items()}
    return common.result(
        runs,
        AGREEMENT.check(runs),
        unigram_entropy=entropy,
        last_loss=last,
        characters_per_s=speed,
        sample={
            name: sample(r.model, alphabet, "def ", sample_length, TEMPERATURE, seed=20)
            for name, r in runs.items()
        },
    )


def show(found: dict[str, dict[str, Any]]) -> None:
    table = Table(
        title=f"character model on Python's standard library, B {BATCH}, T {STEPS}, H {HIDDEN}"
    )
    for name in ("model", "library", "last loss", "unigram entropy", "characters/s", "ratio"):
        table.add_column(name, justify="right")
    for model, one in found.items():
        for name in common.LIBRARIES:
            table.add_row(
                model,
                name,
                f"{one['last_loss'][name]:.4f}",
                f"{one['unigram_entropy']:.4f}",
                f"{one['characters_per_s'][name]:,.0f}",
                f"{one['ratio']:.2f}" if name == "weft" else "",
            )
    out = report.console()
    out.print(table)
    for model, one in found.items():
        out.print(f"{model}: {AGREEMENT.sentence(one)}")
        for name in common.LIBRARIES:
            out.print(f"{model}, {name}, writes:", style="bold")
            out.print(one["sample"][name], markup=False, highlight=False)


def main() -> dict[str, Any]:
    found = {f"{cell} x{layers}": run(cell, layers) for cell in CELLS for layers in LAYERS}
    show(found)
    return {f"characters {model}": one for model, one in found.items()}


if __name__ == "__main__":
    common.command_line("a character language model, native and weft", main)
