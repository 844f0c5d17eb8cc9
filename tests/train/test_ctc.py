"""Stage "ctc" at toy size: bars for letters, on a tower that nobody trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cogvlm.errors import ConfigError
from cogvlm.models.ctc import ALPHABET, CTCHead, certainty, spelled
from cogvlm.processor.image import normalise
from cogvlm.train import recipe as recipes
from cogvlm.train.ctc import CTCObjective, text_of
from cogvlm.train.lines import Row
from cogvlm.train.loop import Loop, Schedule
from cogvlm.train.pages import Block, Page, PageData, Pages
from cogvlm.train.run import objective as build
from fakes import toy_model
from train.bars import NATIVE, PLAN, Bars, common


class Barred(Pages):
    """Pages of two strips of bars each."""

    def __getitem__(self, index: int) -> Page:
        blocks = []
        for line in map(Bars(8).line_at, (1000 + 2 * index, 1001 + 2 * index)):
            points = np.stack([line.centers, line.feet], 1)
            pixels = normalise(line.image, line.image.width, line.image.height)
            blocks.append(Block(pixels, (Row(line.text, points),)))
        return Page(None, tuple(blocks))  # type: ignore[arg-type]


def test_a_head_names_two_steps_a_column() -> None:
    torch.manual_seed(0)
    head = CTCHead(12, tall=4, hidden=8)
    columns = torch.randn(2, 4, 20, 12)
    logits = head(columns.flatten(1, 2))
    assert logits.shape == (2, 40, len(ALPHABET) + 1)
    # What stands above what matters, and what is far away does not.
    assert not torch.allclose(head(columns.flip(1).flatten(1, 2)), logits, atol=1e-3)
    changed = columns.clone()
    changed[:, :, -1] += 1.0
    again = head(changed.flatten(1, 2))
    assert not torch.allclose(again[:, -2:], logits[:, -2:], atol=1e-3)
    torch.testing.assert_close(again[:, : 2 * (20 - 7)], logits[:, : 2 * (20 - 7)])


def test_doubled_letters_need_a_pause_between_them() -> None:
    l, none = ALPHABET.index("l") + 1, 0  # noqa: E741
    assert spelled([l, l, l]) == "l" and spelled([l, none, l]) == "ll" and spelled([]) == ""


def test_certainty_is_of_the_characters_alone() -> None:
    shares = torch.full((3, len(ALPHABET) + 1), 1e-9)
    shares[0, 0], shares[1, 5], shares[2, 7] = 1.0, 0.9, 0.4
    shares[1, 6], shares[2, 0] = 0.1, 0.3
    assert certainty(shares.log()) == pytest.approx((0.9 * 0.4 / 0.7) ** 0.5)  # 0.7: the sum
    assert certainty(shares[:1].log()) == 0.0 and certainty(shares[:0].log()) == 0.0


def test_strips_say_their_rows_from_left_to_right() -> None:
    rows = tuple(
        Row(t, np.array([[x, 5.0]] * len(t), np.float32)) for t, x in (("b ", 9), ("a", 1))
    )
    assert text_of(Block(np.zeros((3, 28, 28), np.float32), rows)) == "a b"
    assert text_of(Block(np.zeros((3, 28, 28), np.float32), ())) == ""


def test_the_head_learns_the_bars_and_the_tower_stays(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vision = toy_model(vision_config=NATIVE | {"ctc_hidden": 48}).model.vision
    pages = Barred(PageData(per_step=4), PLAN, 0, False)
    lines: dict[str, Any] = common(8)
    objective = CTCObjective(
        trained=vision, pages=pages, eval_pages=pages, eval_page_count=4, **lines
    )
    before = {k: v.clone() for k, v in vision.state_dict().items()}
    first = objective.evaluate()
    plan = Schedule(steps=60, lr=3e-3, warmup=5, log_every=20, eval_every=99, save_every=99)
    Loop(objective, plan, tmp_path).run()
    last = objective.evaluate()
    assert last["line_cer"] < 0.1 < first["line_cer"] and last["page_cer"] < 0.1
    changed = {k for k, v in vision.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and all(k.startswith("ctc.") for k in changed)
    saved = load_file(tmp_path / "vision.safetensors")
    assert saved.keys() == {f"model.vision.{k}" for k in before if k.startswith("ctc.")}


def test_more_letters_than_steps_are_no_error() -> None:
    vision = toy_model(vision_config=NATIVE | {"ctc_hidden": 8}).model.vision
    pages = Barred(PageData(per_step=1), PLAN, 0, False)
    lines: dict[str, Any] = common(8)
    objective = CTCObjective(trained=vision, pages=pages, eval_pages=pages, **lines)
    strip = next(objective.batches(0))[0]
    loss, _ = objective.loss([replace(strip, text="a" * 99)])
    assert float(loss.detach()) == 0.0


def test_a_recipe_of_the_stage_needs_a_head_and_pages(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("stage: ctc\nschedule: {steps: 2}\n")
    with pytest.raises(ConfigError, match=r"set vision_config\.ctc_hidden"):
        build(recipes.load(path))
    path.write_text("stage: ctc\nschedule: {steps: 2}\nconfig: {vision_config: {ctc_hidden: 8}}\n")
    with pytest.raises(ConfigError, match="give pages"):
        build(recipes.load(path))
