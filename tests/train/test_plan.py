"""What a run will need is what it takes; what is said to fit fits; nothing is loaded for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cogvlm import devices, memory
from cogvlm.catalog import find
from cogvlm.cli import app
from cogvlm.data.sft import Mix
from cogvlm.errors import ConfigError, InputError
from cogvlm.train import fit, lengths, told
from cogvlm.train import plan as planning
from cogvlm.train import recipe as recipes
from cogvlm.train.plan import Plan, parse_memory, plan
from cogvlm.train.rows import Limit, encode, labelled
from train import toys

ROOT = Path(__file__).parents[2]
CPU = devices.Device("cpu", "cpu", 1000.0)
TUNED = sorted(
    p for p in (ROOT / "recipes").glob("*.yaml") if "stage: tune" in p.read_text("utf-8")
)
# Gigabytes with a twentieth to spare; of the first two, with 512 tokens in and out, the goals.
MOST = {
    "lora-19b": 46,
    "lora-19b-int4": 24,
    "lora-nano-receipts": 10,
    "lora-video": 46,
    "full-19b": 420,
}


@pytest.fixture(scope="module")  # what is counted for one test serves the next
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of a toy model; its data do not exist, and its weights are no longer there."""
    folder = tmp_path_factory.mktemp("plan")
    model = toys.write_model(folder / "model")
    (model / "model.safetensors").unlink()
    lora = {"targets": ["experts.qkv", "tower"], "rank": 4}
    return toys.write_recipe(folder / "r.yaml", model, folder / "none.jsonl", lora=lora)


def planned(path: Path, *settings: str, device: devices.Device = CPU, processes: int = 1) -> Plan:
    return plan(tuned(path, *settings), device, processes)


def tuned(path: Path, *settings: str) -> recipes.TuneRecipe:
    loaded = recipes.load(path, list(settings))
    assert isinstance(loaded, recipes.TuneRecipe)
    return loaded


# --- against what is taken ---


