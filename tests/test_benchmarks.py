"""The benchmarks run, compare the right things, and measure exactly; never how fast."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.families import family, picture
from serve.fakes import FakeEngine, fingerprint, make_desk, png, running

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks"
KEYS = {"name", "commit", "quick", "machine", "clock", "dtype", "sizes", "max_abs_difference"}
KEYS |= {"agree", "milliseconds", "ratios", "ratio_is", "goals", "ok"}
RATIOS = {
    "routing": {"prefill_text", "prefill_image", "decode_text", "decode_image"},
    "released_way": {
        f"{what}{case}{more}"
        for what, more in (
            ("prefill", ""),
            ("prefill", "_all_logits"),
            ("decode", ""),
            ("memory", ""),
            ("memory", "_with_weights"),
        )
        for case in ("", "_batch")
    },
}
GOALS = {"routing": {"prefill_text", "prefill_image"}}
GOALS["released_way"] = {"prefill", "decode", "memory"}


def quick(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, "-W", "error", str(FOLDER / f"{name}.py"), "--quick", *options],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("name", ["routing", "released_way"])
def test_quick_run_ends_with_one_json_line_and_both_sides_agree(name: str) -> None:
    done = quick(name)
    assert done.returncode == 0, done.stderr
    line: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert set(line) >= KEYS
    assert (line["name"], line["quick"], line["clock"]) == (name, True, "wall")
    assert set(line["ratios"]) == RATIOS[name]
    assert set(line["goals"]) == GOALS[name]
    assert line["ok"] == all(goal["met"] for goal in line["goals"].values())
    assert line["agree"] is True
    assert line["max_abs_difference"]
    assert all(0 <= d <= 1e-4 for d in line["max_abs_difference"].values())
    assert all(t["median"] > 0 for t in line["milliseconds"].values())
    assert all(math.isfinite(r["ratio"]) and r["ratio"] > 0 for r in line["ratios"].values())


def test_a_quantised_model_is_built_and_measured() -> None:
    sizes = ["--layers", "2", "--tower-layers", "1", "--image", "84", "--tokens", "3"]
    done = quick("full_size", *sizes, "--precision", "int4-all", "--threads", "1")
    assert done.returncode == 0, done.stderr
    line: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert (line["name"], line["quick"], line["prompt_tokens"]) == ("full_size", True, 1 + 11 + 12)
    # The arithmetic of 'cogvlm models' against the tensors that are there.
    assert line["weights_measured_over_said"] == pytest.approx(1, abs=0.01)
    assert line["peak_gb"] >= line["before_gb"] > 0
    seconds = line["seconds"]
    assert seconds["first_token"] == pytest.approx(
        seconds["tower"] + seconds["adapter"] + seconds["prefill"], rel=0.01
    )
    assert all(value > 0 for value in (*seconds.values(), *line["rate"].values()))
    assert line["operations_to_first_token"] > 1e7
    assert "goal" not in line and "extrapolated" not in line
    assert quick("full_size", "--image", "100").returncode == 2


def test_errors_of_precisions_are_in_order() -> None:
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, str(FOLDER / "precision.py"), str(ROOT / "tests/parity/glm_4v")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])["relative_error"]["glm_4v"]
    assert 0 < found["float16"] < found["bfloat16"] < found["int8"] < found["int4"] < 0.5
    assert found["int4"] < found["int4-all"] < 0.8


def run_on_toy(
    module: ModuleType, options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> dict[str, Any]:
    """The line of a benchmark that loads a model, with a toy in its place."""
    loaded = family("cogvlm2")
    loaded.model.lm_head.weight = loaded.model.model.embed_tokens.weight  # as nano has it
    monkeypatch.setattr(module, "load", lambda name, dtype: loaded)
    monkeypatch.setattr(module.transformers.logging, "set_verbosity_error", lambda: None)
    monkeypatch.setattr(sys, "argv", [str(module.__file__), *options])
    assert module.main() == 0
    line: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["agree"] is True
    assert all(t["median"] > 0 for t in line.get("milliseconds", {}).values())
    return line


def test_serving_compares_one_with_many_and_a_turn_with_the_next(
    modules: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for i in range(5):
        picture(i).save(tmp_path / f"{i}.png")
    options = [
        "--pictures",
        str(tmp_path),
        *["--conversations", "3", "--tokens", "4", "--repeats", "1"],
    ]
    monkeypatch.setattr(modules["serving"], "LARGE_SIDE", 112)
    line = run_on_toy(modules["serving"], options, monkeypatch, capsys)
    assert set(line["ratios"]) == set(line["goals"]) == {"together", "second_turn", "large_picture"}
    assert line["large_picture_tokens"]["reused"] > 16  # four by four tokens, begin and end
    assert 1 < line["mean_batch"] <= 3
    assert 0 < line["second_turn_tokens"]["reused"] < line["second_turn_tokens"]["prompt"]


def test_decoding_is_that_of_transformers_own_llama(
    modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    options = ["--precisions", "float32", "--tokens", "5", "--repeats", "2"]
    line = run_on_toy(modules["decode"], options, monkeypatch, capsys)
    assert set(line["tokens_a_second"]) == {
        "llama_float32",
        "llama_bfloat16",
        "model_float32",
        "engine_float32",
    }
    assert set(line["ratios"]) == set(line["tokens_a_second"]) - {"llama_float32"}
    assert "of_llama_cpp" not in line


XLLAMACPP = """
import types

