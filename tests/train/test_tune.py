"""Stage "tune" at toy size: exact sums, equal forms of one computation, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cogvlm import adapter
from cogvlm.errors import ConfigError, InputError
from cogvlm.load import load, load_model, quantise_folder
from cogvlm.models.cogvlm import CogVLMForCausalLM
from cogvlm.processor import assistant, user
from cogvlm.train import recipe as recipes
from cogvlm.train.compute import Compute, recompute
from cogvlm.train.loop import Loop, Pieces
from cogvlm.train.rows import Limit, encode, labelled
from cogvlm.train.run import objective, prepare, run
from cogvlm.train.tune import TuneObjective
from fakes import image, row
from train import toys

LORA = {"targets": ["experts.qkv", "language.mlp", "adapter", "tower"], "rank": 4}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model`` and ``data``."""
    folder = tmp_path_factory.mktemp("tune")
    toys.write_model(folder / "model")
    toys.write_data(folder / "data")
    return folder


def loop_of(place: Path, out: Path, **changes: Any) -> Loop:
    path = toys.write_recipe(
        out.with_suffix(".yaml"), place / "model", place / "data" / "labels.jsonl", **changes
    )
    return prepare(recipes.load(path), out)


def objective_of(loop: Loop) -> TuneObjective:
    assert isinstance(loop.objective, TuneObjective)
    return loop.objective


def gradients(loop: Loop) -> dict[str, Tensor]:
    """Of the first step; the rate is zero, so that the parameters stay."""
    batch = next(loop.objective.batches(0))
    figures = loop.one_step(batch)
    assert figures["loss"] > 1
    named = loop.objective.trained.named_parameters()
    return {n: p.grad.clone() for n, p in named if p.grad is not None} | {
        "loss": torch.tensor(figures["loss"])
    }


# --- one step ---


@pytest.mark.parametrize(("size", "times"), [(2, 4), (1, 8)])
def test_accumulation_is_exact_with_answers_of_uneven_length(
    place: Path, tmp_path: Path, size: int, times: int
) -> None:
    plan = {"schedule": {"clip": 1e9}, "parts": {"experts": {}, "adapter": {}}, "lora": LORA}
    whole = loop_of(place, tmp_path / "a", batch_size=8, accumulate=1, **plan)
    pieces = next(whole.objective.batches(0)).pieces
    assert len(pieces) == 1 and pieces[0].count == sum(
        labelled(r) for r in objective_of(whole).steps[0].rows
    )
    lengths = {labelled(r) for r in objective_of(whole).steps[0].rows}
    assert len(lengths) > 2  # a mean of means would be another loss
    split = loop_of(place, tmp_path / "b", batch_size=size, accumulate=times, **plan)
    assert len(next(split.objective.batches(0)).pieces) == times
    wanted, found = gradients(whole), gradients(split)
    assert wanted.keys() == found.keys() and len(wanted) > 10
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=2e-6, msg=name)


def test_the_loss_is_on_every_answer_and_on_nothing_else(place: Path) -> None:
    processor = load(place / "model", "float32", "cpu").processor
    talk = [user("One?"), assistant("red"), user("Two?"), assistant("blue")]
    coded, cut = encode(processor, talk, Limit())
    assert coded.labels is not None and not cut
    learnt = coded.input_ids[coded.labels >= 0].tolist()
    end = processor.tokenizer.eos_id
    words = processor.tokenizer
    assert learnt == [*words.encode("red"), end, *words.encode("blue"), end]


def test_checkpointing_changes_no_number(place: Path, tmp_path: Path) -> None:
    plan = {"lora": {**LORA, "dropout": 0.3}, "parts": {"tower": {}}}
    plain = gradients(loop_of(place, tmp_path / "a", **plan))
    loop = loop_of(place, tmp_path / "b", checkpointing=True, **plan)
    calls: list[int] = []
    layer = loop.objective.trained.get_submodule("model.layers.1.input_layernorm")
    tower = loop.objective.trained.get_submodule("model.vision.transformer.layers.0.attention")
    for module in (layer, tower):
        module.register_forward_hook(lambda *_: calls.append(1))
    again = gradients(loop)
    assert len(calls) >= 4  # both were computed a second time
    assert plain.keys() == again.keys()
    for name, value in plain.items():
        torch.testing.assert_close(again[name], value, rtol=0, atol=0, msg=name)
    assert recompute(torch.nn.Module()) == 0


