"""The catalog of released checkpoints, and the table that 'cogvlm models' prints."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cogvlm import devices
from cogvlm.catalog import CHECKPOINTS, OWNERS, find
from cogvlm.cli import app
from cogvlm.errors import InputError

PARITY = Path(__file__).parent / "parity"


def test_names_are_unique_and_found_under_both_owners() -> None:
    names = [c.name for c in CHECKPOINTS]
    assert len(set(names)) == len(names) == 16
    for checkpoint in CHECKPOINTS:
        for owner in OWNERS:
            assert find(f"{owner}/{checkpoint.name}") is checkpoint
        assert find(checkpoint.name) is checkpoint
        assert checkpoint.loadable
        assert (checkpoint.stored == "fp4") is checkpoint.name.endswith("-int4")
    for wrong in ("someone/glm-4v-9b", "cogvlm3", "", "THUDM/"):
        with pytest.raises(InputError, match="'cogvlm models' lists them"):
            find(wrong)


def test_terms_say_both_uses_and_llama_where_it_is_inside() -> None:
    for checkpoint in CHECKPOINTS:
        terms = checkpoint.licence
        assert terms.research and "register" in terms.commercial
        assert ("Llama 3" in terms.also) is checkpoint.name.startswith("cogvlm2-")


@pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=lambda c: c.name)
def test_configurations_are_the_released_ones(checkpoint: object) -> None:
    from cogvlm.catalog import Checkpoint

    assert isinstance(checkpoint, Checkpoint)
    config = checkpoint.config()
    sizes = {
        "cogvlm": 490,
        "cogvlm2": 1344,
        "cogvlm2-video": 224,
        "cogagent": 224,
        "glm-4v": 1120,
    }
    wanted = 224 if "224" in checkpoint.name else sizes[checkpoint.architecture]
    assert config.vision.image_size == wanted
    assert config.vision.num_hidden_layers == 63
    assert config.hidden_size == 4096


def test_models_prints_a_table_and_json(monkeypatch: pytest.MonkeyPatch) -> None:
    card = devices.Device("cuda:0 card", "cuda", 40.0)
    monkeypatch.setattr(devices, "find_devices", lambda: [card])
    names = ["THUDM/cogvlm2-llama3-chat-19B", "cogvlm2-llama3-chat-19B-int4", "cogvlm-chat-hf"]
    result = CliRunner().invoke(app, ["models", *names])
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert re.match(
        r"cogvlm2-llama3-chat-19B +CogVLM2 License +41\.8 GB +22\.5 GB .*  int8 on cuda:0 card$",
        lines[1],
    )
    assert lines[2].endswith("fp4 on cuda:0 card")
    assert lines[3].endswith("bfloat16 on cuda:0 card")
    assert "Llama 3" in result.stdout and "the model's page says decides" in lines[-1]

    rows = json.loads(CliRunner().invoke(app, ["models", *names, "--json"]).stdout)
    assert [row["device"] for row in rows] == ["cuda:0 card"] * 3
    assert rows[0]["bytes"]["bfloat16"].keys() == rows[0]["parameters"].keys()
    assert CliRunner().invoke(app, ["models", "cogvlm3"]).exit_code == 2