class CommonParams:
    def __init__(self):
        self.model, self.cpuparams, self.cpuparams_batch = (types.SimpleNamespace() for _ in "abc")

class Server:
    def __init__(self, params):
        assert (params.model.path, params.cpuparams.n_threads) == ("some.gguf", THREADS)

    def handle_completions(self, asked):
        assert len(asked["prompt"]) > 5 and asked["n_predict"] in (2, 3)
        sum(range(100_000))
"""


@pytest.mark.parametrize("clock", ["wall", "cpu"])
def test_llama_cpp_measures_itself_in_another_python(
    clock: str,
    modules: dict[str, ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    text = XLLAMACPP.replace("THREADS", str(torch.get_num_threads()))
    (tmp_path / "xllamacpp.py").write_text(text, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    options = ["--precisions", "float32", "--tokens", "3", "--repeats", "2", "--clock", clock]
    theirs = ["--llama-python", sys.executable, "--gguf", "some.gguf"]
    line = run_on_toy(modules["decode"], [*options, *theirs], monkeypatch, capsys)
    assert line["milliseconds"]["llama_cpp"]["n"] == 2
    share = line["of_llama_cpp"]["engine_float32"]["ratio"]
    assert set(line["of_llama_cpp"]) == {"engine_float32"}
    assert line["goals"]["of_llama_cpp"] == {"at_least": 0.5, "best": share, "met": share >= 0.5}


def test_a_crowd_is_compared_with_each_of_it_alone(
    modules: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    engine = FakeEngine(fingerprint)
    with running(make_desk(engine)) as url:
        monkeypatch.setattr(sys, "argv", ["crowd", url, str(tmp_path), "--alone", "4"])
        assert modules["crowd"].main() == 0
        line = json.loads(capsys.readouterr().out)
        assert (line["pictures"], line["alone"], line["different_answers"]) == (6, 4, 6)
        asked = len(engine.asked)
        engine.say = lambda prompt: fingerprint(prompt) + "x" * (len(engine.asked) > asked + 8)
        assert modules["crowd"].main() == 1
    line = json.loads(capsys.readouterr().out)
    assert set(line["not_as_alone"]) == {"2.png", "3.png"}  # the ninth and tenth that were asked


def test_guessing_is_compared_on_answers_that_are_the_same(
    modules: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    picture(0).save(tmp_path / "0.png")
    kinds = {"real line": "cer", "real paragraph": "cer", "real table": "anls", "word": "anls"}
    rows = [
        {"image": "0.png", "question": f"{kind}?", "kind": kind, "metric": metric}
        for kind, metric in kinds.items()
    ]
    requests = tmp_path / "requests.jsonl"
    requests.write_text("\n".join(map(json.dumps, rows)))
    options = ["--requests", str(requests), "--prompts", "2", "--tokens", "9", "--repeats", "2"]
    line = run_on_toy(modules["drafts"], options, monkeypatch, capsys)
    assert {name: kind["prompts"] for name, kind in line["kinds"].items()} == {
        "read": 1, "ask": 2, "chat": 2,
    }  # fmt: skip
    for kind in line["kinds"].values():
        assert kind["same_answers"] == kind["prompts"]
        assert 0 <= kind["accepted_tokens"] <= kind["draft_tokens"]
        assert kind["steps"] + kind["accepted_tokens"] + kind["prompts"] >= kind["generated_tokens"]
        assert all(t["median"] > 0 for t in kind["milliseconds"].values())


def test_a_prompt_without_text_is_refused() -> None:
    done = quick("routing", "--image", "39")
    assert done.returncode == 2
    assert "--image 39 leaves no text" in done.stderr


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    monkeypatch.syspath_prepend(str(FOLDER))
    import common
    import crowd
    import decode
    import drafts
    import released_way
    import routing
    import serving
    import sides

    all_ = (common, crowd, decode, drafts, released_way, routing, serving, sides)
    return {m.__name__: m for m in all_}


@torch.inference_mode()
@pytest.mark.parametrize("wrong", ["experts", "positions", "mask"])
def test_a_wrong_side_would_be_seen(modules: dict[str, ModuleType], wrong: str) -> None:
    sides, released_way = modules["sides"], modules["released_way"]
    sizes = sides.Sizes.tiny()
    model = sides.build(sizes)
    prompt = sides.make_prompt(model, sizes, (0, 5))
    theirs: Tensor = released_way.ReleasedWay(model).prefill(prompt)
    changed, ids = prompt, model.model.position_ids(prompt.types, prompt.mask, None)
    if wrong == "experts":
        changed = replace(prompt, types=torch.zeros_like(prompt.types))
    elif wrong == "positions":
        ids = torch.arange(sizes.prompt).expand_as(ids)
    else:
        changed = replace(prompt, mask=None)
    ours = sides.Ours(model, logits_to_keep=0).prefill(changed, ids)
    assert (ours - theirs)[prompt.real].abs().max() > 0.01


def test_sides_take_turns_and_ratios_are_of_medians(modules: dict[str, ModuleType]) -> None:
    common = modules["common"]
    calls: list[tuple[str, int]] = []
    now = iter(range(100))
    sides = {name: lambda i, name=name: calls.append((name, i)) for name in "ab"}
    times = common.interleave(sides, repeats=2, warmup=1, clock=lambda: float(next(now)))
    assert calls == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert times == {"a": [1.0, 1.0], "b": [1.0, 1.0]}
    assert common.ratio([4.0, 9.0, 2.0], [2.0, 3.0, 1.0]) == {"ratio": 2.0, "q1": 2.0, "q3": 2.5}
    assert common.spread([0.001, 0.003]) == {"median": 2.0, "q1": 1.5, "q3": 2.5, "n": 2}


def test_memory_and_operators_are_counted_exactly(modules: dict[str, ModuleType]) -> None:
    common = modules["common"]
    before = torch.ones(1000)

    def work() -> None:
        first = before * 2  # 4,000 bytes
        second = torch.cat((first, first))  # 8,000 more
        del first
        second.view(2, -1).add_(1)

    assert common.peak_bytes(work) == 12_000
    assert common.operators(work) == 3  # the view is none


def test_goals_and_disagreement_decide(modules: dict[str, ModuleType]) -> None:
    common, sides = modules["common"], modules["sides"]
    run = common.Run(sides.Sizes.tiny())

    def line(ratio: float, difference: float) -> dict[str, Any]:
        goals = {"speed": common.Goal("at_least", 1.5)}
        ratios = {"speed": {"ratio": ratio}}
        result = common.Result("x", run, {}, {}, ratios, goals, {"logits": difference}, 1e-4, {})
        found: dict[str, Any] = json.loads(result.line())
        return found

    assert line(1.5, 0.0)["ok"] is True
    assert line(1.4, 0.0)["goals"] == {"speed": {"at_least": 1.5, "met": False}}
    assert (line(1.4, 0.0)["ok"], line(1.4, 0.0)["agree"]) == (False, True)
    assert (line(2.0, 1e-3)["ok"], line(2.0, 1e-3)["agree"]) == (False, False)
    assert line(2.0, math.nan)["agree"] is False
    assert not common.Goal("at_most", 1.05).met(1.06)
