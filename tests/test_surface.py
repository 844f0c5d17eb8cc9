"""The public names: a change here is a change for every user, and belongs in the changelog."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.main import get_command

import cogvlm
from cogvlm.cli import app

ROOT = Path(__file__).parents[1]

NAMES = """
Answer CheckpointError CogVLMConfig CogVLMError CogVLMForCausalLM ConfigError DownloadError
GenerationSettings Image ImageError InputError Loaded Message MessageError Processor RemoteError
ResourceError Text Video VisionConfig __version__ assistant complete open_model preset run_file
stream system user
""".split()  # noqa: SIM905

OPTIONS = {
    "ask": """images question --model --tokenizer --adapter --system --max-new-tokens --temperature
        --top-p --top-k --seed --precision --device --allow-pickle
        --repetition-stop --base-url --api-key-env --max-side --json""",
    "read": "images --model --precision --device --json",
    "chat": """images --system --load --model --tokenizer --adapter --max-new-tokens --temperature
        --top-p --top-k --seed --precision --device --allow-pickle --repetition-stop --base-url
        --api-key-env --max-side""",
    "caption": """folder --output --format --prompt --prompt-file --tags-suffix --prefix --suffix
        --recursive --overwrite --shard-size --batch-size --processes --device --strict --model
        --tokenizer --adapter --max-new-tokens --temperature --top-p --top-k --seed --precision
        --allow-pickle --repetition-stop --base-url --api-key-env --max-side --json""",
    "run": """requests --output --model --tokenizer --adapter --batch-size --max-new-tokens
        --temperature --top-p --top-k --seed --precision --device --allow-pickle
        --repetition-stop --base-url --api-key-env --max-side --json""",
    "train": "recipe --set --out --resume --plan --device-memory",
    "merge": "model adapter out",
    "eval": """requests --output --task --metric --limit --answered --model --tokenizer --adapter
        --batch-size --max-new-tokens --precision --device --allow-pickle""",
    "render": "folder --count --seed --held-out --min-chars --max-chars --strength",
    "quantize": "model out --precision",
    "data check": """paths --format --images --question --allow-outside --decode --tokens
        --max-tokens --model --tokenizer --json""",
    "data show": """path --count --seed --format --images --question --allow-outside --sheet
        --json""",
    "data render": """out --count --kinds --texts --fonts --side --larger --strength --among
        --held-out --turns --licence --seed --shard-size --processes --ray""",
    "data label": """folder out --sure --share --turns --licence --seed --shards --processes
        --ray""",
    "data latex": """out paths --made-up --pages --parts --texts --side --strength --turns
        --licence --seed --shards --processes --ray""",
    "data filter": """out paths --least-side --aspect --languages --least-words --most-words
        --unsafe --distance --images --question --allow-outside --licence --shards --processes
        --ray""",
    "data pack": """out paths --distance --images --question --allow-outside --licence --seed
        --shards --processes --ray""",
    "serve": """--model --tokenizer --adapter --name --host --port --slots --queue --max-tokens
        --max-images --max-pixels --max-body-mb --max-seconds --api-key --cors --allow-url --grace
        --precision --device --allow-pickle --base-url --api-key-env --max-side --quiet""",
    "models": "names --json",
    "doctor": "--json",
}


def test_the_exported_names_are_frozen() -> None:
    assert sorted(cogvlm.__all__) == sorted(NAMES)
    assert set(NAMES) <= set(dir(cogvlm))


@pytest.mark.parametrize("name", NAMES)
def test_every_exported_name_is_there(name: str) -> None:
    value = getattr(cogvlm, name)
    assert value is getattr(cogvlm, name)
    if name != "__version__":
        assert value.__module__.startswith("cogvlm.")
        assert value.__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = cogvlm.nothing


def test_what_type_checkers_see_is_what_there_is() -> None:
    source = (ROOT / "src/cogvlm/__init__.py").read_text(encoding="utf-8")
    seen = re.findall(r"^    from \.\S+ import \w+ as (\w+)", source, flags=re.MULTILINE)
    assert sorted(seen) == sorted(set(NAMES) - {"__version__"})


def test_the_commands_and_options_are_frozen() -> None:
    leaves = {
        f"{name} {sub}".strip(): command
        for name, group in get_command(app).commands.items()
        for sub, command in getattr(group, "commands", {"": group}).items()
    }
    found = {
        name: [p.opts[0] if p.opts[0].startswith("--") else p.name for p in command.params]
        for name, command in leaves.items()
    }
    assert found == {name: options.split() for name, options in OPTIONS.items()}


def test_the_package_is_typed_and_says_its_version_once() -> None:
    assert (ROOT / "src/cogvlm/py.typed").exists()
    assert re.fullmatch(r"\d+\.\d+\.\d+", cogvlm.__version__)
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'dynamic = ["version"]' in pyproject
    assert cogvlm.__version__ not in pyproject