@pytest.mark.parametrize(("kind", "near"), [("bf16", 0.05), ("fp16", 0.02)])
def test_half_precision_computes_nearly_the_same_step(
    place: Path, tmp_path: Path, kind: str, near: float
) -> None:
    plan = {"lora": LORA, "schedule": {"clip": 1e9}}
    exact = gradients(loop_of(place, tmp_path / "a", **plan))
    loop = loop_of(place, tmp_path / "b", compute=kind, **plan)
    found = gradients(loop)
    assert abs(float(found["loss"] - exact["loss"])) < near
    # In the tower, plain pictures leave differences of nothing for its norms to enlarge.
    layers = [name for name in exact if name.startswith("model.layers.")]
    assert len(layers) > 10
    for name in layers:
        error = (found[name] - exact[name]).norm() / (exact[name].norm() + 1e-8)
        assert found[name].dtype is torch.float32 and error < 20 * near, name


def test_a_gradient_that_fp16_cannot_hold_is_left_out_and_the_scale_falls(
    place: Path, tmp_path: Path
) -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    compute = Compute(torch.device("cpu"), "fp16")
    optimizer = torch.optim.AdamW([parameter])
    before = compute.scaler.get_scale()
    compute.backward((parameter * 1e38).sum())
    assert compute.update([optimizer], [parameter], 1.0) is None
    assert parameter.tolist() == [1, 1] and compute.scaler.get_scale() < before
    parameter.grad = None
    compute.backward(parameter.sum())
    assert compute.update([optimizer], [parameter], 1.0) == pytest.approx(2**0.5)
    with pytest.raises(ConfigError, match="'fp8' is not one of"):
        Compute(torch.device("cpu"), "fp8")


def test_only_what_is_named_trains_at_its_own_rate(place: Path, tmp_path: Path) -> None:
    parts = {"adapter": {"lr": 0.5, "weight_decay": 0.25}, "tower": {"lr": 0}}
    loop = loop_of(place, tmp_path / "a", parts=parts, lora={**LORA, "lr": 2.0})
    before = {n: p.clone() for n, p in loop.objective.trained.named_parameters()}
    loop.one_step(next(loop.objective.batches(0)))
    after = dict(loop.objective.trained.named_parameters())
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert {adapter.part_of(n) for n in changed if not adapter.is_lora(n)} == {"adapter"}
    assert any(adapter.is_lora(n) and adapter.part_of(n) == "language" for n in changed)
    rates = {
        (g["scale"], g["weight_decay"]): g["lr"] for o in loop.optimizers for g in o.param_groups
    }
    assert rates == {(0.5, 0.25): 1.25e-3, (0.5, 0.0): 1.25e-3, (2.0, 0.0): 5e-3}


# --- records ---


def test_what_is_too_long_is_left_out_or_cut_by_rule(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    processor = load(place / "model", "float32", "cpu").processor
    talk = [user("One?"), assistant("red and blue"), user("Two?"), assistant("lime")]
    whole, _ = encode(processor, talk, Limit())
    first, _ = encode(processor, talk[:2], Limit())
    turn, cut = encode(processor, talk, Limit(len(whole.input_ids) - 1, cut=True))
    assert cut and turn.input_ids.tolist() == first.input_ids.tolist()
    short, cut = encode(processor, talk, Limit(len(first.input_ids) - 2, cut=True))
    assert cut and short.input_ids.tolist() == first.input_ids.tolist()[:-2]
    with pytest.raises(InputError, match=r"\d+ tokens, max_tokens is 20$"):
        encode(processor, talk, Limit(20))
    with pytest.raises(InputError, match="no answer begins before that"):
        encode(processor, talk, Limit(4, cut=True))
    objective = objective_of(
        loop_of(place, tmp_path / "a", lora=LORA, max_tokens=46, batch_size=16)
    )
    rows = objective.steps[0]
    assert 0 < len(rows.rows) < 16 and len(rows.rows) + len(rows.left_out) == 16
    next(objective.batches(0))
    next(objective.batches(0))
    told = capsys.readouterr().err.splitlines()
    assert len(told) == len(set(told)) >= len(set(rows.left_out))
    assert "labels.jsonl:" in told[0] and "max_tokens is 46" in told[0]


def test_a_step_without_a_usable_record_changes_nothing(place: Path, tmp_path: Path) -> None:
    loop = loop_of(place, tmp_path / "a", lora=LORA, max_tokens=5)
    batch = next(loop.objective.batches(0))
    assert isinstance(batch, Pieces) and not batch.pieces
    assert loop.one_step(batch) == {"loss": 0.0, "grad_norm": 0.0} and loop.step == 1


def test_steps_are_the_same_with_any_number_of_workers(place: Path, tmp_path: Path) -> None:
    objective = objective_of(loop_of(place, tmp_path / "a", lora=LORA, accumulate=2))
    alone = [rows for _, rows in zip(range(3), objective.steps.stream(8, 0), strict=False)]
    helped = [rows for _, rows in zip(range(3), objective.steps.stream(8, 1), strict=False)]
    for a, b in zip(alone, helped, strict=True):
        assert [r.input_ids.tolist() for r in a.rows] == [r.input_ids.tolist() for r in b.rows]
        assert all(
            (x == y).all()
            for r, s in zip(a.rows, b.rows, strict=True)
            for x, y in zip(r.pixel_values, s.pixel_values, strict=True)
        )


# --- out ---


def logits(model: CogVLMForCausalLM) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**row(model, 4, image(3), 6)).logits
    return out


