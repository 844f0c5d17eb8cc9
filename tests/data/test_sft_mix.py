"""The order of a mix: by weight, the same everywhere, and gone on with exactly."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import pytest

from cogvlm.data.sft import Entry, Mix, Record, RecordError, is_held_out, open_source
from cogvlm.data.sft.mix import BLOCK, permuted
from cogvlm.errors import ConfigError, InputError
from data.sets import sft, write


def numbered(path: Path, name: str, count: int) -> str:
    """A file of records ``name-0``, ``name-1``, ... of text alone."""
    rows = [{"id": f"{name}-{i}", "question": f"{i}?", "answer": f"{name}"} for i in range(count)]
    return str(write(path / f"{name}.jsonl", rows))


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Three sources, 7 : 2 : 1, of 900, 50 and 333 records."""
    folder = tmp_path_factory.mktemp("three")
    counts, weights = {"a": 900, "b": 50, "c": 333}, (7, 2, 1)
    paths = [numbered(folder, name, count) for name, count in counts.items()]
    return [{"path": p, "weight": w} for p, w in zip(paths, weights, strict=True)]


def ids(mix: Mix, start: int, stop: int, **shard: int) -> list[str]:
    """Ids in the order of the mix."""
    return [record.id for _, record in mix.stream(start, stop, **shard)]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 97, 1000])
def test_a_permutation_is_one_and_depends_on_its_key(count: int) -> None:
    rows = {key: [permuted(i, count, key) for i in range(count)] for key in (1, 2)}
    assert all(sorted(row) == list(range(count)) for row in rows.values())
    if count > 50:
        assert rows[1] != rows[2] != list(range(count))


def test_a_permutation_shuffles_evenly() -> None:
    """Where the first of ten goes: each place 600 times of 6000, give or take 5 deviations."""
    places = Counter(permuted(0, 10, key) for key in range(6000))
    deviation = (6000 * 0.1 * 0.9) ** 0.5
    assert all(abs(places[place] - 600) < 5 * deviation for place in range(10))
    # Neighbours do not stay together.
    row = [permuted(i, 1000, 5) for i in range(1000)]
    assert sum(abs(x - y) == 1 for x, y in pairwise(row)) < 15


def test_weights_hold_in_ten_thousand_records(three: list[dict[str, Any]]) -> None:
    mix = Mix.open(three, seed=1)
    lanes = [mix.place(i)[0] for i in range(BLOCK)]
    assert Counter(lanes) == {0: 7000, 1: 2000, 2: 1000}  # exactly
    # and in every stretch as a draw would: five deviations of a binomial of 500
    for start in range(0, BLOCK, 500):
        found = Counter(lanes[start : start + 500])
        for lane, share in enumerate((0.7, 0.2, 0.1)):
            assert abs(found[lane] - 500 * share) < 5 * (500 * share * (1 - share)) ** 0.5
    # Across the end of a block too.
    order = [mix.place(i) for i in range(BLOCK - 300, BLOCK + 300)]
    assert abs(Counter(lane for lane, _ in order)[0] - 420) < 60


def test_every_record_comes_once_in_an_epoch_without_weights(three: list[dict[str, Any]]) -> None:
    mix = Mix.open([entry["path"] for entry in three], seed=1)
    first, second = ids(mix, 0, 1283), ids(mix, 1283, 2566)
    assert len(mix) == 1283 == len(set(first))
    assert set(first) == set(second) and first != second
    assert [record.id for record in mix] == first
    assert Counter(name[0] for name in first) == {"a": 900, "b": 50, "c": 333}


