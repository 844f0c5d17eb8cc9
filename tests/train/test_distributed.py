"""Several processes make the run that one makes, whatever their rows hold and however they end."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from cogvlm.errors import ConfigError
from cogvlm.load import load
from cogvlm.processor import assistant, user
from cogvlm.train import distributed as several
from cogvlm.train import recipe as recipes
from cogvlm.train.rows import Limit, encode, labelled, micro_batches
from cogvlm.train.run import _compare, prepare, run
from cogvlm.train.tune import TuneObjective, tune
from train import toys

ROOT = Path(__file__).parents[2]
KEYS = ("loss", "eval_loss", "grad_norm", "rows", "answer_tokens", "eval_records", "eval_cer")
PLAN: dict[str, Any] = {
    "parts": {"adapter": {}, "tower": {}, "experts": {"lr": 0.5}, "language": {}},
    "batch_size": 2,
    "accumulate": 3,
    "eval_answers": 3,  # one process has a record more than the other
    "max_new_tokens": 2,
}
SCHEDULE = {"steps": 6, "ema": 0.8, "eval_every": 100, "save_every": 100, "keep_best": True}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model``, and ``data`` where most records have no picture and some rows are too long."""
    folder = tmp_path_factory.mktemp("several")
    toys.write_model(folder / "model")
    (folder / "data").mkdir()
    chance, lines = random.Random(3), []
    for i in range(40):
        name = chance.choice(list(toys.COLOURS))
        record: dict[str, Any] = {"id": str(i)}
        if chance.random() < 0.2:
            Image.new("RGB", (40, 40), toys.COLOURS[name]).save(folder / "data" / f"{i}.png")
            record["image"] = f"{i}.png"
        question = "<image>What colour?" if "image" in record else "What colour?"
        answer = " ".join([name] * chance.choice((1, 2, 3, 4, 40)))
        record["conversations"] = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        lines.append(json.dumps(record))
    (folder / "data" / "labels.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def write(place: Path, name: str, **changes: Any) -> Path:
    labels = place / "data" / "labels.jsonl"
    plan = {**PLAN, "schedule": SCHEDULE, "max_tokens": 96, **changes}
    return toys.write_recipe(place / f"{name}.yaml", place / "model", labels, **plan)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


ALONE = {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])}
ALONE |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@contextmanager
def crowd(jobs: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Two processes at work on the same jobs, started as torchrun starts them."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(Path(__file__).with_name("crowd.py")), str(jobs)],
            env={**os.environ, **ALONE, **shared, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.communicate()


def write_jobs(path: Path, *runs: tuple[Path, Path]) -> Path:
    """A file for ``crowd.py``: recipes and where they go."""
    jobs = [{"recipe": str(r), "out": str(out), "port": free_port()} for r, out in runs]
    path.write_text(json.dumps(jobs))
    return path


def wait_for(log: Path, step: int, *running: subprocess.Popen[str]) -> None:
    """Until ``step`` stands in a log of a run that goes on."""
    deadline = time.monotonic() + 600
    while not (log.exists() and f'"step": {step},' in log.read_text()):
        assert all(child.poll() is None for child in running), running[0].communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def same(found: Path, wanted: Path, rtol: float) -> None:
    """Two runs with the same losses, norms, counts and results."""
    for key in KEYS:
        one, other = toys.losses(wanted, key), toys.losses(found, key)
        assert one.keys() == other.keys() and one
        for step, value in one.items():
            assert other[step] == pytest.approx(value, rel=rtol, abs=1e-6), (key, step)
    first, second = (load_file(folder / "parts.safetensors") for folder in (wanted, found))
    assert first.keys() == second.keys() and len(first) > 10
    for name, tensor in first.items():
        # The bias of a key has no gradient but rounding, of which Adam makes whole steps.
        near = 2e-2 if name.endswith("query_key_value.bias") else 10 * rtol
        torch.testing.assert_close(second[name], tensor, rtol=near, atol=near, msg=name)


# --- what the rows of the tests hold ---


def test_the_rows_are_of_every_kind(place: Path) -> None:
    made = prepare(recipes.load(write(place, "rows")), place / "rows").objective
    assert isinstance(made, TuneObjective)
    kinds = set()
    for step in range(SCHEDULE["steps"]):  # type: ignore[call-overload]
        rows = made.steps[step * 6].rows
        ours, theirs = (
            SimpleNamespace(rows=several_steps[step * 6].rows)
            for several_steps in (shared(made, rank) for rank in range(2))
        )
        assert len(ours.rows) + len(theirs.rows) == len(rows)
        pieces = [micro_batches(one.rows, 2) for one in (ours, theirs)]
        seen = [[any(r.pixel_values for r in group) for group in one] for one in pieces]
        kinds.add("no picture" if not any(map(any, seen)) else "pictures")
        if any(seen[0]) != any(seen[1]):
            kinds.add("pictures in one process")
        if len(pieces[0]) != len(pieces[1]):
            kinds.add("uneven micro-batches")
        if sum(map(labelled, ours.rows)) != sum(map(labelled, theirs.rows)):
            kinds.add("uneven labels")
    assert kinds == {
        "no picture", "pictures", "pictures in one process", "uneven micro-batches",
        "uneven labels",
    }  # fmt: skip


def shared(made: TuneObjective, rank: int) -> Any:
    """The steps of one of two processes."""
    from dataclasses import replace

    return replace(made.steps, share=(rank, 2))


def test_micro_batches_go_in_step(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processor = load(place / "model", "float32", "cpu").processor
    word = [assistant("red")]
    text, _ = encode(processor, [user("One?"), *word], Limit())
    seen, _ = encode(processor, [user(Image.new("RGB", (9, 9)), "One?"), *word], Limit())
    asked: list[bool] = []

    def blank(picture: bool) -> Any:
        asked.append(picture)
        return seen if picture else text

    one = several.World()
    assert several.in_step(one, [[text]], 4, blank) == ([[text]], 4) and not asked
    world = several.World(0, 2)
    monkeypatch.setattr(world, "gather", lambda mine: [mine, (5, [True, False, False])])
    groups, count = several.in_step(world, [[text], [text]], 4, blank)
    assert count == 9 and groups == [[text, seen], [text], [text]]
    assert asked == [True, False]  # nothing where no process has a picture


class Met(several.World):
    """One of two processes that are threads."""

    def __init__(self, rank: int, meeting: threading.Barrier, told: list[Any]) -> None:
        super().__init__(rank, 2)
        self.meeting, self.told = meeting, told

    def gather(self, value: Any) -> list[Any]:
        self.told[self.rank] = value
        self.meeting.wait(60)
        found = list(self.told)
        self.meeting.wait(60)
        return found


@pytest.mark.parametrize("apart", [True, False])
def test_what_is_measured_is_divided_and_all_know_it(place: Path, apart: bool) -> None:
    recipe = recipes.load(write(place, "measured", eval_count=5))
    assert isinstance(recipe, recipes.TuneRecipe)
    alone = tune(recipe)
    meeting, told = threading.Barrier(2), [None, None]
    both = [tune(recipe, Met(rank, meeting, told)) for rank in range(2)]
    answered: list[int] = []
    for made in both:
        made.apart = apart  # not where a model is whole one layer at a time
        ask = made._said
        made._said = lambda records, ask=ask: (  # type: ignore[method-assign]
            answered.append(len(records)) or ask(records)
        )

    def measure(made: TuneObjective) -> dict[str, Any]:
        made.trained.eval()
        with torch.no_grad():
            return made.evaluate()

    wanted = measure(alone)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(measure, both))
    assert sorted(answered) == ([1, 2] if apart else [3, 3])
    assert sum(len(made._eval_rows()) for made in both) == wanted["records"] > 2
    assert found[0] == found[1]
    assert found[0].pop("loss") == pytest.approx(wanted.pop("loss"), rel=1e-5)
    assert found[0] == wanted and wanted["answers"] == 3


# --- runs ---


def together(*runs: tuple[Path, Path]) -> None:
    """Recipes in two processes, one after the other, to their ends."""
    with crowd(write_jobs(runs[0][1].with_suffix(".json"), *runs)) as two:
        said = [process.communicate(timeout=900)[1][-3000:] for process in two]
        assert [process.returncode for process in two] == [0, 0], "\n".join(said)


@pytest.mark.slow
def test_processes_make_the_run_of_one_and_any_number_goes_on_from_any(place: Path) -> None:
    plain = write(place, "ddp", parallel="ddp")
    cut = write(place, "fsdp", parallel="fsdp", checkpointing=True)
    whole = run(plain, [], place / "whole", True)

    # Ctrl-C under torchrun: all save where they stand, and end.
    broken = place / "broken"
    child = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2",
         f"--master-port={free_port()}", "-m", "cogvlm", "train", str(cut), "--out", str(broken)],
        env={**os.environ, **ALONE}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for(broken / "log.jsonl", 1, child)
    child.send_signal(signal.SIGINT)
    out, errors = child.communicate(timeout=600)
    assert child.returncode != 0 and "stopped" in errors
    steps = [json.loads(line)["step"] for line in out.splitlines() if line.startswith("{")]
    assert steps == list(range(1, len(steps) + 1))  # one process prints
    state = torch.load(broken / "checkpoint.pt", weights_only=True)
    assert 1 <= state["step"] < 6

    # One process goes on, in whole tensors.
    loop = prepare(recipes.load(cut), broken)
    assert loop.resume() and loop.step == state["step"]
    if loop.step < 3:
        batch = next(loop.objective.batches(loop.step))
        loop.log({"step": loop.step + 1, **loop.one_step(batch)})
        loop.save()

    # Two again, of which one is killed: the other ends, and the checkpoint stays.
    jobs = write_jobs(place / "killed.json", (cut, broken))
    with crowd(jobs) as two:
        wait_for(broken / "log.jsonl", loop.step + 1, *two)
        two[1].kill()
        _, errors = two[0].communicate(timeout=600)
        assert two[0].returncode == 1 and "another one has ended" in errors
    assert torch.load(broken / "checkpoint.pt", weights_only=True)["step"] == loop.step

    # And two to the end; and the other engines from the beginning.
    lora = {"targets": ["language.qkv", "experts.mlp"], "rank": 4}
    low = {"precision": "bfloat16", "lora": lora, "parts": {"tower": {}}}
    half = write(place, "zero2", parallel="zero2", **low)
    exact = run(write(place, "half", **low), [], place / "half", True)
    together((cut, broken), (plain, place / "ddp"), (half, place / "zero2"))
    same(place / "ddp", whole, 1e-4)
    same(broken, whole, 1e-4)
    for key in ("loss", "eval_loss", "rows"):
        one, other = toys.losses(exact, key), toys.losses(place / "zero2", key)
        assert one.keys() == other.keys()
        assert all(other[step] == pytest.approx(one[step], rel=0.02) for step in one)


@pytest.mark.slow
def test_processes_that_cut_the_layers_make_the_run_of_one(place: Path) -> None:
    cut = {"parallel": "tensor", "checkpointing": True}
    lora = {"lora": {"targets": ["language", "experts", "tower", "adapter"], "rank": 4}}
    plain, other = write(place, "whole"), write(place, "tensor", **cut)
    low, lower = (
        write(place, "low", parts={}, **lora),
        write(place, "lower", parts={}, **lora, **cut),
    )
    half = {"parts": {"tower": {}}, "precision": "bfloat16", **lora}
    rough, rougher = write(place, "rough", **half), write(place, "rougher", **half, **cut)
    compiled = write(place, "compiled", parallel="fsdp", compile=True, checkpointing=True)
    alone = {p.stem: run(p, [], place / "one" / p.stem, True) for p in (plain, low, rough)}

    # One process begins, two go on with their shares, and one has all of it again.
    begun = prepare(recipes.load(other), place / "tensor")
    for _ in range(2):
        batch = next(begun.objective.batches(begun.step))
        begun.log({"step": begun.step + 1, **begun.one_step(batch)})
    begun.save()
    jobs = [(p, place / p.stem) for p in (other, lower, rougher, compiled)]
    together(*jobs)
    same(place / "tensor", alone["whole"], 1e-4)
    same(place / "compiled", alone["whole"], 1e-4)
    states = []
    for recipe, out in ((plain, place / "tensor"), (plain, alone["whole"])):
        loop = prepare(recipes.load(recipe), out)
        assert loop.resume() and loop.step == 6
        (optimizer,) = loop.optimizers
        states.append([v["exp_avg_sq"] for v in optimizer.state_dict()["state"].values()])
    for one, found in zip(*states, strict=True):
        torch.testing.assert_close(found, one, rtol=1e-3, atol=1e-8)

    # Beside layers that are cut, a LoRA begins and learns as beside whole ones.
    first, second = (
        load_file(out / "adapter_model.safetensors") for out in (alone["low"], place / "lower")
    )
    assert first.keys() == second.keys() and len(first) > 50
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=2e-3, atol=2e-3, msg=name)
    for one, found, near in (("low", lower, 1e-4), ("rough", rougher, 0.02)):
        for key in ("loss", "eval_loss", "rows", "answer_tokens"):
            wanted, got = toys.losses(alone[one], key), toys.losses(place / found.stem, key)
            assert wanted.keys() == got.keys()
            assert all(got[step] == pytest.approx(wanted[step], rel=near) for step in wanted)


