"""An encoder-decoder that rewrites dates, once on PyTorch's recurrent layers and once on weft's.

Pairs are made by rule: a day between 1900 and 2099 as people write it ("march 7, 1984",
"7 mar 1984", "7.3.1984") and as ISO 8601 has it ("1984-03-07"). The encoder is an LSTM over the
source, reversed if asked for (Sutskever et al. 2014); its last state starts the decoder, an LSTM
cell that is fed the characters written so far. Asserts that the loss curves of both libraries begin
alike and that both models write at least 95 % of unseen dates without a fault, by a beam search on
single steps.
"""

from __future__ import annotations

import datetime
import functools
import random
import time
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

import common
from weft.bench import report

SOURCE_CHARACTERS = " .,0123456789abcdefghijklmnopqrstuvwxyz"
TARGET_CHARACTERS = "0123456789-"
SOURCE_LENGTH = len("september 30, 2099")
TARGET_LENGTH = len("2099-09-30")
HIDDEN = 128
BATCH = 128
UPDATES = 400
UNSEEN = 500
BEAM = 3
CLIP = 1.0
LEARNING_RATE = 4e-3
LEAST_EXACT = 0.95
# The loss falls sharply, and roundings move that by some steps: what is compared is the height of
# the curves, not their ratio near zero.
AGREEMENT = common.Agreement(early_steps=20, early=1e-5, late=0.1, floor=1.0)