def test_a_small_source_is_gone_through_whole_before_it_begins_again(
    three: list[dict[str, Any]],
) -> None:
    mix = Mix.open(three, seed=3)
    taken = [mix.place(i) for i in range(2 * BLOCK)]
    small = [number for lane, number in taken if lane == 1]
    assert len(small) == 4000  # exactly 80 epochs of 50 records, each whole and in its own order
    epochs = [small[start : start + 50] for start in range(0, 4000, 50)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 80


def test_the_order_is_of_the_seed_alone(three: list[dict[str, Any]]) -> None:
    one, same, other = (Mix.open(three, seed=seed) for seed in (5, 5, 6))
    assert ids(one, 0, 300) == ids(same, 0, 300) != ids(other, 0, 300)
    sent: Mix = pickle.loads(pickle.dumps(one))
    assert sent[9_999_999_999].id == one[9_999_999_999].id
    # Frozen: another order would silently change what resumed runs see.
    assert ids(one, 0, 6) == FROZEN


FROZEN = ["a-523", "a-264", "a-73", "c-313", "a-644", "a-89"]


@pytest.mark.parametrize("shards", [1, 2, 3, 8])
def test_any_number_of_workers_gives_the_same_order(
    three: list[dict[str, Any]], shards: int
) -> None:
    mix = Mix.open(three, seed=2)
    whole = list(mix.stream(0, 400))
    parts = [mix.stream(0, 400, shard=shard, shards=shards) for shard in range(shards)]
    merged = sorted(chain.from_iterable(parts), key=lambda pair: pair[0])
    assert [(i, r.id) for i, r in merged] == [(i, r.id) for i, r in whole]
    for i, _ in islice(mix.stream(5, shard=shards - 1, shards=shards), 3):
        assert i >= 5 and i % shards == shards - 1


@pytest.mark.parametrize("weighted", [True, False])
def test_stopped_in_the_middle_it_goes_on_with_other_workers(
    three: list[dict[str, Any]], weighted: bool
) -> None:
    entries = three if weighted else [entry["path"] for entry in three]
    unbroken = ids(Mix.open(entries, seed=4), 0, 700)
    first = Mix.open(entries, seed=4)
    before = sorted(chain(*(first.stream(0, 411, shard=s, shards=3) for s in range(3))), key=number)
    state = json.loads(json.dumps(first.state(411)))
    again = Mix.open(entries, seed=4)
    at = again.resume(state)
    after = sorted(chain(*(again.stream(at, 700, shard=s, shards=8) for s in range(8))), key=number)
    assert [record.id for _, record in (*before, *after)] == unbroken
    assert state["next"] == 411 == sum(state["taken"])
    if weighted:
        lanes = Counter("abc".index(record.id[0]) for _, record in before)
        assert state["taken"] == [lanes[0], lanes[1], lanes[2]]


def number(pair: tuple[int, Record]) -> int:
    """The place of a record in the mix."""
    return pair[0]


def test_counts_of_a_state_go_on_over_blocks(three: list[dict[str, Any]]) -> None:
    mix = Mix.open(three, seed=4)
    taken = Counter(mix.place(i)[0] for i in range(2 * BLOCK + 123))
    assert mix.state(2 * BLOCK + 123)["taken"] == [taken[0], taken[1], taken[2]]


def test_a_state_of_another_order_is_refused(three: list[dict[str, Any]], tmp_path: Path) -> None:
    state = Mix.open(three, seed=4, held_out=0.1).state(5)
    fewer = [{**three[0], "path": numbered(tmp_path, "a", 899)}, *three[1:]]
    heavier = [{**three[0], "weight": 8}, *three[1:]]
    for mix, what in (
        (Mix.open(three, seed=5, held_out=0.1), "seed was 4, is 5"),
        (Mix.open(three, seed=4), "held_out was 0.1"),
        (Mix.open(three, seed=4, held_out=0.1, part="held_out"), "part was 'train'"),
        (Mix.open(heavier, seed=4, held_out=0.1), r"weights was \[7.0"),
        (Mix.open(fewer, seed=4, held_out=0.1), "records was"),
        (Mix.open(three[:2], seed=4, held_out=0.1), "weights was"),
    ):
        with pytest.raises(ConfigError, match=what):
            mix.resume(state)
    mix = Mix.open(three, seed=4, held_out=0.1)
    assert mix.resume(state) == 5
    for value in (None, -1, "5", True):
        with pytest.raises(ConfigError, match="it is damaged"):
            mix.resume({**state, "next": value})


def test_what_is_held_out_is_stable_and_never_trains(
    three: list[dict[str, Any]], tmp_path: Path
) -> None:
    train = Mix.open(three, seed=1, held_out=0.1)
    held = Mix.open(three, seed=9, held_out=0.1, part="held_out")
    learnt = {r.id for r in Mix.open([e["path"] for e in three], held_out=0.1)}
    kept = {record.id for record in held.lanes[0] if is_held_out(record.id, 0.1)}
    assert not learnt & kept and len(train) + len(held) == 1283
    assert len(learnt) == len(train)
    assert 0.07 < len(held) / 1283 < 0.13
    assert {r.id for _, r in held.stream(0, 400) if r.id[0] == "a"} == kept
    # A record keeps its side whatever stands around it, and as the share grows.
    assert {i for i in kept if is_held_out(i, 0.2)} == kept
    few = Mix.open([numbered(tmp_path, "a", 300)], held_out=0.1, part="held_out")
    assert {r.id for r in few} == {i for i in kept if int(i[2:]) < 300}


def test_a_picture_is_held_out_in_both_languages(tmp_path: Path) -> None:
    root = sft(tmp_path / "set", 30)
    parts = {
        lang: {
            record.id.split("/")[-1]
            for record in Mix.open([f"{root}/single/labels_{lang}"], held_out=0.3, part="held_out")
        }
        for lang in ("en", "zh")
    }
    assert parts["en"] == parts["zh"] and 2 < len(parts["en"]) < 20


def test_bad_records_raise_or_are_told_and_left_out(tmp_path: Path) -> None:
    path = Path(numbered(tmp_path, "a", 9))
    with path.open("a") as file:
        file.write('{"id": "broken\n')
    mix = Mix.open([path], seed=0, held_out=0.0)
    with pytest.raises(RecordError, match=r"a\.jsonl:10: not JSON"):
        list(mix.stream(0, 10))
    told: list[RecordError] = []
    assert len(list(mix.stream(0, 10, bad=told.append))) == 9
    assert [error.where for error in told] == [f"{path}:10"]
    cut = tmp_path / "cut.json"
    cut.write_text('[{"question": "a?", "answer": "b"}, {"question": ')
    with pytest.raises(InputError, match=r"cut\.json:1: the record is not closed.*data check"):
        Mix.open([cut])
    assert len(Mix.open([cut], damaged=True)) == 1


@pytest.mark.parametrize(
    ("entries", "options", "message"),
    [
        ([], {}, "a mix of no sources"),
        ([3], {}, "3 is no path"),
        ([{"weight": 1}], {}, "'path' is None"),
        ([{"path": "a.jsonl", "wieght": 1}], {}, "did you mean 'weight'"),
        ([{"path": "a.jsonl", "weight": 1}, "b.jsonl"], {}, "give all or no"),
        ([{"path": "a.jsonl", "weight": w} for w in (1, -1)], {}, "above 0"),
        ([{"path": "a.jsonl", "weight": float("nan")}], {}, "above 0"),
        ([{"path": "a.jsonl", "weight": "2"}], {}, "'weight' is '2'"),
        ([{"path": "a.jsonl", "weight": True}], {}, "'weight' is True"),
        ([{"path": "a.jsonl", "weight": w} for w in (1, 1e-6)], {}, "below one in"),
        ([{"path": "a.jsonl", "question": 3}], {}, "'question' is 3"),
        ([{"path": "a.jsonl", "allow_outside": 1}], {}, "'allow_outside' is 1"),
        ([{"path": "a.jsonl", "format": "x"}], {}, "format 'x' is not known"),
        (["a.jsonl"], {"held_out": 1.0}, "below 1"),
        (["a.jsonl"], {"part": "held_out"}, "held_out is 0"),
        (["a.jsonl"], {"part": "test", "held_out": 0.1}, "part 'test'"),
        (["a.jsonl"], {"held_out": 1e-9, "part": "held_out"}, "no records for held_out"),
        (["empty.json"], {}, "no records for train"),
    ],
)
def test_impossible_mixes(
    tmp_path: Path, entries: list[Any], options: dict[str, Any], message: str
) -> None:
    numbered(tmp_path, "a", 5)
    numbered(tmp_path, "b", 5)
    write(tmp_path / "empty.json", [])
    with pytest.raises(ConfigError, match=message):
        Mix.open(entries, base=tmp_path, **options)


def test_places_that_are_none(three: list[dict[str, Any]]) -> None:
    mix = Mix.open(three)
    with pytest.raises(IndexError):
        mix[-1]
    for shard, shards in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ConfigError, match=f"shard {shard} of {shards}"):
            next(mix.stream(0, shard=shard, shards=shards))
    with pytest.raises(IndexError):
        open_source(three[0]["path"])[900]


def test_paths_of_an_entry_begin_at_the_folder_of_the_recipe(tmp_path: Path) -> None:
    numbered(tmp_path, "a", 3)
    entry = Entry.of({"path": "a.jsonl"})
    assert len(entry.open(tmp_path)) == 3 and Entry.of(entry) is entry
    assert len(Mix.open([entry, Path("a.jsonl")], base=tmp_path)) == 6