# --- refused ---


def test_a_process_without_a_row_is_refused(place: Path) -> None:
    recipe = recipes.load(write(place, "few"), ["batch_size=1", "accumulate=2"])
    with pytest.raises(ConfigError, match=r"a step of 2 rows .* for 3 processes"):
        prepare(recipe, place / "few", several.World(0, 3))
    recipe = recipes.load(write(place, "sight", image_loss=0.1))
    with pytest.raises(ConfigError, match="image_loss is for one process"):
        prepare(recipe, place / "sight", several.World(0, 2))
    recipe = recipes.load(write(place, "made", compile=True, parallel="tensor"))
    with pytest.raises(ConfigError, match="parallel tensor: its layers are not compiled"):
        prepare(recipe, place / "made", several.World(0, 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel": "tp"}, "parallel is 'tp'; give ddp, zero2, fsdp or tensor"),
        ({"parallel": "fsdp", "schedule": {"optimizer": "muon"}}, "muon needs whole matrices"),
    ],
)
def test_impossible_recipes_are_refused(place: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipes.load(write(place, "wrong", **changes))


@pytest.mark.filterwarnings("ignore")  # of torchao
def test_models_that_cannot_be_cut_are_refused(place: Path) -> None:
    pytest.importorskip("torchao")
    model = load(place / "model", "int8", "cpu").model
    with pytest.raises(ConfigError, match=r"is quantised and cannot be cut.*take parallel: ddp"):
        several.share(model, "fsdp", several.World(0, 2), "bf16")
    model = load(place / "model", "float32", "cpu").model
    with pytest.raises(ConfigError, match="compute fp16 is not known there"):
        several.share(model, "zero2", several.World(0, 2), "fp16")
    with pytest.raises(ConfigError, match="parallel tensor: compute fp16 is not known there"):
        several.share(model, "tensor", several.World(0, 2), "fp16")


def test_devices_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert several.own_device("mps") == "mps"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert several.own_device("auto") == several.own_device("cpu") == "cpu"
    with pytest.raises(ConfigError, match="device 'mps' and several processes"):
        several.own_device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert several.own_device("auto") == several.own_device("cuda") == "cuda:1"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="process 1 of this machine has no GPU, there are 1"):
        several.own_device("cuda")


def test_other_stages_train_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "read.yaml"
    path.write_text(yaml.safe_dump({"stage": "read", "schedule": {"steps": 1}}))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="stage 'read' trains in one process"):
        run(path, [], tmp_path / "out", True)


def test_processes_that_stand_elsewhere_are_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = prepare(recipes.load(write(place, "apart")), place / "apart")
    _compare(loop)
    monkeypatch.setattr(loop.world, "gather", lambda mine: [mine, (4, mine[1])])
    with pytest.raises(ConfigError, match=r"process 1 stands at step 4.*the same on all machines"):
        _compare(loop)
