"""Every recipe in the repository loads; wrong ones are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from cogvlm.errors import ConfigError, ResourceError
from cogvlm.train import recipe, stages
from cogvlm.train.run import objective

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=[p.stem for p in RECIPES])
def test_recipe_loads(path: Path) -> None:
    loaded = recipe.load(path)
    assert loaded.name == path.stem
    if isinstance(loaded, recipe.TuneRecipe):
        assert loaded.stage == "tune" and Path(loaded.base) == path.parent
        assert loaded.lora is not None or loaded.parts
    else:
        assert loaded.stage in stages.STAGES
        assert loaded.model_config.vision.hidden_size > 0


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stage: read\nschedule: {steps: 1, lrr: 2}", "did you mean 'lr'"),
        ("stage: read\nschedul: {steps: 1}", "did you mean 'schedule'"),
        ("stage: read", "steps"),
        ("schedule: {steps: 1}", "stage"),
        ("stage: read\nschedule: {steps: 1, lr: fast}", "lr is 'fast'; give a number"),
        ("stage: read\nschedule: {steps: 1.5}", "steps is 1.5; give a whole number"),
        ("stage: read\nseed: true\nschedule: {steps: 1}", "seed is True; give a whole number"),
        ("stage: 4\nschedule: {steps: 1}", "stage is 4; give text"),
        ("- a\n- b", "keys and values"),
        ("stage: [", "not valid YAML"),
    ],
)
def test_wrong_recipes_name_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe.load(write(tmp_path, text))


def test_settings_override_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "stage: read\nschedule: {steps: 5}")
    changed = recipe.load(path, ["schedule.steps=9", "config.expert_rank=2", "init=[a, b]"])
    assert isinstance(changed, recipe.Recipe)
    assert changed.schedule.steps == 9
    assert changed.model_config.expert_rank == 2
    assert changed.init == ("a", "b")
    with pytest.raises(ConfigError, match="write key=value"):
        recipe.load(path, ["steps"])


def test_numbers_are_numbers_however_they_are_written(tmp_path: Path) -> None:
    path = write(tmp_path, "stage: read\nschedule: {steps: 1, lr: 3e-4, weight_decay: 0}")
    assert recipe.load(path).schedule.lr == 3e-4
    for text, value in (("1e-3", 1e-3), ("2.E+1", 20.0), ("-5e-1", -0.5), ("7", 7)):
        assert recipe.load(path, [f"schedule.lr={text}"]).schedule.lr == value
    assert recipe.load(path, ["name=1e-4x"]).name == "1e-4x"


def test_a_setting_that_is_no_yaml_is_told(tmp_path: Path) -> None:
    path = write(tmp_path, "stage: read\nschedule: {steps: 1}")
    with pytest.raises(ConfigError, match=r"--set name=\[1: not valid YAML"):
        recipe.load(path, ["name=[1"])


def test_unknown_stage_and_missing_device(tmp_path: Path) -> None:
    loaded = recipe.load(write(tmp_path, "stage: dance\nschedule: {steps: 1}"))
    with pytest.raises(ConfigError, match="'dance' is not one of"):
        objective(loaded)
    far = recipe.load(write(tmp_path, "stage: read\nschedule: {steps: 1}\ndevice: cuda:99"))
    with pytest.raises(ResourceError, match="device 'cuda:99' is not usable here"):
        objective(far)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.yaml: cannot be read"):
        recipe.load(tmp_path / "gone.yaml")
