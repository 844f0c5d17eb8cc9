"""One server, a model and what was tuned on it: each answers as it does alone."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from cogvlm import adapter
from cogvlm.cli import app
from cogvlm.engine import Engine, GenerationSettings, generate
from cogvlm.errors import ConfigError, InputError
from cogvlm.load import Loaded, load
from cogvlm.processor import user
from cogvlm.serve import Desk, Facts, Settings
from fakes import image, row
from serve.fakes import HTTP, FakeEngine, image_part, make_desk, png, running, toy_processor
from train import toys

TARGETS = {"red": ["experts.qkv", "language.mlp"], "blue": ["language"]}
NAMES = ("toy", "toy:red", "toy:blue")


def write_adapter(model: Path, folder: Path, seed: int) -> Path:
    """A LoRA that changes much, and a part of its own."""
    loaded = load(model, "float32", "cpu")
    config = adapter.inject(loaded.model, TARGETS[folder.name], 4, 8)
    torch.manual_seed(seed)
    values = {}
    for name, parameter in loaded.model.named_parameters():
        if adapter.is_lora(name):
            values[name] = torch.randn_like(parameter) * 0.5
    name = "model.embed_tokens.weight"
    values[name] = loaded.model.get_parameter(name).detach() * 1.5
    folder.mkdir()
    adapter.save(folder, values, config, "toy")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    toys.write_model(folder / "model", tie_word_embeddings=True)
    for seed, name in enumerate(TARGETS):
        write_adapter(folder / "model", folder / name, seed)
    return folder


@pytest.fixture(scope="module")
def models(place: Path) -> dict[str, Loaded]:
    """The model, and the adapters beside it."""
    base = replace(load(place / "model", "float32", "cpu"), name="toy")
    tuned = {n: adapter.beside(base.model, place / n) for n in TARGETS}
    return {"toy": base} | {f"toy:{n}": replace(base, model=m) for n, m in tuned.items()}


# --- models that share weights ---


@torch.no_grad()
def test_the_base_stays_to_the_bit_and_each_is_as_if_loaded_alone(
    place: Path, models: dict[str, Loaded]
) -> None:
    alone = {"toy": load(place / "model", "float32", "cpu")}
    alone |= {
        f"toy:{n}": load(place / "model", "float32", "cpu", adapter=place / n) for n in TARGETS
    }
    found = {}
    for name in NAMES:
        prompt = row(models[name].model, 4, image(3), 6)
        found[name] = models[name].model(**prompt).logits
        torch.testing.assert_close(found[name], alone[name].model(**prompt).logits, rtol=0, atol=0)
    assert float((found["toy"] - found["toy:red"]).abs().max()) > 0.1
    assert float((found["toy:blue"] - found["toy:red"]).abs().max()) > 0.1


def test_weights_are_shared_but_for_what_was_tuned(models: dict[str, Loaded]) -> None:
    base = dict(models["toy"].model.named_parameters())
    own = {
        adapter.plain_name(name)
        for name, p in models["toy:red"].model.named_parameters()
        if not adapter.is_lora(name) and p is not base[adapter.plain_name(name)]
    }
    assert own == {"model.embed_tokens.weight"}
    red = models["toy:red"].model
    assert red.lm_head.weight is red.model.embed_tokens.weight  # tied, as it was
    assert not any(adapter.is_lora(name) for name in base)


def test_a_spread_model_takes_no_adapter_beside_it(place: Path, models: dict[str, Loaded]) -> None:
    model: Any = models["toy"].model
    model.hf_device_map = {}
    try:
        with pytest.raises(InputError, match="cogvlm merge"):
            adapter.beside(model, place / "red")
    finally:
        del model.hf_device_map


# --- one server ---


@pytest.fixture(scope="module")
def url(models: dict[str, Loaded]) -> Iterator[str]:
    with ExitStack() as stack:
        engines = {n: stack.enter_context(Engine(m, slots=3)) for n, m in models.items()}
        facts = {n: Facts(n, context=512) for n in models}
        more = [(engines[n], facts[n]) for n in NAMES[1:]]
        processor = models["toy"].processor
        desk = Desk(engines["toy"], processor, facts["toy"], Settings(), more)
        yield stack.enter_context(running(desk))


def ask(url: str, model: str, picture: bytes, question: str) -> str:
    content = [image_part(picture), {"type": "text", "text": question}]
    body = {"model": model, "messages": [{"role": "user", "content": content}]}
    body |= {"max_tokens": 6, "temperature": 0}
    answer = HTTP.post(f"{url}/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == model
    return str(answer.json()["choices"][0]["message"]["content"])


def test_each_is_asked_by_its_name_and_none_mixes_with_another(
    url: str, models: dict[str, Loaded]
) -> None:
    asked = [(name, seed) for seed in (1, 2) for name in NAMES] * 2  # the same prompts to all
    said: dict[int, str] = {}

    def one(i: int) -> None:
        said[i] = ask(url, asked[i][0], png(asked[i][1]), "What colour?")

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wanted = {}
    for name, seed in asked:
        loaded = models[name]
        colour = Image.open(io.BytesIO(png(seed)))
        batch = loaded.processor.batch([loaded.processor.encode([user(colour, "What colour?")])])
        wanted[name, seed] = next(iter(generate(loaded, batch, GenerationSettings(6)))).text
    assert [said[i] for i in range(len(asked))] == [wanted[key] for key in asked]
    assert len(set(wanted.values())) > 2


def test_the_lists_name_all_and_others_are_refused(url: str) -> None:
    listed = [m["id"] for m in HTTP.get(f"{url}/v1/models").json()["data"]]
    tags = [m["name"] for m in HTTP.get(f"{url}/api/tags").json()["models"]]
    assert listed == tags == list(NAMES)
    assert HTTP.get(f"{url}/v1/models/toy:red").json()["id"] == "toy:red"
    refused = HTTP.post(f"{url}/v1/completions", json={"model": "toy:green", "prompt": "a"})
    assert refused.status_code == 404 and "'toy:blue'" in refused.text
    shown = HTTP.post(f"{url}/api/show", json={"model": "toy:red:latest"})
    assert shown.status_code == 200
    body = {"model": "toy:red", "prompt": "Hi", "stream": False, "options": {"num_predict": 2}}
    assert HTTP.post(f"{url}/api/generate", json=body).json()["model"] == "toy:red"
    assert HTTP.post(f"{url}/api/chat", json={"model": "red", "messages": []}).status_code == 404


def test_counts_are_of_all_and_names_are_each_ones_own() -> None:
    engines = [FakeEngine(), FakeEngine()]
    facts = make_desk(engines[0]).facts
    more = [(engines[1], Facts("other"))]
    desk = Desk(engines[0], toy_processor(), facts, Settings(), more)
    assert desk.stats.slots == 2 * engines[0].stats.slots
    assert desk.stats.steps == 2 * engines[0].stats.steps
    with pytest.raises(ConfigError, match="two models are called 'toy'"):
        Desk(engines[0], toy_processor(), facts, Settings(), [(engines[1], facts)])


# --- the command ---


@pytest.mark.parametrize("given", [["a=x", "a=y"], ["a:b=x"], ["x", "y/x"]])
def test_a_name_is_of_one_adapter(given: list[str]) -> None:
    options = [word for one in given for word in ("--adapter", one)]
    done = CliRunner().invoke(app, ["serve", "--port", "0", *options])
    assert done.exit_code == 2 and "give each a name of its own" in done.output


def test_other_commands_take_one_too(place: Path, tmp_path: Path) -> None:
    Image.new("RGB", (56, 56), (200, 10, 10)).save(tmp_path / "a.png")
    said = []
    for name in (None, "red"):
        options = ["--adapter", str(place / name)] if name else []
        command = ["caption", str(tmp_path), "--model", str(place / "model"), "--overwrite"]
        more = ["--max-new-tokens", "5", "--precision", "float32", "--device", "cpu"]
        done = CliRunner().invoke(app, [*command, *more, *options])
        assert done.exit_code == 0, done.output
        said.append((tmp_path / "a.txt").read_text())
    assert said[0] != said[1]