class Writer(nn.Module):
    """Source characters → target characters."""

    def __init__(self, reverse_source: bool) -> None:
        super().__init__()
        self.reverse_source = reverse_source
        self.source = nn.Embedding(len(SOURCE_CHARACTERS), HIDDEN)
        self.encoder = nn.LSTM(HIDDEN, HIDDEN)
        # One more for the character before the first.
        self.target = nn.Embedding(len(TARGET_CHARACTERS) + 1, HIDDEN)
        self.decoder = nn.LSTMCell(HIDDEN, HIDDEN)
        self.output = nn.Linear(HIDDEN, len(TARGET_CHARACTERS))

    def start(self, source: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """source [T, N] → the decoder's state and its first input [N]."""
        x = source.flip(0) if self.reverse_source else source
        _, (h, c) = self.encoder(self.source(x))
        first = torch.full((source.size(1),), len(TARGET_CHARACTERS))
        return (h[0], c[0]), first

    def step(
        self, written: Tensor, state: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The last character [N] → logits of the next [N, characters], and the state."""
        state = self.decoder(self.target(written), state)
        return self.output(state[0]), state

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Logits [T', N, characters] of `target` [T', N], each given the true ones before it."""
        state, written = self.start(source)
        logits = []
        for following in target:
            found, state = self.step(written, state)
            logits.append(found)
            written = following
        return torch.stack(logits)


@torch.no_grad()
def beam_search(model: Writer, source: Tensor, width: int) -> Tensor:
    """The likeliest target [T', N] that is found with `width` candidates for each source."""
    batch = source.size(1)
    state, written = model.start(source)
    # Candidates of one source are neighbours; at first there is one, and copies of no weight.
    state = (state[0].repeat_interleave(width, 0), state[1].repeat_interleave(width, 0))
    written = written.repeat_interleave(width)
    score = torch.full((batch, width), float("-inf"))
    score[:, 0] = 0
    texts = torch.empty((0, batch * width), dtype=torch.long)
    for _ in range(TARGET_LENGTH):
        logits, state = model.step(written, state)
        chances = logits.log_softmax(1).view(batch, width, -1) + score.unsqueeze(2)
        score, best = chances.flatten(1).topk(width)
        parent = best // logits.size(1) + torch.arange(batch).unsqueeze(1) * width
        written, parent = (best % logits.size(1)).flatten(), parent.flatten()
        state = (state[0][parent], state[1][parent])
        texts = torch.cat([texts[:, parent], written.unsqueeze(0)])
    return texts[:, ::width]


def written_by_people(day: datetime.date, choice: random.Random) -> str:
    month = day.strftime("%B").lower()
    return choice.choice(
        [
            f"{month} {day.day}, {day.year}",
            f"{day.day} {month[:3]} {day.year}",
            f"{day.day}.{day.month}.{day.year}",
        ]
    )


@functools.cache
def pairs() -> tuple[Tensor, Tensor]:
    """(sources [T, days], targets [T', days]) of all days in a random order; the same each time."""
    first, last = datetime.date(1900, 1, 1), datetime.date(2099, 12, 31)
    days = [datetime.date.fromordinal(n) for n in range(first.toordinal(), last.toordinal() + 1)]
    choice = random.Random(20)
    choice.shuffle(days)
    sources = [
        [SOURCE_CHARACTERS.index(c) for c in written_by_people(day, choice).rjust(SOURCE_LENGTH)]
        for day in days
    ]
    targets = [[TARGET_CHARACTERS.index(c) for c in day.isoformat()] for day in days]
    return torch.tensor(sources).t().contiguous(), torch.tensor(targets).t().contiguous()


def text(target: Tensor) -> str:
    return "".join(TARGET_CHARACTERS[i] for i in target.tolist())


def run(
    updates: int = UPDATES, check_exact: bool = True, reverse_source: bool = False
) -> dict[str, Any]:
    """Trains both models; returns what was found.

    Raises:
        AssertionError: if the curves or the share of exact answers are not as promised.
    """
    sources, targets = pairs()
    unseen, seen = slice(0, UNSEEN), UNSEEN
    torch.manual_seed(20)
    runs = common.pair(Writer(reverse_source))
    batches = torch.randint(seen, sources.size(1), (updates, BATCH))
    optimizers = {
        name: torch.optim.Adam(r.model.parameters(), lr=LEARNING_RATE) for name, r in runs.items()
    }
    schedules = {
        name: torch.optim.lr_scheduler.OneCycleLR(o, LEARNING_RATE, updates, pct_start=0.2)
        for name, o in optimizers.items()
    }

    def step(library: str, index: int) -> float:
        model, batch = runs[library].model, batches[index]
        target = targets[:, batch]
        loss = F.cross_entropy(model(sources[:, batch], target).flatten(0, 1), target.flatten())
        optimizers[library].zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizers[library].step()
        schedules[library].step()
        return loss.item()

    common.train(runs, updates, step, "dates")
    exact, searched = {}, {}
    for name, r in runs.items():
        begin = time.perf_counter()
        answers = beam_search(r.model, sources[:, unseen], BEAM)
        searched[name] = time.perf_counter() - begin
        exact[name] = (answers == targets[:, unseen]).all(0).double().mean().item()
        if check_exact and exact[name] < LEAST_EXACT:
            raise AssertionError(f"{name} writes {exact[name]:.1%} of the unseen dates right")
    examples = [
        ("".join(SOURCE_CHARACTERS[i] for i in sources[:, n].tolist()).strip(), text(answers[:, n]))
        for n in range(3)
    ]
    return common.result(
        runs, AGREEMENT.check(runs), exact=exact, search_s=searched, examples=examples
    )


def show(found: dict[str, Any]) -> None:
    table = Table(title=f"dates by an encoder-decoder, B {BATCH}, H {HIDDEN}, beam of {BEAM}")
    for name in ("layers", "last loss", "exact", "time per step", "ratio", "beam search"):
        table.add_column(name, justify="right")
    for name in common.LIBRARIES:
        table.add_row(
            name,
            f"{found[f'{name}_losses'][-1]:.4f}",
            f"{found['exact'][name]:.1%}",
            report.seconds(found[f"{name}_step_s"]),
            f"{found['ratio']:.2f}" if name == "weft" else "",
            report.seconds(found["search_s"][name]),
        )
    out = report.console()
    out.print(table)
    out.print(AGREEMENT.sentence(found))
    for source, answer in found["examples"]:
        out.print(f"{source} → {answer}", markup=False, highlight=False)


def main() -> dict[str, Any]:
    found = run()
    show(found)
    return {"dates": found}


if __name__ == "__main__":
    common.command_line("an encoder-decoder that rewrites dates, native and weft", main)
