"""The three stages at toy size, with drawn bars for letters: no fonts or downloads needed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cogvlm.models.checkpoint import is_vision
from cogvlm.processor import Processor
from cogvlm.processor.template import TEMPLATES
from cogvlm.train.align import AlignObjective, CellPieces, ReaderWithAdapter, cut_into_cells
from cogvlm.train.answer import AnswerObjective, Prompt
from cogvlm.train.loop import Loop, Schedule
from cogvlm.train.read import Reader, ReadObjective, column_labels, decode_columns
from fakes import toy_model
from train.bars import NATIVE, PLAN, Bytes, common, pools


def test_labels_and_their_decoding_are_inverse() -> None:
    centers = np.array([3, 9, 13, 20, 41], np.float32)
    labels = column_labels(["T he!"], [centers], cols=3, patch=14)
    assert decode_columns(labels) == ["T he!"]
    assert (labels[0] > 0).sum(-1).tolist() == [3, 1, 1]
    assert cut_into_cells("T he!", centers, 2, 28) == ["T he", "!"]


def test_batches_are_a_function_of_their_number() -> None:
    source = pools(batch=12)
    assert source.per_pool == 3
    first = [b for _, b in zip(range(7), source.batches(0, 0), strict=False)]
    later = [b for _, b in zip(range(3), source.batches(4, 0), strict=False)]
    for a, b in zip(first[4:], later, strict=True):
        assert a.texts == b.texts
        assert np.array_equal(a.pixels, b.pixels)
    widths = {b.pixels.shape[-1] for b in first}
    assert len(widths) > 1 and all(w % 28 == 0 for w in widths)


def test_read_learns_the_bars(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vision = toy_model(vision_config=NATIVE).model.vision
    # Eight characters in eight columns: a bar stretched over several has no middle to be seen.
    objective = ReadObjective(trained=Reader(vision, 48), patch=14, **common(8))  # type: ignore[arg-type]
    before = objective.evaluate()["cer"]
    plan = Schedule(steps=60, lr=3e-3, warmup=5, log_every=20, eval_every=99, save_every=99)
    Loop(objective, plan, tmp_path).run()
    assert objective.evaluate()["cer"] < 0.1 < before
    names = load_file(tmp_path / "vision.safetensors").keys()
    assert "model.vision.patch_embedding.proj.weight" in names and "head.weight" in names


def test_align_moves_tokens_to_the_embeddings(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = toy_model(vision_config=NATIVE)
    objective = AlignObjective(
        trained=ReaderWithAdapter(model.model.vision, 48),
        patch=14,
        embeddings=model.model.embed_tokens.weight.detach(),
        pieces=CellPieces(Bytes()),
        blank=10,
        **common(),  # type: ignore[arg-type]
    )
    lines = objective.train_pools.pool(0)[0]
    batch = lines.sheet()
    first = cut_into_cells(lines.texts[0], lines.centers[0], lines.pixels.shape[-1] // 28, 28)
    places, spelled = objective.targets(batch)
    told = [j for j, text in enumerate(first) if text]
    assert places[: len(told)].tolist() == [[0, 0, j] for j in told]
    for text, rivals in zip(filter(None, first), spelled, strict=False):
        expected = objective.embeddings[[ord(c) for c in text]]
        assert torch.equal(objective.rivals[rivals], expected)
    labels = objective.row_labels(batch)[:, 0]
    assert decode_columns(labels.numpy()) == lines.texts
    assert float(objective.distances(objective.rivals).diagonal().abs().max()) < 1e-4
    before = objective.loss(batch)[1]["distance"]
    plan = Schedule(steps=60, lr=3e-3, warmup=5, log_every=20, eval_every=99, save_every=99)
    Loop(objective, plan, tmp_path).run()
    assert objective.loss(batch)[1]["distance"] < 0.5 * before
    saved = load_file(tmp_path / "vision.safetensors")
    assert saved["model.vision.linear_proj.linear_proj.weight"].shape == (64, 48)


@pytest.fixture
def answers() -> AnswerObjective:
    model = toy_model(
        vision_config=NATIVE, expert_rank=4, image_positions="flat", template_version="chatml"
    )
    processor = Processor(Bytes(), TEMPLATES["chatml"], PLAN, 3)
    return AnswerObjective(
        trained=model,
        processor=processor,
        prompts=[Prompt.of(processor, "What?"), Prompt.of(processor, "Read it.")],
        scales={"tower": 0.0, "adapter": 1.0, "experts": 1.0},
        seed=0,
        **common(),  # type: ignore[arg-type]
    )


def test_training_rows_are_the_processors_own(answers: AnswerObjective) -> None:
    from cogvlm.processor.messages import user

    batch = answers.train_pools.pool(0)[0]
    inputs = answers.inputs(batch, answers.prompts[0], answers=False)
    height, width = batch.pixels.shape[-2:]
    same = answers.processor.encode([user(Image.new("RGB", (width, height)), "What?")])
    assert inputs["input_ids"][0].tolist() == same.input_ids.tolist()
    assert inputs["token_type_ids"][0].tolist() == same.token_type_ids.tolist()
    labelled = answers.inputs(batch, answers.prompts[0], answers=True)["labels"]
    for row, text in zip(labelled.tolist(), batch.texts, strict=True):
        kept = [t for t in row if t != -100]
        assert answers.processor.decode(kept[:-1]) == text and kept[-1] == 2


def test_answer_trains_experts_and_adapter_and_nothing_else(
    answers: AnswerObjective, tmp_path: Path
) -> None:
    before = {k: v.clone() for k, v in answers.trained.state_dict().items()}
    batch = next(answers.batches(0))
    first = float(answers.loss(batch)[0].detach())
    plan = Schedule(steps=25, lr=5e-3, warmup=2, log_every=5, eval_every=99, save_every=99)
    Loop(answers, plan, tmp_path).run()
    assert float(answers.loss(batch)[0].detach()) < 0.7 * first
    after = answers.trained.state_dict()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed and all(is_vision(k) for k in changed)
    assert not any(".transformer." in k or ".patch_embedding." in k for k in changed)
    assert any("lora_B" in k for k in changed) and any("linear_proj" in k for k in changed)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == {k for k in after if is_vision(k)}
    assert all(t.dtype == torch.bfloat16 for t in saved.values())
