"""The shipped model: reads print through the full path, and is its language model without it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from cogvlm import GenerationSettings, Loaded, complete, open_model, user
from cogvlm.eval.run import score_file
from cogvlm.score import edit_distance

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "src" / "cogvlm" / "weights" / "nano"
QUESTIONS = ("What is the capital of France?", "Write one sentence about the sea.")


def test_the_weights_are_small() -> None:
    assert sum(p.stat().st_size for p in WEIGHTS.iterdir()) < 40_000_000


@pytest.fixture(scope="module")
def nano(language_model: Path) -> Loaded:
    return open_model("nano", device="cpu")


@pytest.mark.slow
def test_real_documents_are_read(nano: Loaded, tmp_path: Path) -> None:
    """The card has the figure, 0.032; another CPU rounds otherwise."""
    requests = ROOT / "examples" / "lines" / "requests.jsonl"
    score = score_file(requests, tmp_path / "answers.jsonl", nano)
    assert score.failed == 0
    assert score.scores["cer"] < 0.05


@pytest.mark.slow
def test_a_page_of_a_book_is_read_line_by_line(nano: Loaded) -> None:
    """By the head; the language model is told this, and says it with less care."""
    page = ROOT / "examples" / "pictures" / "book-novel.jpg"
    told = nano.processor.decode(nano.processor.encode([user(page, "Read it.")]).input_ids)
    lines = re.sub(r"\[\[.*?\]\]", "", told).split("\n")
    for truth in (
        "come tip-toeing down and stood",
        "right between us; we could a touched",
        "sound, and we all there so close",
        "ankle that got to itching; but I",
    ):
        assert min(edit_distance(line, truth) for line in lines) <= 3


@pytest.mark.slow
def test_a_question_about_an_invoice_is_answered(nano: Loaded) -> None:
    invoice = ROOT / "examples" / "pictures" / "invoice-head.png"
    answer = complete(nano, [user(invoice, "What is the due date? Short answer.")])
    assert answer.text.strip() == "05/19/06"


@pytest.mark.slow
def test_the_example_is_read(nano: Loaded) -> None:
    answer = complete(nano, [user(ROOT / "examples" / "line.png", "What does the picture say?")])
    truth = json.loads((ROOT / "examples" / "line.json").read_text())["truth"]
    assert edit_distance(answer.text.strip(), truth) <= 1


@pytest.mark.slow
def test_without_a_picture_nano_is_smollm2(nano: Loaded, language_model: Path) -> None:
    llama = LlamaForCausalLM.from_pretrained(language_model, dtype=torch.float32).eval()
    for question in QUESTIONS:
        encoded = nano.processor.encode([user(question)])
        ids = torch.from_numpy(encoded.input_ids)[None]
        with torch.no_grad():
            ours, theirs = nano.model(ids).logits, llama(ids).logits
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)
        expected = llama.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False
        )
        text = nano.processor.decode(expected[0, ids.shape[1] :].tolist())
        answer = complete(nano, [user(question)], GenerationSettings(max_new_tokens=24))
        assert answer.text.strip() == text.strip()


@pytest.mark.slow
def test_the_program_in_the_readme_reads_its_picture(
    language_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    assert block
    exec(compile(block[1], "README.md", "exec"), {})
    truth = json.loads((ROOT / "examples" / "line.json").read_text())["truth"]
    assert edit_distance(capsys.readouterr().out.strip(), truth) <= 1
