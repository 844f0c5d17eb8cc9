"""Folders that others quantised: numbers by hand and against bitsandbytes, folders, refusals."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from cogvlm import load, quantize
from cogvlm.cli import app
from cogvlm.errors import CheckpointError, InputError, ResourceError
from cogvlm.models.cogvlm import CogVLMForCausalLM
from cogvlm.packed import formats, kernels, layers, stored
from cogvlm.packed.layers import BlockLinear, GroupLinear, Nested, PackedLinear
from fakes import image, row, toy_model
from test_family import llama3_tokenizer

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
SIZES: dict[str, Any] = {"num_hidden_layers": 2}
# The 16 values of NF4, as its paper lists them (QLoRA, appendix E), to seven digits.
NF4 = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0]
NF4 += [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]
Parts = dict[str, Tensor]


def plain(rows: int, columns: int, bias: bool = False) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(columns, rows, bias=bias).requires_grad_(False)


# --- how the test stores weights: one after another, in the words of the formats ---


def as_blocks(weight: Tensor, kind: str = "nf4", block: int = 64, dtype: str = "float16") -> Parts:
    """What bitsandbytes writes for a matrix, without double quantisation."""
    flat = weight.float().flatten()
    cut = nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block)
    absmax = cut.abs().amax(dim=1)
    table = torch.tensor(NF4 if kind == "nf4" else FP4)
    steps = (cut / absmax[:, None]).flatten()[: len(flat)]
    codes = (steps[:, None] - table).abs().argmin(dim=1).tolist()
    codes += [0] * (len(codes) % 2)
    packed = [codes[i] * 16 + codes[i + 1] for i in range(0, len(codes), 2)]
    state = {"quant_type": kind, "blocksize": block, "dtype": dtype, "shape": [*weight.shape]}
    blob = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {
        "weight": torch.tensor(packed, dtype=torch.uint8)[:, None],
        "weight.absmax": absmax,
        "weight.quant_map": table,
        f"weight.quant_state.bitsandbytes__{kind}": blob,
    }


FP4 = [v / 12 for v in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)]
FP4 += [-v for v in FP4]


def blocks_mean(parts: Parts, shape: tuple[int, int]) -> Tensor:
    """The weights that such tensors stand for, one after another."""
    state = json.loads(bytes(next(v for n, v in parts.items() if "quant_state" in n).tolist()))
    table, absmax = parts["weight.quant_map"].tolist(), parts["weight.absmax"].tolist()
    packed, block = parts["weight"].flatten().tolist(), state["blocksize"]
    found = []
    for i in range(shape[0] * shape[1]):
        code = packed[i // 2] & 15 if i % 2 else packed[i // 2] >> 4
        found.append(table[code] * absmax[i // block])
    return torch.tensor(found).view(shape)


def pack_words(numbers: list[int], bits: int) -> list[int]:
    """Numbers into words of 32 bits, the first in the lowest; as signed."""
    each, words = 32 // bits, []
    for i in range(0, len(numbers), each):
        word = sum(n << (bits * j) for j, n in enumerate(numbers[i : i + each]))
        words.append(word - 2**32 if word >= 2**31 else word)
    return words


def as_groups(
    codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, index: Tensor | None, shift: int
) -> Parts:
    """What GPTQ writes for ``int[N, K]``, ``float[N, G]``, ``int[N, G]``."""
    columns = [pack_words(line, bits) for line in codes.tolist()]
    mask = 2**bits - 1
    held = [pack_words([(z - shift) & mask for z in line], bits) for line in zeros.t().tolist()]
    parts = {
        "qweight": torch.tensor(columns, dtype=torch.int32).t().contiguous(),
        "qzeros": torch.tensor(held, dtype=torch.int32),
        "scales": scales.t().contiguous(),
    }
    return parts if index is None else {**parts, "g_idx": index.int()}


# --- numbers ---


def test_two_weights_a_byte_the_first_in_the_high_bits() -> None:
    table = torch.arange(16).float()
    codes = torch.tensor([0x12, 0x3F, 0x0A, 0xB0], dtype=torch.uint8)
    layer = BlockLinear(plain(2, 4), codes, torch.tensor([10.0, 0.5]), table, block=4)
    wanted = torch.tensor([[10.0, 20.0, 30.0, 150.0], [0.0, 5.0, 5.5, 0.0]])
    assert torch.equal(layer.weight, wanted)
    assert torch.equal(layer(torch.eye(4)), wanted.t())


def test_scales_that_are_codes_themselves() -> None:
    table = torch.arange(16).float()
    codes = torch.tensor([0x11] * 6, dtype=torch.uint8)
    scales = torch.tensor([0, 1, 2], dtype=torch.uint8)
    levels = torch.zeros(256)
    levels[:3] = torch.tensor([0.0, 1.0, -1.0])
    nested = Nested(levels, torch.tensor([3.0, 5.0]), 2, 100.0)
    layer = BlockLinear(plain(3, 4), codes, scales, table, 4, nested)
    wanted = torch.tensor([[100.0], [103.0], [95.0]]).expand(3, 4)
    assert torch.equal(layer.weight, wanted)


@pytest.mark.parametrize(("shape", "block"), [((6, 6), 4), ((3, 5), 4), ((4, 96), 64)])
def test_blocks_may_run_across_rows_and_end_early(
    shape: tuple[int, int], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    parts = as_blocks(weight, block=block)
    wanted = blocks_mean(parts, shape)
    layer = made(formats._make_blocks, parts, plain(*shape, bias=True))
    torch.testing.assert_close(layer.weight, wanted, rtol=1e-6, atol=0)
    x = torch.randn(2, 3, shape[1], generator=torch.Generator().manual_seed(1))
    at_once = layer(x)
    assert torch.equal(at_once, x @ layer.weight.t() + layer.bias)
    exact = layer(x.double())  # in whatever order a processor adds up
    monkeypatch.setattr(layers, "_SLAB", 1)  # as few rows at a time as blocks allow
    torch.testing.assert_close(layer(x.double()), exact, rtol=1e-6, atol=1e-6)
    assert layer(x.bfloat16().float()).dtype == torch.float32


def made(make: Callable[..., PackedLinear], parts: Parts, layer: nn.Linear, **form: Any) -> Any:
    short = {n.removeprefix("weight.").split(".")[0]: t for n, t in parts.items()}
    pattern: Any = None
    kind = formats.Format("test", pattern, (), make, **form)
    return make(kind, layer, short, "test")


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shift", [1, 0])
@pytest.mark.parametrize("shuffled", [True, False])
def test_gptq_is_code_less_zero_times_scale(
    bits: int, symmetric: bool, shift: int, shuffled: bool
) -> None:
    draw = torch.Generator().manual_seed(0)
    rows, columns, groups = 16, 96, 3
    codes = torch.randint(0, 2**bits, (rows, columns), generator=draw)
    scales = torch.rand(rows, groups, generator=draw).half()
    middle = 2 ** (bits - 1)
    zeros = torch.randint(0, 2**bits, (rows, groups), generator=draw)
    zeros = torch.full_like(zeros, middle) if symmetric else zeros
    index = torch.arange(columns) // 32
    if shuffled:
        index = index[torch.randperm(columns, generator=draw)]
    wanted = torch.empty(rows, columns)
    for n in range(rows):
        for k in range(columns):
            g = int(index[k])
            wanted[n, k] = (int(codes[n, k]) - int(zeros[n, g])) * float(scales[n, g])
    parts = as_groups(codes, scales, zeros, bits, index, shift)
    layer = made(formats._make_groups, parts, plain(16, 96), shift=shift, symmetric=symmetric)
    assert isinstance(layer, GroupLinear)
    assert layer.codes.nbytes == rows * columns * bits // 8
    assert torch.equal(layer.weight, wanted)
    if symmetric and not shift:  # the zeros say themselves that none was taken away
        again = made(formats._make_groups, parts, plain(16, 96), shift=1, symmetric=True)
        assert torch.equal(again.weight, wanted)
    if not shuffled:
        del parts["g_idx"]
        again = made(formats._make_groups, parts, plain(16, 96), shift=shift, symmetric=symmetric)
        assert torch.equal(again.weight, wanted)


def test_eight_bits_of_bitsandbytes_are_steps_of_a_row() -> None:
    weight = torch.tensor([[127, -127, 0, 3], [-128, 1, 2, 3]], dtype=torch.int8)
    parts = {"weight": weight, "SCB": torch.tensor([127.0, 1.27])}
    layer = made(formats._make_rows, parts, plain(2, 4))
    wanted = weight.float() * torch.tensor([[1.0], [0.01]])
    torch.testing.assert_close(layer.weight, wanted, rtol=1e-6, atol=0)


# --- against bitsandbytes itself ---


def bitsandbytes() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("bitsandbytes")


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", [(32, 96), (5, 24), (130, 264)])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_what_bitsandbytes_stored_means_what_it_restores(
    kind: str, nested: bool, shape: tuple[int, int], storage: torch.dtype
) -> None:
    bnb = bitsandbytes()
    layer = bnb.nn.Linear4bit(
        shape[1], shape[0], quant_type=kind, compress_statistics=nested, quant_storage=storage
    )
    layer.weight.data = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    layer = layer.to("cpu")
    parts = {n: t.clone() for n, t in layer.state_dict().items() if n != "bias"}
    assert ("weight.nested_absmax" in parts) is nested
    own = made(formats._make_blocks, parts, plain(*shape))
    wanted = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert wanted.dtype == torch.float32 and wanted.shape == shape
    torch.testing.assert_close(own.weight, wanted, rtol=2e-7, atol=0)
    x = torch.randn(3, shape[1], generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(own(x), x @ wanted.t(), rtol=1e-5, atol=1e-5)
    if storage == torch.uint8:
        short = {n.removeprefix("weight.").split(".")[0]: t for n, t in parts.items()}
        theirs = kernels.from_stored(plain(*shape, bias=True), short)
        bias = theirs.bias
        assert isinstance(bias, Tensor)
        # Its fast product on the CPU is in bfloat16.
        torch.testing.assert_close(theirs(x) - bias, x @ wanted.t(), rtol=2e-2, atol=5e-2)


@needs_bitsandbytes
def test_its_eight_bits_are_read_too() -> None:
    bnb = bitsandbytes()
    layer = bnb.nn.Linear8bitLt(96, 32, has_fp16_weights=False, bias=False)
    weight = layer.weight.data.clone()
    state = layer.to("cpu").state_dict()
    assert state["weight"].dtype == torch.int8
    own = made(formats._make_rows, state, plain(32, 96))
    wanted = bnb.functional.int8_vectorwise_dequant(state["weight"], state["SCB"][:, None])
    torch.testing.assert_close(own.weight, wanted, rtol=1e-6, atol=0)
    assert ((own.weight - weight).abs() <= weight.abs().amax(1, keepdim=True) / 127).all()


# --- folders ---

BNB4 = {
    "_load_in_4bit": True,
    "_load_in_8bit": False,
    "bnb_4bit_compute_dtype": "float32",
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "fp4",
    "bnb_4bit_use_double_quant": False,
    "llm_int8_skip_modules": None,
    "load_in_4bit": True,
    "load_in_8bit": False,
    "quant_method": "bitsandbytes",
}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": True, "desc_act": False}
ROUND = {
    "quant_method": "auto-round",
    "packing_format": "auto_round:auto_gptq",
    "bits": 4,
    "group_size": 16,
    "sym": True,
    "data_type": "int",
}
INT8 = {"load_in_8bit": True, "quant_method": "bitsandbytes"}
NOTES: dict[str, dict[str, Any]] = {
    "fp4": BNB4,
    "nf4": {**BNB4, "bnb_4bit_quant_type": "nf4"},
    "gptq": GPTQ,
    "auto-round": ROUND,
    "bitsandbytes int8": INT8,
}


def store(kind: str, weight: Tensor) -> tuple[Parts, Tensor]:
    """A matrix in one of the forms, and the weights that this means."""
    rows, columns = weight.shape
    if kind in ("fp4", "nf4"):
        parts = as_blocks(weight, kind)
        return parts, blocks_mean(parts, (rows, columns))
    if kind == "bitsandbytes int8":
        scale = weight.abs().amax(1)
        codes = (weight * 127 / scale[:, None]).round().to(torch.int8)
        return {"weight": codes, "SCB": scale}, codes * (scale[:, None] / 127)
    cut = weight.unflatten(1, (-1, 16))
    scales = (cut.abs().amax(-1) / 7).half()
    codes = (cut / scales.float()[..., None]).round().clamp(-8, 7) + 8
    zeros = torch.full(scales.shape, 8)
    parts = as_groups(codes.flatten(1).int(), scales, zeros, 4, None, 1)
    return parts, ((codes - 8) * scales.float()[..., None]).flatten(1)


Write = Callable[[Path, str], CogVLMForCausalLM]


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """Puts a toy in one of the forms in a folder; the model with the weights that are stored."""
    known: dict[str, CogVLMForCausalLM] = {}
    base = tmp_path_factory.mktemp("forms")

    def copy(folder: Path, kind: str) -> CogVLMForCausalLM:
        if kind not in known:
            known[kind] = write_toy(base / kind, kind)
        shutil.copytree(base / kind, folder)
        return deepcopy(known[kind])

    return copy


def write_toy(folder: Path, kind: str) -> CogVLMForCausalLM:
    """A toy CogVLM2 as transformers writes it."""
    folder.mkdir()
    model = toy_model(**SIZES)
    config = {**model.config.to_dict(), "quantization_config": NOTES[kind]}
    (folder / "config.json").write_text(json.dumps(config))
    llama3_tokenizer(folder)
    tensors: Parts = {}
    linear = {f"{n}.weight" for n, m in model.named_modules() if type(m) is nn.Linear}
    state = model.state_dict()
    for name, tensor in state.items():
        if name in linear and name != "lm_head.weight":
            parts, meant = store(kind, tensor)
            stem = name.removesuffix("weight")
            tensors |= {stem + n: t.contiguous() for n, t in parts.items()}
        else:
            meant = tensor.half().float()
            tensors[name] = tensor.half()
        state[name].copy_(meant)
    # Every other tensor in the second file: those of one matrix lie in both.
    names, where = sorted(tensors), {}
    for part, chosen in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{part}-of-00002.safetensors"
        save_file({n: tensors[n] for n in chosen}, folder / file)
        where |= dict.fromkeys(chosen, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return model


def logits(model: CogVLMForCausalLM) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**row(model, 5, image(), 7)).logits
    return out.float()


@pytest.mark.parametrize("kind", NOTES)
def test_a_folder_answers_as_the_weights_it_means(
    kind: str, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # not needed
    exact = write(tmp_path / "model", kind)
    model = load.load_model(tmp_path / "model", device="cpu")
    torch.testing.assert_close(logits(model), logits(exact), rtol=1e-4, atol=1e-4)
    assert load.stored_precision(tmp_path / "model") == kind
    kept = [m for m in model.modules() if isinstance(m, PackedLinear)]
    full = 4 * sum(m.in_features * m.out_features for m in kept)
    held = sum(b.nbytes for m in kept for n, b in m.named_buffers() if n != "pairs")
    assert len(kept) == 32 and held < full * (0.3 if "int8" in kind else 0.18)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    half = load.load_model(tmp_path / "model", "bfloat16", "cpu")
    assert half.lm_head.weight.dtype == torch.bfloat16
    difference = (logits(half) - logits(exact)).norm() / logits(exact).norm()
    assert 0 < difference < 0.05


def test_asked_on_the_command_line(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "torchao", None)
    write(tmp_path / "toy-int4", "fp4")
    picture = tmp_path / "a.png"
    PILImage.new("RGB", (80, 60), (200, 30, 30)).save(picture)
    asked = ["ask", str(picture), "what is it?", "--model", str(tmp_path / "toy-int4")]
    told = CliRunner().invoke(app, [*asked, "--device", "cpu", "--max-new-tokens", "4"])
    assert told.exit_code == 0, told.output
    assert told.stdout.strip()


def test_a_head_may_be_quantised_too(write: Write, tmp_path: Path) -> None:
    exact = write(tmp_path / "model", "nf4")
    index = json.loads((tmp_path / "model/model.safetensors.index.json").read_text())
    file = tmp_path / "model" / index["weight_map"]["lm_head.weight"]
    tensors = load_file(file)
    parts, meant = store("nf4", tensors["lm_head.weight"].float())
    save_file({**tensors, **{f"lm_head.{n}": t for n, t in parts.items()}}, file)
    with torch.no_grad():
        exact.lm_head.weight.copy_(meant)
    index["weight_map"] |= {f"lm_head.{n}": file.name for n in parts}
    model = load.load_model(tmp_path / "model", device="cpu")
    assert isinstance(model.lm_head, BlockLinear)
    torch.testing.assert_close(logits(model), logits(exact), rtol=1e-4, atol=1e-4)
    given = row(model, 5, image(), 7)
    words = [m.generate(**given, max_new_tokens=5, do_sample=False) for m in (model, exact)]
    assert torch.equal(words[0], words[1])


# --- refusals ---

MODULE = "model.layers.1.mlp.language_mlp.up_proj"


def broken(folder: Path, change: Callable[[Parts], object]) -> None:
    """Change a folder's tensors, in one file."""
    tensors: Parts = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= {n: t.clone() for n, t in load_file(path).items()}
        path.unlink()
    (folder / "model.safetensors.index.json").unlink()
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def new_state(**changes: Any) -> Callable[[Parts], object]:
    def change(tensors: Parts) -> None:
        name = f"{MODULE}.weight.quant_state.bitsandbytes__nf4"
        state = {**json.loads(bytes(tensors[name].tolist())), **changes}
        tensors[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


def put(part: str, tensor: Tensor) -> Callable[[Parts], object]:
    return lambda tensors: tensors.update({f"{MODULE}.{part}": tensor})


def drop(part: str) -> Callable[[Parts], object]:
    return lambda tensors: tensors.pop(f"{MODULE}.{part}")


STATE = "weight.quant_state.bitsandbytes__nf4"
ONES = torch.ones
DAMAGE: list[tuple[str, Callable[[Parts], object], str]] = [
    ("nf4", drop("weight.absmax"), f"{MODULE} is stored as nf4 without absmax; fetch"),
    ("nf4", drop("weight.quant_map"), f"{MODULE} is stored as nf4 without quant_map"),
    ("nf4", drop(STATE), f"{MODULE} is stored as nf4 without quant_state"),
    ("nf4", drop("weight"), f"{MODULE} is stored as nf4 without weight"),
    ("nf4", put("weight.nested_absmax", ONES(1)), "without nested_quant_map"),
    ("nf4", put("weight", ONES(7, 1).byte()), r"weight is U8 \(7, 1\) in the file, \(3584, 1\)"),
    ("nf4", put("weight.quant_map", ONES(8)), r"quant_map is F32 \(8,\) in the file, \(16,\)"),
    ("nf4", put("weight.absmax", ONES(5)), "absmax has 5 numbers where .* need 112"),
    ("nf4", put(STATE, ONES(9).byte()), f"{MODULE}: its quant_state is damaged"),
    ("nf4", new_state(shape=[64, 112]), r"quant_state has shape \[64, 112\] and blocksize 64"),
    ("nf4", new_state(blocksize=0), r"and blocksize 0, config.json wants shape \[112, 64\]"),
    ("nf4", put("odd.weight.absmax", ONES(1)), r"1 unexpected tensors: .*odd.weight.absmax"),
    ("gptq", drop("qweight"), f"{MODULE} is stored as gptq without qweight"),
    ("gptq", drop("scales"), f"{MODULE} is stored as gptq without scales"),
    ("gptq", put("qweight", ONES(8, 9).int()), r"qweight is I32 \(8, 9\) in the file, \(8, 112\)"),
    ("gptq", put("qweight", ONES(6, 112).int()), r"qweight is I32 \(6, 112\) in the file"),
    ("gptq", put("qweight", ONES(8, 112)), "qweight is torch.float32 and qzeros torch.int32"),
    ("gptq", put("scales", ONES(3, 112)), "3 groups of 64 columns are not of equal size"),
    ("gptq", put("qzeros", ONES(1, 1).int()), r"qzeros is I32 \(1, 1\) in the file, \(4, 14\)"),
    ("gptq", put("g_idx", torch.zeros(64).int()), "g_idx has groups of unequal size"),
    ("bitsandbytes int8", put("SCB", ONES(3)), r"SCB is F32 \(3,\) in the file, \(112,\)"),
    ("bitsandbytes int8", put("weight_format", torch.tensor(2)), "in weight_format 2; int8 in"),
    ("bitsandbytes int8", put("weight", ONES(112, 64)), "weight is torch.float32 in weight_form"),
]


@pytest.mark.parametrize(("kind", "change", "says"), DAMAGE, ids=range(len(DAMAGE)))
def test_damage_is_told_by_name(
    kind: str, change: Callable[[Parts], object], says: str, write: Write, tmp_path: Path
) -> None:
    write(tmp_path / "model", kind)
    broken(tmp_path / "model", change)
    with pytest.raises(CheckpointError, match=says) as caught:
        load.load_model(tmp_path / "model", device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("note", "says"),
    [
        ({"quant_method": "awq", "bits": 4}, "stored by 'awq', which is not read"),
        ({"quant_method": "hqq"}, "'hqq', which is not read .* --precision int4"),
        ({"quant_method": "exl2"}, "'exl2', which is not read"),
        ({"quant_method": "fp8"}, "'fp8', which is not read"),
        ({"quant_method": "compressed-tensors"}, "'compressed-tensors', which is not read"),
        ({"bits": 4}, "stored by 'unnamed'"),
        ({**BNB4, "bnb_4bit_quant_type": "af4"}, "quant_type is 'af4'; fp4 and nf4 are read"),
        ({**GPTQ, "bits": 3}, "gptq with bits 3; 2, 4 and 8 are read"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "stored by gptq as 'marlin', which is not"),
        ({**ROUND, "packing_format": "auto_round:auto_awq"}, "by auto-round as 'auto_round:aut"),
        ({**ROUND, "data_type": "mx_fp"}, "auto-round with data_type 'mx_fp'"),
        ({**ROUND, "act_bits": 8}, "and act_bits 8; whole numbers for weights alone"),
        ("nf4", "quantization_config is 'nf4', no table"),
    ],
)
def test_other_forms_are_refused_by_name(note: Any, says: str) -> None:
    with pytest.raises(CheckpointError, match=says) as caught:
        stored({"quantization_config": note}, "config.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("note", "name", "shift"),
    [
        (None, None, 0),
        ({"load_in_4bit": False, "load_in_8bit": False, "quant_method": "bitsandbytes"}, None, 0),
        ({"load_in_4bit": True}, "fp4", 0),
        (GPTQ, "gptq", 1),
        ({**GPTQ, "checkpoint_format": "gptq_v2"}, "gptq", 0),
        (ROUND, "auto-round", 1),
        ({**ROUND, "packing_format": "auto_round"}, "auto-round", 0),
        (
            {
                "quant_method": "intel/auto-round",
                "backend": "autoround:gptq:exllamav2",
                "bits": 4,
                "sym": True,
            },
            "auto-round",
            1,
        ),
    ],
)
def test_config_json_alone_says_the_form(note: Any, name: str | None, shift: int) -> None:
    form = stored({"quantization_config": note}, "config.json")
    assert (form.name if form else None, form.shift if form else 0) == (name, shift)


def test_what_does_not_go_together_is_refused(write: Write, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write(folder, "nf4")
    with pytest.raises(InputError, match="is stored in nf4, it cannot be loaded in int4"):
        load.load_model(folder, "int4", "cpu")
    with pytest.raises(InputError, match="precision nf4 and a device_map"):
        load.load_model(folder, device_map={"": "cpu"})
    with pytest.raises(InputError, match="is stored in nf4 already; give the folder with the fu"):
        load.quantise_folder(folder, tmp_path / "out", "int8")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": INT8}))
    with pytest.raises(CheckpointError, match="says bitsandbytes int8, but no tensor is stored so"):
        load.load_model(folder, device="cpu")
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"its config.json does not say how; take the config"):
        load.load_model(folder, device="cpu")
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model-Q4_K.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"GGUF files are for llama.cpp and are not read"):
        load.load_model(tmp_path / "gguf", device="cpu")


