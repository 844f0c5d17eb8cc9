"""Tensor parallelism: two processes give what one gives."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import cogvlm
from cogvlm.engine import complete
from cogvlm.errors import InputError
from cogvlm.load import load, load_model
from cogvlm.models.cogvlm import CogVLMForCausalLM
from cogvlm.processor import user
from fakes import image, left_pad, row, toy_model
from models import test_cogagent as agent
from models import test_glm4v as glm

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("tp_worker.py")
FIRST: dict[str, Any] = {
    "num_multi_query_heads": 4,
    "expert_bias": False,
    "vision_config": {"adapter": "linear_glu"},
}
KINDS = ("picture", "text", "batch")


def together(*words: str) -> list[str]:
    """What two processes of a script print, started as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    shared["PYTHONPATH"] = str(Path(cogvlm.__file__).parents[1])
    started = [
        subprocess.Popen(
            [sys.executable, *words],
            env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    try:
        said = [process.communicate(timeout=900) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, errors) in zip(started, said, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return [out for out, _ in said]


def toys() -> dict[str, tuple[CogVLMForCausalLM, list[dict[str, Any]]]]:
    """A model of each class and prompts with a picture, without, and with both in a batch."""
    made: dict[str, tuple[CogVLMForCausalLM, list[dict[str, Any]]]] = {}
    for name, changes in (
        ("cogvlm2", {}),
        ("cogvlm", FIRST),
        ("video", {"visual_expert": "none"}),
    ):
        model = toy_model(**changes)
        rows = [row(model, 2, image(1), 5), row(model, 6)]
        made[name] = model, [*rows, left_pad(rows)]
    model = agent.toy()
    rows = [agent.seen(model, 2, image(1), 5), agent.seen(model, 6)]
    made["cogagent"] = model, [*rows, agent.join(rows)]
    rows = [glm.row(2, image(1), 5), glm.row(6)]
    made["glm4v"] = glm.toy_model(), [*rows, left_pad(rows)]
    return made


NAMES = ("cogvlm2", "cogvlm", "video", "cogagent", "glm4v")


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folders, and what each of two processes got from them."""
    inputs, out = tmp_path_factory.mktemp("toys"), tmp_path_factory.mktemp("got")
    for name, (model, prompts) in toys().items():
        model.save_pretrained(inputs / name, max_shard_size="100KB")
        torch.save(dict(zip(KINDS, prompts, strict=True)), inputs / name / "prompts.pt")
    together(str(WORKER), str(inputs), str(out))
    return inputs, [torch.load(out / f"{rank}.pt") for rank in range(2)]


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_give_what_one_gives(
    ran: tuple[Path, list[dict[str, Any]]], name: str
) -> None:
    inputs, processes = ran
    prompts = torch.load(inputs / name / "prompts.pt")
    exact = load_model(inputs / name, "float32", "cpu")
    rough = load_model(inputs / name, "bfloat16", "cpu")
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    for kind, prompt in prompts.items():
        logits, ids = exact(**prompt).logits, exact.generate(**prompt, **settings)
        assert logits.abs().max() > 1
        rounding = (rough(**prompt).logits - logits).square().mean()
        for got in processes:
            found = got[f"{name}.float32.{kind}"]  # a sum in two parts rounds differently
            torch.testing.assert_close(found, logits, rtol=0, atol=2e-4)
            assert torch.equal(got[f"{name}.float32.{kind}.ids"], ids)
            # In bfloat16 the toys make much of rounding: no farther off than one process is.
            error = (got[f"{name}.bfloat16.{kind}"] - logits).square().mean()
            assert error < 2 * rounding
    dtypes = {buffer: tensor.dtype for buffer, tensor in rough.named_buffers()}
    assert all(got[f"{name}.bfloat16.buffers"] == dtypes != {} for got in processes)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_each_process_holds_its_share(ran: tuple[Path, list[dict[str, Any]]], name: str) -> None:
    inputs, processes = ran
    model = load_model(inputs / name, "float32", "cpu")
    total = sum(p.numel() for p in model.parameters())
    cut = sum(
        p.numel()
        for n, p in model.named_parameters()
        if p.ndim == 2
        and (("layers" in n and "vision" not in n.split(".")) or "embed" in n or "head" in n)
        and "cross" not in n
    )
    for got in processes:
        assert total / 2 <= got[f"{name}.float32.held"] <= total - cut / 2


@pytest.mark.slow
def test_the_example_answers_as_one_process_does(tmp_path: Path) -> None:
    place = agent.folder(tmp_path / "model")
    picture = tmp_path / "picture.png"
    Image.new("RGB", (60, 40), (200, 30, 10)).save(picture)
    script = str(ROOT / "examples" / "parallel.py")
    said = together(script, str(place), str(picture), "What is it?")
    alone = complete(load(place, device="cpu"), [user(picture, "What is it?")])
    assert said == [alone.text, ""] != ["", ""]


@pytest.mark.slow
def test_what_excludes_a_plan(ran: tuple[Path, list[dict[str, Any]]]) -> None:
    for got in ran[1]:
        assert "leave out device, device_map and allow_pickle" in got["refused"]


def test_a_plan_needs_torchrun_and_full_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    toy_model().save_pretrained(tmp_path / "full")
    with pytest.raises(InputError, match=r"there is one: start .* torchrun --nproc-per-node 2"):
        load_model(tmp_path / "full", tp_plan="auto")
    with pytest.raises(InputError, match=r"tp_plan 'all' is not known; give 'auto'"):
        load_model(tmp_path / "full", tp_plan="all")
    toy_model(expert_rank=4).save_pretrained(tmp_path / "low")
    for name, more in (
        ("low", {}),
        ("full", {"dtype": "int8"}),
        ("full", {"device_map": "auto"}),
        ("full", {"allow_pickle": True}),
    ):
        with pytest.raises(InputError, match="tp_plan cuts full weights in safetensors"):
            load_model(tmp_path / name, tp_plan="auto", **more)