@pytest.mark.parametrize("case", ["full_checkpointing", "packed", "image_loss"])
def test_a_step_takes_what_was_planned(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import train_memory

    found = train_memory.compare(case, quick=True)
    assert abs(found["error"]) < train_memory.LIMIT, found


@pytest.mark.slow
def test_what_two_processes_divide_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import train_memory

    found = train_memory.together("lora_fsdp", quick=True)
    assert abs(found["error"]) < train_memory.LIMIT, found


def test_what_stays_is_exact(toy: Path) -> None:
    found = planned(toy, "schedule.ema=0.9")
    config, _ = planning.configuration(found.recipe.model)
    weights = sum(4 * size.parameters for size in memory.parts_of(config).values())
    parts = sum(v for (what, _), v in found.stays.items() if what in memory.PARTS)
    assert parts == weights
    lora = found.stays["LoRA", "float32"]
    assert found.stays["optimiser", "adamw"] == 2 * lora
    assert found.stays["mean", "float32"] == found.gradients == lora
    whole = planned(toy, "lora=null", "parts={experts: {}}", "precision=bfloat16")
    assert {how for what, how in whole.stays if what == "experts"} == {"float32"}
    assert {how for what, how in whole.stays if what == "tower"} == {"bfloat16"}
    assert whole.moments["update"] > whole.gradients > 0


def test_what_is_kept_goes_with_the_rows_and_not_with_checkpointing(toy: Path) -> None:
    one, four = (planned(toy, f"batch_size={n}", "max_tokens=24") for n in (1, 4))
    assert four.kept["decoder"] == pytest.approx(4 * one.kept["decoder"], rel=0.02)
    less = planned(toy, "batch_size=4", "max_tokens=24", "checkpointing=true")
    assert less.kept["decoder"] < 0.3 * four.kept["decoder"]
    assert less.kept["tower"] < 0.8 * four.kept["tower"]  # pictures and adapter stay
    assert less.stays == four.stays and less.peak < four.peak
    frozen = planned(toy, "batch_size=4", "max_tokens=24", "lora.targets=[experts.qkv]")
    assert frozen.kept["tower"] < less.kept["tower"]


# --- of several processes ---


def test_what_processes_divide_is_divided(toy: Path) -> None:
    parts = ("lora=null", "parts={experts: {}, language: {}}", "max_tokens=24", "schedule.ema=0.9")
    one = planned(toy, *parts, "accumulate=2")
    whole, cut = (
        planned(toy, *parts, "accumulate=2", f"parallel={kind}", processes=4)
        for kind in ("zero2", "fsdp")
    )
    for found in (whole, cut):
        assert found.gradients == one.gradients // 4
        for key, size in one.stays.items():
            assert size / 4 <= found.stays[key] <= size / 4 + 1
        assert found.moments["update"] == pytest.approx(one.moments["update"] / 4, abs=1)
        weights = sum(size for (what, _), size in one.stays.items() if what in memory.PARTS)
        assert found.moments["loading"] == max(0, weights - sum(found.stays.values()))
    # The same activations; gathered are all weights, or what is no layer and two of the layers.
    wider = whole.moments["decoder"] - cut.moments["decoder"]
    assert 0 < wider < weights
    kept = one.moments["decoder"] - one.gradients
    assert whole.moments["decoder"] == kept + whole.gradients + weights
    same = planned(toy, *parts, "accumulate=2", processes=4)  # ddp holds all
    assert same.stays == one.stays and same.moments == one.moments


def test_what_processes_cut_is_their_own(toy: Path) -> None:
    parts = ("lora=null", "parts={experts: {}, language: {}}", "max_tokens=24", "accumulate=2")
    one = planned(toy, *parts)
    two, four = (planned(toy, *parts, "parallel=tensor", processes=n) for n in (2, 4))
    # Layers are matrices that are cut, and norms; of the tower, the MLPs are cut.
    for what in ("language", "experts", "embedding", "head"):
        key = what, "float32"
        assert one.stays[key] / 2 <= two.stays[key] < 0.51 * one.stays[key]
        assert one.stays[key] / 4 <= four.stays[key] < 0.27 * one.stays[key]
    tower = "tower", "float32"
    assert 0.5 * one.stays[tower] < two.stays[tower] < 0.9 * one.stays[tower]
    assert two.gradients < 0.51 * one.gradients and "loading" not in two.moments
    assert two.stays["optimiser", "adamw"] == 2 * two.gradients
    # Rows are whole in each; only what lies inside the MLPs is cut.
    assert 0.5 * one.kept["decoder"] < two.kept["decoder"] < 0.95 * one.kept["decoder"]
    lora = planned(toy, "lora.targets=[experts.mlp]", "parallel=tensor", processes=2)
    whole = planned(toy, "lora.targets=[experts.mlp]")
    assert whole.gradients / 2 < lora.gradients < whole.gradients
    assert planned(toy, *parts, "parallel=tensor").stays == one.stays  # of one process


def test_quantised_weights_are_not_divided(toy: Path) -> None:
    with pytest.raises(ConfigError, match="int8 cannot be cut over processes; take ddp"):
        planned(toy, "precision=int8", "parallel=fsdp", processes=2)
    with pytest.raises(ConfigError, match="parallel tensor: int8 cannot be cut over processes"):
        planned(toy, "precision=int8", "parallel=tensor", processes=2)


# --- of data that are at hand ---


def test_the_rows_that_are_there_decide(toy: Path, tmp_path: Path) -> None:
    labels = toys.write_data(tmp_path / "data")
    settings = (f"data=[{labels}]", "max_tokens=200", "lora.targets=[experts.qkv]")
    rows = lengths.look(tuned(toy, *settings))
    assert isinstance(rows, lengths.Rows) and rows.all and rows.records == 19
    made = tuned(toy, *settings, "precision=float32")
    processor = lengths._processor(made)
    mix = Mix.open([str(labels)], 0, 0.25, "train")
    real = [encode(processor, mix[i].messages, Limit())[0] for i in range(len(mix))]
    most = max(len(row.input_ids) for row in real)
    assert rows.longest.tokens == most > rows.usual.tokens
    assert rows.longest.answers == max(map(labelled, real))
    assert rows.longest.images == 1
    assert rows.longest.image_tokens == int(real[0].token_type_ids.sum())
    assert (rows.longest.height, rows.longest.width) == real[0].pixel_values[0].shape[1:]
    found = plan(made, CPU, rows=rows)
    assert found.shape.tokens == most and found.shape.rows == 4
    # Of more records than are looked at, max_tokens is what is known.
    some = replace(rows, records=9999)
    assert planning._shape(made, planning.configuration(made.model)[0], some).tokens == 200
    (line,) = told._rows(found)
    assert line.startswith(f"rows: all 19 looked at, the longest {most} tokens")
    peak = planning.at(found, planning.usual(made, rows) or found.shape).peak
    assert f"(peak then {peak / 1e9:.3f} GB)" in line and peak < found.peak


def test_rows_that_are_left_out_do_not_count(toy: Path, tmp_path: Path) -> None:
    labels = toys.write_data(tmp_path / "data")
    all_ = lengths.look(tuned(toy, f"data=[{labels}]"))
    assert isinstance(all_, lengths.Rows)
    limit = f"max_tokens={all_.usual.tokens}"
    dropped, cut = (
        lengths.look(tuned(toy, f"data=[{labels}]", limit, f"too_long={how}"))
        for how in ("drop", "cut")
    )
    assert isinstance(dropped, lengths.Rows) and isinstance(cut, lengths.Rows)
    assert dropped.longest.tokens == cut.longest.tokens == all_.usual.tokens
    assert dropped.usual.tokens <= cut.usual.tokens == all_.usual.tokens
    with pytest.raises(InputError, match="none of the first 19 records can be used"):
        lengths.look(tuned(toy, f"data=[{labels}]", "max_tokens=8"))


@pytest.mark.parametrize(
    ("setting", "why"),
    [("name=x", "none.jsonl"), ("model=cogvlm2-llama3-chat-19B", "is not on this disk")],
)
def test_where_data_or_tokenizer_are_not_here_it_says_so(
    toy: Path, tmp_path: Path, setting: str, why: str
) -> None:
    data = [] if "model" not in setting else [f"data=[{toys.write_data(tmp_path / 'data')}]"]
    found = lengths.look(tuned(toy, setting, *data))
    assert isinstance(found, str) and why in found


# --- what would fit ---


def test_the_settings_that_are_named_make_it_fit(toy: Path) -> None:
    found = planned(toy)
    small = replace(found.device, memory_gb=0.7 * found.need / 1e9)
    lines = told.describe(replace(found, device=small))
    assert lines[-2].startswith("does not fit: cpu")
    size, _, options = lines[-1].removeprefix("fits in ").partition(" GB with ")
    settings = options.removeprefix("--set ").split(" --set ")
    assert settings and all("=" in setting for setting in settings)
    again = planned(toy, *settings, device=small)
    assert again.fits and f"{again.need / 1e9:.1f}" == size


def test_where_nothing_fits_it_says_how_many_devices(toy: Path) -> None:
    least = ("lora=null", "parts={experts: {}, language: {}}", "checkpointing=true", "batch_size=1")
    found = planned(toy, *least, "schedule.optimizer=adamw8bit", "max_tokens=24")
    # The model itself has to fit before it is divided.
    tiny = devices.Device("cpu", "cpu", 0.4 * sum(found.stays.values()) / 1e9)
    none = replace(found, device=tiny)
    assert "each loads the model before it is divided" in told.describe(none)[-1]
    small = devices.Device("cpu", "cpu", 0.99 * fit.fitting(none)[1].need / 1e9)
    lines = told.describe(replace(found, device=small))
    assert lines[-3].startswith("does not fit") and lines[-2].startswith("still ")
    count, _, rest = lines[-1].partition(" such devices hold it, ")
    assert "parallel=fsdp" in rest
    many = planned(
        toy, *least, "max_tokens=24", "parallel=fsdp", device=small, processes=int(count)
    )
    assert many.fits and f"{many.need / 1e9:.1f} GB on each" in rest


@pytest.mark.parametrize("path", TUNED, ids=[p.stem for p in TUNED])
def test_every_recipe_has_a_plan(path: Path) -> None:
    found = planned(path, device=parse_memory("80GB")[0])
    assert found.shape.tokens == (found.recipe.max_tokens or found.shape.tokens)
    assert found.shape.text >= 64 and found.gradients > 0
    assert found.need < 1e9 * MOST.get(path.stem, 200)
    if path.stem in ("lora-19b", "lora-19b-int4"):
        assert found.shape.text == 1024 and found.shape.answers == 512
    if path.stem == "lora-19b-int4":  # the tower in int8, as loading makes it
        assert found.stays["experts", "int4"] < 4e9 < found.stays["tower", "int8"]


def test_films_have_many_pictures_and_others_one() -> None:
    found = recipes.load(ROOT / "recipes/lora-video.yaml", ["max_tokens=null"])
    assert isinstance(found, recipes.TuneRecipe)
    for name, images in (
        ("cogvlm2-video-llama3-chat", 24),
        ("glm-4v-9b", 1),
        ("cogagent-vqa-hf", 1),
    ):
        assert planning._shape(found, find(name).config()).images == images


def test_the_largest_pictures_of_a_schedule_count() -> None:
    path = ROOT / "recipes/cogvlm-pretrain-2.yaml"
    loaded = recipes.load(path)
    assert isinstance(loaded, recipes.TuneRecipe) and loaded.side == 490
    assert planning._shape(loaded, find("cogvlm-base-490-hf").config()).image_tokens == 1227


# --- said and refused ---


def test_the_command_says_it_before_anything_is_loaded(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something was loaded")

    monkeypatch.setattr("cogvlm.load.load_model", refuse)
    done = CliRunner().invoke(app, ["train", str(toy), "--plan"])
    assert done.exit_code == 0, done.output
    for text in (
        "LoRA        float32",
        "kept by decoder",
        "checkpointing  without",
        "fits: cpu",
    ):
        assert text in done.output
    assert not (toy.parent / "runs").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plan", "--device-memory", "lots"], "give an amount such as 24GB"),
        (["--plan", "--device-memory", "-3GB"], "give an amount such as 24GB"),
        (["--plan", "--device-memory", "0x24GB"], "or 8x24GB for eight devices"),
        (["--device-memory", "24GB"], "--device-memory is for --plan"),
        (["--plan", "--set", "model=me/mine"], "neither a folder here nor in the catalog"),
        (["--plan", "--set", "max_tokens=7"], "holds no text beside 6 image tokens"),
        (["--plan", "--set", "precision=int3"], "'int3' is not one of"),
        (["--plan", "--set", "precision=int8", "--set", "parts={experts: {}}"], "is quantised"),
    ],
)
def test_what_cannot_be_planned_is_refused(toy: Path, options: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["train", str(toy), *options])
    assert done.exit_code in (1, 2) and message in done.output


def test_other_stages_and_other_amounts() -> None:
    with pytest.raises(ConfigError, match="stage 'read' has no --plan"):
        told.report(ROOT / "recipes/nano-read.yaml", [])
    assert parse_memory("24GiB")[0].room == 24 * 2**30 and parse_memory("80e9")[0].room == 80e9
    recipe = tuned(ROOT / "recipes/lora-19b.yaml")
    assert told._devices(recipe, "8x24GB") == parse_memory("8x24GB")
    assert parse_memory("8x24GB")[1] == 8 and parse_memory("24GB")[1] == 1
    with pytest.raises(InputError, match="give an amount"):
        parse_memory("")