# --- NF4 made here ---


@needs_bitsandbytes
def test_nf4_of_full_weights_is_that_of_bitsandbytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bnb = bitsandbytes()
    model = toy_model(**SIZES)
    state = model.state_dict()
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    save_file({n: t.clone() for n, t in state.items()}, tmp_path / "model.safetensors")
    monkeypatch.setattr(kernels, "refuse", lambda device: None)  # its layers run on the CPU too
    made = load.load_model(tmp_path, "nf4", "cpu")
    four = {n: m for n, m in made.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert len(four) == 20 and not any("vision." in n for n in four)
    layer = four[MODULE]
    packed, meant = bnb.functional.quantize_4bit(
        state[f"{MODULE}.weight"].to(made.lm_head.weight.dtype),
        quant_type="nf4",
        compress_statistics=True,
    )
    assert torch.equal(layer.weight.data, packed)
    assert layer.weight.quant_state == meant
    difference = (logits(made) - logits(model)).norm() / logits(model).norm()
    assert 0.01 < difference < 0.5
    quantize.quantise(model, "nf4")
    assert sum(isinstance(m, bnb.nn.Linear4bit) for m in model.modules()) == 20
    # From float32, where loading may have rounded to bfloat16 first.
    assert (logits(made) - logits(model)).norm() / logits(model).norm() < 0.2


def test_nf4_is_for_cuda_and_needs_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ResourceError, match="nf4 is for CUDA, not for cpu; take int4"):
        quantize.refuse("nf4", torch.device("cpu"))
    with pytest.raises(ResourceError, match="not for mps; take int8"):
        quantize.refuse("nf4", torch.device("mps"))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert not kernels.usable(torch.device("cuda"))
    with pytest.raises(ResourceError, match=r"pip install 'cogvlm\[nf4\]'") as caught:
        quantize.refuse("nf4", torch.device("cuda"))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", ["fp4", "nf4", "gptq"])
def test_on_a_card_it_is_the_same_model(kind: str, write: Write, tmp_path: Path) -> None:
    exact = write(tmp_path / "model", kind)
    model = load.load_model(tmp_path / "model", "float32", "cuda")
    given = {
        k: [p.cuda() for p in v] if isinstance(v, list) else v.cuda()
        for k, v in row(exact, 5, image(), 7).items()
    }
    with torch.no_grad():
        found = model(**given).logits.float().cpu()
    assert (found - logits(exact)).norm() / logits(exact).norm() < 0.01
