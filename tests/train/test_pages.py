"""Pages as training pictures: points, cells, conversations spelled as they are cut."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from cogvlm.config import preset
from cogvlm.data.engine.questions import PLACES
from cogvlm.data.engine.step import Picture, Piece, Sample, Truth, Turn
from cogvlm.errors import ConfigError
from cogvlm.processor import Processor
from cogvlm.processor.image import NativePixels
from cogvlm.processor.lines import LinePixels, read_out
from cogvlm.processor.template import TEMPLATES
from cogvlm.reader import StripReader
from cogvlm.train.align import AlignObjective, CellPieces, ReaderWithAdapter, cells_of
from cogvlm.train.answer import Prompt
from cogvlm.train.distributed import World
from cogvlm.train.instruct import InstructObjective, Spelled
from cogvlm.train.lines import Row, Sheet
from cogvlm.train.loop import Loop, Schedule
from cogvlm.train.pages import Block, Page, PageData, Pages, rows_of, truth_of
from cogvlm.train.quote import Reading
from cogvlm.train.read import decode_columns
from cogvlm.train.recipe import load
from cogvlm.train.stages import grown, pixel_plan
from fakes import toy_model
from train.bars import Bytes, common

PLAN = NativePixels(14, (2, 1), 8, 12, max_scale=1.0, min_rows=2)
CONFIG = {"grid": "native", "max_rows": 8, "max_cols": 12, "num_positions": 97}


def words(y: float, *texts: str, gap: float = 6.0) -> list[Piece]:
    """Words of 10 pixels a character, 14 high and 4 more where they have tails."""
    out, x = [], 8.0
    for text in texts:
        tail = 4.0 * any(c in "gjpqy" for c in text)
        out.append(Piece(text, (x, y - 14, x + 10 * len(text), y + tail)))
        x += 10 * len(text) + gap
    return out


def truth(*lines: list[Piece]) -> Truth:
    rows = tuple(Piece(" ".join(w.text for w in line), (0, 0, 1, 1), "line") for line in lines)
    return Truth("", tuple(w for line in lines for w in line), rows)


def test_points_of_a_line_are_level_whatever_its_letters() -> None:
    (row,) = rows_of(truth(words(40, "Bad", "dog", "Apply")))
    assert row.text == "Bad dog Apply"
    assert np.ptp(row.points[:, 1]) < 1.5 and 34 < row.points[0, 1] < 40
    assert (np.diff(row.points[:, 0]) > 0).all()
    assert 8 < row.points[0, 0] < 18


def test_a_tilted_line_keeps_its_slope() -> None:
    tilted = [
        replace(w, box=(w.box[0], w.box[1] + w.box[0] / 10, w.box[2], w.box[3] + w.box[0] / 10))
        for w in words(40, "HERE", "STAND", "WORDS", "ALONG")
    ]
    (row,) = rows_of(truth(tilted))
    slope = np.polyfit(row.points[:, 0], row.points[:, 1], 1)[0]
    assert slope == pytest.approx(0.1, abs=0.02)


def test_a_wide_gap_parts_a_line_and_a_table_has_bars_that_nobody_sees() -> None:
    line = words(40, "Milk", "1.20", gap=60.0)
    bars = Truth("", tuple(line), (Piece("Milk | 1.20", (0, 0, 1, 1), "row"),))
    for known in (truth(line), bars, Truth("", tuple(line))):
        assert [row.text for row in rows_of(known)] == ["Milk", "1.20"]


def page(*lines: list[Piece], turns: tuple[Turn, ...] = ()) -> Page:
    known = truth(*lines)
    noise = np.random.default_rng(0).integers(0, 255, (84, 112, 3)).astype(np.uint8)
    picture = Picture.of(Image.fromarray(noise), known)  # so that every cell looks different
    sample = Sample("a", "list", "made-up", "CC0-1.0", (picture,), turns, seed=1)
    return Pages(PageData(trim=0.0), PLAN, 0, False).page(sample)


def test_a_page_keeps_its_size_and_its_points() -> None:
    made = page(words(26, "ab"), words(54, "cd"))
    assert made.blocks[0].pixels.shape == (3, 84, 112)
    cells = cells_of(made.blocks[0].rows, (3, 8), (28, 14))
    assert cells == {(0, 0): "a", (0, 1): "b", (1, 0): "c", (1, 1): "d"}


def test_trimming_moves_points_with_the_picture() -> None:
    whole = page(words(40, "ab"))
    pages = Pages(PageData(trim=1.0), PLAN, 0, False)
    cut = pages.page(pages.trimmed(whole.sample))
    x0, y0, x1, y1 = pages.frame(whole.sample, np.random.default_rng((1, 2)))
    assert (x0, y0) != (0, 0) or (x1, y1) != (112, 84)
    height, width = cut.blocks[0].pixels.shape[1:]
    stretch = width / (x1 - x0), height / (y1 - y0)
    expected = (whole.blocks[0].rows[0].points - [x0, y0]) * stretch
    np.testing.assert_allclose(cut.blocks[0].rows[0].points, expected, atol=1e-3)


def test_small_pictures_are_enlarged_to_the_least_rows_only() -> None:
    assert PLAN.grid(40, 14) == (2, 6)  # twice as large
    assert PLAN.grid(84, 56) == (4, 6)  # as it is
    assert PLAN.grid(1680, 1120) == (8, 12)
    with pytest.raises(ConfigError, match="max_scale is 0"):
        NativePixels(max_scale=0)


def align() -> AlignObjective:
    model = toy_model(vision_config=CONFIG | {"adapter_merge": [2, 1]})
    return AlignObjective(
        trained=ReaderWithAdapter(model.model.vision, 48),
        patch=14,
        embeddings=model.model.embed_tokens.weight.detach(),
        pieces=CellPieces(Bytes()),
        blank=10,
        merge=(2, 1),
        **common(),  # type: ignore[arg-type]
    )


def test_align_learns_pages_row_by_row() -> None:
    torch.manual_seed(0)
    objective = align()
    made = page(words(26, "ab"), words(54, "cd", "e", gap=16.0))
    (block,) = made.blocks
    sheet = Sheet(block.pixels[None], [block.rows], 0.5)
    assert decode_columns(objective.row_labels(sheet)[0].numpy()) == ["ab", "cd e", ""]
    places, spelled = objective.targets(sheet)
    assert len(places) == len(spelled) == 6
    loss, _ = objective.loss(sheet)
    whole, _ = objective.loss(replace(sheet, share=1.0))
    assert float(loss.detach()) == pytest.approx(0.5 * float(whole.detach()), rel=0.2)
    optimizer = torch.optim.AdamW(objective.trained.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        objective.loss(sheet)[0].backward()
        optimizer.step()
    assert objective.loss(sheet)[1]["piece_accuracy"] == 0.5  # all of its share
    (pair,) = objective.read_out(sheet)
    assert pair == ("ab\ncd e", "ab\ncd e")


def test_positions_grow_by_rows() -> None:
    table = torch.randn(1 + 4 * 6, 8)
    more = grown(table, (10, 6))
    assert more.shape == (61, 8) and torch.equal(more[0], table[0])
    cells = more[1:].view(10, 6, 8)
    own = cells - table[1:].view(4, 6, 8).mean(0)
    torch.testing.assert_close(own, own[:, :1].expand_as(own))  # a row is the same in all columns
    assert torch.pdist(own[:, 0]).min() > 0.01
    assert grown(table, (4, 6)) is table and grown(table, (4, 7)) is table


def instruct() -> InstructObjective:
    model = toy_model(
        vision_config=CONFIG | {"adapter_merge": [2, 1]}, expert_rank=4, text_rank=4,
        image_positions="flat", template_version="chatml",
    )  # fmt: skip
    processor = Processor(Bytes(), TEMPLATES["chatml"], PLAN, 3)
    pages = Fixed(PageData(turns=2, per_step=2), PLAN, 0, False)
    return InstructObjective(
        trained=model,
        processor=processor,
        prompts=[Prompt.of(processor, "What?")],
        scales={"tower": 0.0, "adapter": 1.0, "experts": 1.0, "text": 1.0},
        seed=0,
        pages=pages,
        eval_pages=pages,
        eval_page_count=2,
        **common(),  # type: ignore[arg-type]
    )


class Fixed(Pages):
    """The same page for ever."""

    def __getitem__(self, index: int) -> Page:
        turns = (
            Turn("user", "<image>\nFirst?"),
            Turn("assistant", "ab"),
            Turn("user", "All?"),
            Turn("assistant", "ab\ncd e."),
        )
        return page(words(26, "ab"), words(54, "cd", "e", gap=16.0), turns=turns)


def test_conversations_are_the_processors_own_but_for_the_spelling() -> None:
    objective = instruct()
    made = objective.pages[0]
    ours = objective.conversation(made)
    theirs = objective.processor.encode(made.sample.record().messages, train=True)
    # Cells of one character each, so the pieces are the same.
    assert ours["input_ids"][0].tolist() == theirs.input_ids.tolist()
    assert ours["token_type_ids"][0].tolist() == theirs.token_type_ids.tolist()
    assert theirs.labels is not None and ours["labels"][0].tolist() == theirs.labels.tolist()
    asked = objective.conversation(made, answer=False)["input_ids"]
    first = objective.processor.encode(made.sample.record().messages[:1])
    assert asked[0].tolist() == first.input_ids.tolist()
    objective.longest = asked.shape[1] + 4
    short = objective.conversation(made)["labels"]
    assert [i for i in short[0].tolist() if i >= 0] == [ord("a"), ord("b"), 2]


@pytest.mark.parametrize("question", ["What is it?", "Where is it?"])
def test_pages_that_are_read_are_the_processors_own(question: str) -> None:
    font = ImageFont.load_default(28)
    image = Image.new("RGB", (420, 160), (240, 240, 240))
    for y, text in ((10, "Milk"), (60, "Bread and"), (110, "Butter")):
        ImageDraw.Draw(image).text((12, y), text, fill=(0, 0, 0), font=font)
    told = (Turn("user", f"<image>\n{question}"), Turn("assistant", "nowhere"))
    sample = Sample(
        "a", "list", "made-up", "CC0-1.0", (Picture.of(image, Truth("")),), told, seed=1
    )
    vision = {"max_rows": 4, "max_cols": 64, "num_positions": 257, "adapter_merge": [4, 1]}
    model = toy_model(
        vision_config=CONFIG | vision | {"ctc_hidden": 8}, expert_rank=4, text_rank=4,
        image_positions="flat", template_version="chatml", max_position_embeddings=2048,
    )  # fmt: skip
    plan = LinePixels(14, (4, 1), 4, 64, shown=2, places=True)
    processor = Processor(
        Bytes(), TEMPLATES["chatml"], plan, 3, reader=StripReader(model.model.vision.spell)
    )
    pages = Pages(PageData(turns=2), plan, 0, False)
    made = pages.page(sample)
    objective = replace(instruct(), trained=model, processor=processor, pages=pages)
    ours = objective.conversation(made)
    theirs = processor.encode(sample.record().messages, train=True)
    assert len(made.blocks) == 3 and len(ours["pixel_values"]) == 2
    assert ("[[" in processor.decode(theirs.input_ids)) == question.startswith("Where")
    for name, array in (("input_ids", theirs.input_ids), ("labels", theirs.labels)):
        assert ours[name][0].tolist() == array.tolist()  # type: ignore[union-attr]
    assert objective.length(made) > 20
    batch = objective.train_pools.pool(0)[0]
    strips = [np.zeros((3, 56, 28), np.float32) for _ in batch.texts]
    batch = replace(batch, pixels=np.stack(strips))
    (said,) = model.model.vision.spell(strips[:1])
    told = objective.readings(batch)
    assert told[0] == read_out(said, "\n")
    # What was read is the answer, right or wrong; where nothing was, the truth.
    assert processor.decode(objective.answers(batch, 4, told)[0]) == (said or batch.texts[0])


def test_answers_quote_what_was_read() -> None:
    made = page(words(26, "Milk", "bread", "Butter"))
    blocks = [replace(made.blocks[0], behind="\n", place="[[010,010,500,300]]")]
    reading = Reading.of(blocks, ["Nilk bread Butter"])
    assert reading.otherwise == {"Milk": "Nilk"} and not reading.lost
    assert reading.answer("", '"Milk" comes\nbefore Milk.') == '"Nilk" comes\nbefore Nilk.'
    said = reading.answer("where is", "Milkman is at [[012,010,490,300]].")
    assert said == "Milkman is at [[010,010,500,300]]."
    assert reading.answer("where is", "at [[600,010,690,300]]") is None  # was not told
    assert reading.answer("read", "Milk bread\nButter") == "Nilk bread Butter"
    assert reading.answer("read", "another text") is None
    for read in ("Nilkbread Butter", "xyz bread Butter"):  # other words; nothing of it was read
        lost = Reading.of(blocks, [read])
        assert not lost.otherwise and "Milk" in lost.lost
        assert lost.answer("read a word", "Milk") is None
        assert lost.answer("", "Butter") == "Butter"


def test_what_was_not_read_is_not_asked() -> None:
    made = page(words(26, "Milk", "bread", "Butter"))
    turns = [Turn(role, text) for pair in (
        ("<image>\nWhat is the first word?", "Milk"), ("And the last?", "Butter"),
        ("Where is it?", "[[900,900,990,990]]"), ("What is this?", "A page of text."),
    ) for role, text in zip(("user", "assistant"), pair, strict=True)]  # fmt: skip
    told = replace(
        made.sample, turns=tuple(turns), tasks=("a word", "a word", "where is", "caption")
    )
    kept = Reading.of(made.blocks, ["xyz bread Butter"]).conversation(told)
    assert [turn.text for turn in kept.turns] == [
        "<image>\nAnd the last?", "Butter", "What is this?", "A page of text.",
    ]  # fmt: skip
    nothing = Reading.of(made.blocks, [""]).conversation(
        replace(told, turns=told.turns[:4], tasks=())
    )
    assert nothing.turns == told.turns[:2]  # something must be asked


def test_a_share_of_pages_is_asked_about_places() -> None:
    plan = LinePixels(14, (4, 1), 4, 64)
    tasks = {
        share: [
            {*Pages(PageData("list", turns=9, places=share), plan, 3, False)[i].sample.tasks}
            for i in range(8)
        ]
        for share in (0.0, 0.5, 1.0)
    }
    some = {share: [bool(each & {*PLACES}) for each in found] for share, found in tasks.items()}
    assert sum(some[0.0]) == 0 < sum(some[0.5]) < sum(some[1.0])


def test_processes_divide_a_step() -> None:
    torch.manual_seed(0)
    objective = instruct()

    def gradient(rank: int, size: int) -> tuple[dict[str, Tensor], int]:
        objective.world = World(rank, size)
        objective.trained.zero_grad()
        pieces = next(objective.batches(0)).pieces
        for piece in pieces:
            objective.loss(piece)[0].backward()
        found = {k: p.grad for k, p in objective.trained.named_parameters() if p.grad is not None}
        return {k: grad.clone() for k, grad in found.items()}, len(pieces)

    whole, count = gradient(0, 1)
    (first, some), (second, others) = gradient(0, 2), gradient(1, 2)
    assert count == 3 and sorted((some, others)) == [1, 2]
    assert any(grad.abs().max() > 1e-4 for grad in whole.values())
    for name, grad in whole.items():
        torch.testing.assert_close(first[name] + second[name], grad, atol=1e-6, rtol=1e-4)


def test_words_are_spelled_as_they_are_cut() -> None:
    points = np.array([[3, 5], [9, 5], [17, 5], [24, 5], [30, 5]], np.float32)
    block = Block(np.zeros((3, 28, 42), np.float32), (Row("the a", points),))
    spelled = Spelled((block,), (28, 14))
    assert spelled.parts("the") == ["th", "e"]
    assert spelled.parts('"the",') == ['"', "th", "e", '",']
    assert (
        spelled.parts("other") is None and spelled.parts("") is None and spelled.parts("!") is None
    )


def test_instruct_trains_text_corrections_and_leaves_the_language_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    objective = instruct()
    before = {k: v.clone() for k, v in objective.trained.state_dict().items()}
    first = objective.evaluate()["loss"]
    plan = Schedule(steps=12, lr=5e-3, warmup=2, log_every=5, eval_every=99, save_every=99)
    Loop(objective, plan, tmp_path).run()
    assert objective.evaluate()["loss"] < 0.7 * first
    after = objective.trained.state_dict()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert any("vision_expert_text_dense" in k for k in changed)
    assert not any("language" in k or "embed" in k for k in changed if "patch" not in k)


def test_a_recipe_with_pages(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("stage: align\nschedule: {steps: 2}\npages: {turns: 2, kinds: list}\n")
    made = load(path)
    assert made.pages == PageData(turns=2, kinds="list")  # type: ignore[union-attr]
    for pixels, said in (("{kind: square}", "kind 'square'"), ("{longer: 2}", "'longer'")):
        path.write_text(f"stage: align\nschedule: {{steps: 2}}\npixels: {pixels}\n")
        with pytest.raises(ConfigError, match=f"pixels: .*{said}"):
            pixel_plan(load(path))  # type: ignore[arg-type]
    path.write_text("stage: align\nschedule: {steps: 2}\npages: {per_step: 0}\n")
    with pytest.raises(ConfigError, match="per_step is 0"):
        load(path)


def test_pages_are_a_function_of_their_number() -> None:
    data = PageData(kinds="list,sign", turns=2, strength=0.2)
    plan = NativePixels(14, (2, 1), 48, 64, max_patches=1024, max_scale=1.0, min_rows=4)
    first, again = Pages(data, plan, 3, False), Pages(data, plan, 3, False)
    a, b = first[5], again[5]
    assert np.array_equal(a.blocks[0].pixels, b.blocks[0].pixels)
    assert a.sample.turns == b.sample.turns
    assert a.blocks[0].rows and all(row.text.isascii() for row in a.blocks[0].rows)
    assert a.sample.id != first[6].sample.id
    vision = preset("nano").vision
    assert a.blocks[0].pixels.shape[1] % vision.patch_size == 0


def test_reading_may_come_first() -> None:
    plan = LinePixels(14, (4, 1), 4, 64)
    data = PageData("list", turns=9, read_first=1.0)
    tasks = [Pages(data, plan, 3, False)[i].sample.tasks for i in range(6)]
    assert any("read" in each and len(each) > 1 for each in tasks)
    assert all(each[0] == "read" for each in tasks if "read" in each)


def test_reading_may_be_rare() -> None:
    plan = NativePixels(14, (2, 1), 12, 20, max_scale=1.0, min_rows=2)
    tasks = {
        share: {
            task
            for index in range(6)
            for task in Pages(PageData("list", turns=40, reads=share), plan, 4, False)[
                index
            ].sample.tasks
        }
        for share in (0.0, 1.0)
    }
    assert {"read", "caption"} <= tasks[1.0] and not {"read", "caption"} & tasks[0.0]


def test_of_charts_only_what_is_printed_is_known() -> None:
    plan = NativePixels(14, (2, 1), 20, 32, max_scale=1.0, min_rows=2)
    seen = set()
    for index in range(12):
        sample = Pages(PageData("chart", turns=30, printed=True), plan, 4, False)[index].sample
        known = truth_of(sample)
        printed = known.text.replace("%", " ").split()
        assert not known.items
        assert all(cell in printed for row in known.table[1:] for cell in row[1:])
        assert known.table or {fact.name for fact in known.facts} <= {"title"}
        seen.add(bool(known.table))
    assert seen == {True, False}