@pytest.fixture(scope="module")
def finished(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """A run that trained LoRAs and a whole part, and the logits of its model at the end."""
    out = tmp_path_factory.mktemp("run") / "out"
    lora = {**LORA, "alpha": 8, "dropout": 0.1}
    loop = loop_of(place, out, lora=lora, parts={"adapter": {}}, schedule={"ema": 0.5, "lr": 2e-2})
    loop.run()
    with loop.averaged():
        loop.objective.trained.eval()
        return out, logits(loop.objective.trained)


def test_a_run_leaves_an_adapter_a_log_and_a_picture(finished: tuple[Path, Tensor]) -> None:
    out, _ = finished
    assert list(toys.losses(out)) == [1, 2, 3, 4, 5, 6]
    assert list(toys.losses(out, "eval_loss")) == [3, 6]
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    final = lines[-1]
    assert {"eval_exact", "eval_cer"} <= final.keys() and len(final["eval_samples"]) == 2
    svg = (out / "loss.svg").read_text()
    assert svg.count("<polyline") == 2 and "held out" in svg
    assert {p.name for p in out.iterdir()} >= {
        "adapter_config.json", "adapter_model.safetensors", "parts.safetensors", "checkpoint.pt"
    }  # fmt: skip


def test_loaded_merged_and_trained_say_the_same(
    finished: tuple[Path, Tensor], place: Path, tmp_path: Path
) -> None:
    from cogvlm.train.merge import merge

    out, trained = finished
    base = logits(load_model(place / "model", "float32", "cpu"))
    beside = logits(load(place / "model", "float32", "cpu", adapter=out).model)
    assert float((beside - base).abs().max()) > 0.1
    torch.testing.assert_close(beside, trained, rtol=1e-5, atol=1e-5)
    merged = merge(place / "model", out, tmp_path / "merged")
    torch.testing.assert_close(
        logits(load_model(merged, "float32", "cpu")), trained, rtol=1e-4, atol=1e-4
    )
    assert {p.name for p in merged.iterdir()} == {p.name for p in (place / "model").iterdir()}
    words = load(merged, "float32", "cpu").processor.tokenizer
    assert words.eos_id == words.token_id("<|im_end|>")


@pytest.mark.filterwarnings("ignore")  # of peft, about transformers
def test_peft_itself_takes_the_folder_up(finished: tuple[Path, Tensor], place: Path) -> None:
    import peft
    from safetensors.torch import load_file

    out, trained = finished
    model = load_model(place / "model", "float32", "cpu")
    model.load_state_dict(load_file(out / "parts.safetensors"), strict=False)
    wrapped: Any = peft.PeftModel.from_pretrained(model, out)
    torch.testing.assert_close(logits(wrapped.base_model.model), trained, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # of torchao
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_quantised_base_trains_and_takes_the_adapter(
    place: Path, tmp_path: Path, precision: str
) -> None:
    pytest.importorskip("torchao")
    path = toys.write_recipe(
        tmp_path / "q.yaml",
        place / "model",
        place / "data" / "labels.jsonl",
        precision=precision,
        lora={"targets": ["experts", "adapter", "tower"], "rank": 4},
        schedule={"steps": 8, "lr": 2e-2},
    )
    out = run(path, [], tmp_path / "out", True)
    found = toys.losses(out)
    assert found[8] < 0.8 * found[1]
    base = logits(load_model(place / "model", precision, "cpu"))
    beside = logits(load(place / "model", precision, "cpu", adapter=out).model)
    assert float((beside - base).abs().max()) > 0.1
    small = quantise_folder(place / "model", tmp_path / "small", "int8")
    from cogvlm.train.merge import merge

    with pytest.raises(InputError, match="stored in int8; merge into the folder with the full"):
        merge(small, out, tmp_path / "merged")
    with pytest.raises(ConfigError, match="'experts' is quantised"):
        objective(recipes.load(path, ["parts.experts.lr=1"]))


@pytest.mark.filterwarnings("ignore")
def test_gradients_through_quantised_layers_are_those_of_their_weights() -> None:
    pytest.importorskip("torchao")
    from cogvlm import quantize
    from cogvlm.train.quantised import _times_weight, let_gradients_through

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(128, 64), torch.nn.Linear(64, 128))
    quantize.quantise(model, "int4")
    assert let_gradients_through(model) == 2
    x = torch.randn(5, 128, requires_grad=True)
    direction = torch.randn(5, 128)
    (model(x) * direction).sum().backward()
    weights = [layer.restored(0, layer.out_features).t() for layer in model]  # type: ignore[operator]
    assert x.grad is not None
    wanted = direction @ weights[1] @ weights[0]
    torch.testing.assert_close(x.grad, wanted, rtol=1e-4, atol=1e-4)
    layer: Any = model[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(layer), "restorable", lambda self: False)
        near = _times_weight(direction[:, :64], layer)
    torch.testing.assert_close(near, direction[:, :64] @ weights[0], rtol=0.02, atol=0.1)


# --- refused ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "nothing trains; name parts, a lora, or both"),
        ({"parts": {"expert": {}}}, "unknown key 'expert'.*did you mean 'experts'"),
        ({"parts": {"experts": {"rate": 1}}}, "unknown key 'rate'"),
        ({"parts": {"cross": {}}}, "this model has no 'cross'"),
        ({"parts": {"experts": {"lr": 0}}}, "nothing trains: give a part or a LoRA"),
        ({"lora": {"targets": "tower"}}, "targets is 'tower'; give a list"),
        ({"lora": {"targets": ["tover"]}}, "'tover' is nothing in this model"),
        ({"lora": {"targets": ["("]}}, r"target '\(' is no regular expression"),
        ({"lora": {"targets": ["model.norm"]}}, "'model.norm' is model.norm, no linear layer"),
        ({"lora": {"targets": ["tower"], "rank": 0}}, "rank is 0"),
        ({"lora": {"targets": ["tower"], "dropout": 1}}, "dropout is 1"),
        ({"lora": LORA, "data": []}, "data is \\[\\]; give a list"),
        ({"lora": LORA, "data": "x"}, "data is 'x'; give a list"),
        ({"lora": LORA, "batch_size": 0}, "batch_size is 0"),
        ({"lora": LORA, "max_tokens": 1}, "max_tokens is 1"),
        ({"lora": LORA, "too_long": "hope"}, "give drop or cut"),
        ({"lora": LORA, "precision": "float16"}, "float16 cannot train"),
        ({"lora": LORA, "precision": "bfloat16", "compute": "fp32"}, "needs float32 weights"),
        ({"lora": LORA, "compute": "fp8"}, "compute is 'fp8'"),
        ({"lora": LORA, "track": ["paper"]}, "'paper' is not one of tensorboard, wandb"),
        ({"lora": LORA, "schedule": {"keep": 0}}, "keep is 0"),
        ({"lora": LORA, "schedule": {"ema": 1}}, "ema is 1"),
        ({"lora": LORA, "questions": ["?"]}, "unknown key 'questions'"),
    ],
)
def test_impossible_recipes_are_refused(
    place: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        loop_of(place, tmp_path / "a", **changes)


def test_the_best_needs_something_to_measure(place: Path, tmp_path: Path) -> None:
    loop = loop_of(place, tmp_path / "a", lora=LORA, held_out=0, schedule={"keep_best": True})
    with pytest.raises(ConfigError, match="keep_best needs held-out data"):
        loop.evaluate()


def test_low_rank_experts_are_trained_whole(tmp_path: Path) -> None:
    toys.write_model(tmp_path / "model", expert_rank=4)
    toys.write_data(tmp_path / "data", 8)
    with pytest.raises(ConfigError, match="is a low-rank correction itself; train it whole"):
        loop_of(tmp_path, tmp_path / "a", lora={"targets": ["experts.qkv"]})
    loop = loop_of(tmp_path, tmp_path / "b", parts={"experts": {}}, lora={"targets": ["tower"]})
    loop.one_step(next(loop.objective.batches(0)))
    loop.objective.export(tmp_path / "b")
    stored = adapter.read(tmp_path / "b")
    assert {adapter.part_of(n) for n in stored.parts} == {"experts"}
    assert all(adapter.part_of(n) == "tower" for n in stored.pairs)
