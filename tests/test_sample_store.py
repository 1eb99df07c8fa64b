"""The table of numbers for each sample: what is read is what was written, in memory, on disk, within bounds."""

from __future__ import annotations

import json

import pytest
import torch

from graphlocal.errors import InputError
from graphlocal.sample_store import IN_MEMORY, SampleStore

FIELDS = {"x a": 3, "lambda a": 2}


def numbers(count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(count, size, generator=generator) for name, size in FIELDS.items()}


def filled(**options) -> SampleStore:
    store = SampleStore(FIELDS, torch.float32, **options)
    store.write(torch.tensor([5, 0, 2]), numbers(3))
    return store


@pytest.mark.parametrize("samples", [None, 6, 100])
@pytest.mark.parametrize("on_disk", [False, True])
def test_what_is_read_is_what_was_written(tmp_path, on_disk, samples):
    path = tmp_path / "rows" if on_disk else None
    store = filled(path=path, samples=samples)
    visited, rows = store.read(torch.tensor([2, 1, 5]))
    assert visited.tolist() == [True, False, True]
    for name, value in numbers(3).items():
        torch.testing.assert_close(rows[name], torch.stack([value[2], torch.zeros_like(value[0]), value[0]]))
    assert store.bytes_per_sample == 24
    assert len(store) == (samples or 6)
    if path:
        del store
        again = SampleStore(FIELDS, torch.float32, path=path, samples=samples)
        assert torch.equal(again.read(torch.tensor([2, 1, 5]))[1]["x a"], rows["x a"])
        assert path.stat().st_size == 24 * (samples or 6)


def test_an_open_store_grows_by_doubling_and_keeps_its_rows():
    store = filled()
    store.write(torch.tensor([6]), numbers(1, seed=1))
    assert len(store) == 12
    assert torch.equal(store.read(torch.tensor([5]))[1]["x a"], numbers(3)["x a"][:1])
    assert store.needed(1000) == 24_000


def test_without_a_bound_memory_is_bounded_all_the_same():
    with pytest.raises(InputError, match=r"max_bytes is 4.0 GiB"):
        SampleStore(FIELDS, torch.float32, samples=IN_MEMORY)


def test_a_disk_that_is_too_small_is_named(tmp_path):
    with pytest.raises(InputError, match=r"the disk of .*rows has"):
        SampleStore(FIELDS, torch.float32, samples=10**15, path=tmp_path / "rows")


@pytest.mark.parametrize(
    ("fields", "dtype", "samples", "words"),
    [
        (FIELDS, torch.float32, 7, "its samples is 6, and now 7"),
        (FIELDS, torch.float64, 6, "its dtype is 'float32', and now 'float64'"),
        ({"x b": 5}, torch.float32, 6, "its fields is"),
    ],
)
def test_a_file_of_another_model_or_data_set_is_refused(tmp_path, fields, dtype, samples, words):
    filled(path=tmp_path / "rows", samples=6)
    with pytest.raises(InputError, match=f"another model or data set\\n.*{words}"):
        SampleStore(fields, dtype, path=tmp_path / "rows", samples=samples)


@pytest.mark.parametrize("damage", ["header", "cut", "no header", "other json", "not a header"])
def test_damaged_files_are_refused(tmp_path, damage):
    path = tmp_path / "rows"
    filled(path=path, samples=6)
    header = tmp_path / "rows.json"
    if damage == "header":
        header.write_text("{")
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "no header":
        header.unlink()
    else:
        header.write_text(json.dumps([1] if damage == "other json" else {"format": "x"}))
    with pytest.raises(InputError, match="sample store"):
        SampleStore(FIELDS, torch.float32, path=path, samples=6)


def test_a_file_in_no_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="no folder"):
        SampleStore(FIELDS, torch.float32, path=tmp_path / "none" / "rows")


@pytest.mark.parametrize("index", [torch.tensor([-1]), torch.tensor([6]), torch.tensor([1, 1]), torch.tensor([0.5]),
                                   torch.tensor([], dtype=torch.int64), torch.tensor([[1]]), [1]])  # fmt: skip
def test_bad_indices_are_refused(index):
    store = filled(samples=6)
    with pytest.raises(InputError, match="index"):
        store.read(index)
