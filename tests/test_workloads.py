"""A few steps of each workload: native and weft learn alike."""

from __future__ import annotations

import datetime
from collections.abc import Iterator

import pytest
import torch

import characters
import common
import dates
import digits
import photographs
import regions


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Work as small as this gains nothing from threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_digits_curves_agree() -> None:
    found = digits.run(updates=4, check_accuracy=False)
    assert found["steps"] == len(found["weft_losses"]) == len(found["native_losses"])
    assert found["weft_losses"][-1] < found["weft_losses"][0]
    assert found["native_step_s"] > 0 < found["weft_step_s"]


@pytest.mark.parametrize("layers", characters.LAYERS)
@pytest.mark.parametrize("cell", characters.CELLS)
def test_character_curves_agree(cell: str, layers: int) -> None:
    found = characters.run(cell, layers, updates=3, check_gain=False, sample_length=20)
    assert found["weft_losses"][-1] < found["weft_losses"][0]
    for sample in found["sample"].values():
        assert sample.startswith("def ")
        assert len(sample) == 24


@pytest.mark.parametrize("task", photographs.TASKS)
def test_photograph_curves_agree(task: str) -> None:
    found = photographs.TASKS[task](updates=4, check=False)  # too few to see it learn
    assert found["steps"] == len(found["weft_losses"]) == len(found["native_losses"])
    assert set(found["found"]) == set(common.LIBRARIES)
    photographs.show({task: found})


def test_patches_of_photographs() -> None:
    (images, labels), (test_images, test_labels) = photographs.patches()
    assert images.shape[1:] == test_images.shape[1:] == (3, 32, 32)
    assert images.abs().max() <= 1
    assert set(labels.tolist()) == set(test_labels.tolist()) == {0, 1}
    assert len(labels) == len(images)


def test_stages_become_blocks() -> None:
    runs = photographs.pair(photographs.Resolution())
    names = [type(m).__name__ for m in runs["weft"].model.modules()]
    assert names.count("ConvBlock2d") == 5
    assert "Stage" not in names
    x = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(runs["weft"].model(x), runs["native"].model(x))


def test_pooled_windows_are_their_cut_outs() -> None:
    found = regions.run(windows=30, side=200, window_side=64)
    assert found["photograph"] == [200, 300]
    assert found["ratio"] == found["rcnn_s"] / found["spp_s"] > 0
    regions.show(found)


def test_a_wrong_pooled_window_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = regions.weft.nn.SpatialPyramidPool2d.forward

    def wrong(self: torch.nn.Module, *args: torch.Tensor) -> torch.Tensor:
        return right(self, *args) + 1e-6

    monkeypatch.setattr(regions.weft.nn.SpatialPyramidPool2d, "forward", wrong)
    with pytest.raises(AssertionError, match="not that of the cut-out map"):
        regions.run(windows=3, side=200, window_side=64)


def test_a_sample_is_the_same_for_the_same_seed() -> None:
    torch.manual_seed(20)
    model = characters.CharacterModel("LSTM", 2, 3)
    samples = [characters.sample(model, "abc", "ab", 50, 1.0, seed) for seed in (1, 1, 2)]
    assert samples[0] == samples[1] != samples[2]


@pytest.mark.parametrize("reverse_source", [False, True])
def test_date_curves_agree(reverse_source: bool) -> None:
    found = dates.run(updates=3, check_exact=False, reverse_source=reverse_source)
    assert found["weft_losses"][-1] < found["weft_losses"][0]
    assert set(found["exact"]) == set(common.LIBRARIES)


def test_dates_are_what_people_write() -> None:
    sources, targets = dates.pairs()
    assert sources.shape == (dates.SOURCE_LENGTH, 73049)
    assert len({dates.text(targets[:, n]) for n in range(1000)}) == 1000
    for n in range(20):
        text = "".join(dates.SOURCE_CHARACTERS[i] for i in sources[:, n].tolist())
        day = datetime.date.fromisoformat(dates.text(targets[:, n]))
        assert str(day.year) in text
        assert str(day.day) in text


def test_a_beam_that_holds_everything_finds_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    characters_ = len(dates.TARGET_CHARACTERS)
    monkeypatch.setattr(dates, "TARGET_LENGTH", 2)
    torch.manual_seed(20)
    model = dates.Writer(reverse_source=False)
    for parameter in model.parameters():
        parameter.data *= 4
    source = dates.pairs()[0][:, :3]
    texts = torch.cartesian_prod(torch.arange(characters_), torch.arange(characters_))
    for n in range(3):
        repeated = source[:, n : n + 1].expand(-1, len(texts))
        with torch.no_grad():
            chances = model(repeated, texts.t()).log_softmax(2)
        score = chances.gather(2, texts.t().unsqueeze(2)).sum((0, 2))
        found = dates.beam_search(model, source[:, n : n + 1], characters_)
        assert found[:, 0].tolist() == texts[score.argmax()].tolist()


def test_promises_that_are_not_kept_are_errors() -> None:
    with pytest.raises(AssertionError, match=r"names .*% of the images rightly"):
        digits.run(updates=1)
    with pytest.raises(AssertionError, match=r"names .*% of the images rightly"):
        photographs.run_origin(updates=1)
    with pytest.raises(AssertionError, match="dB over interpolation"):
        photographs.run_resolution(updates=1)
    with pytest.raises(AssertionError, match=r"writes .*% of the unseen dates right"):
        dates.run(updates=1)
    with pytest.raises(AssertionError, match="the last loss is"):
        characters.run("GRU", 1, updates=1, sample_length=1)


def test_curves_that_part_are_errors() -> None:
    runs = {name: common.Run(torch.nn.Identity(), losses=[2.0, 1.0]) for name in common.LIBRARIES}
    agreement = common.Agreement(early_steps=1, early=1e-5, late=1e-2)
    assert agreement.check(runs) == {"early": 0.0, "late": 0.0}
    runs["weft"].losses = [2.0, 1.02]
    with pytest.raises(AssertionError, match="late loss curves differ"):
        agreement.check(runs)
    runs["weft"].losses = [2.001, 1.0]
    with pytest.raises(AssertionError, match="early loss curves differ"):
        agreement.check(runs)
    runs["weft"].losses = [2.0, float("nan")]
    with pytest.raises(AssertionError, match="late loss curves differ"):
        agreement.check(runs)


def test_a_model_without_weft_layers_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="exchanged no layer"):
        common.pair(torch.nn.Linear(2, 2))


def test_unigram_entropy() -> None:
    encoded, alphabet = characters.encode("aabb")
    assert alphabet == "ab"
    assert characters.unigram_entropy(encoded) == pytest.approx(0.6931, abs=1e-4)
