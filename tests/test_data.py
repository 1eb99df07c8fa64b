"""What `graphlocal.data` loads, and what it says when it can't."""

from __future__ import annotations

import dataclasses
import gzip
from pathlib import Path

import pytest
import torch

from graphlocal.data import Dataset, batches, data_folder, load
from graphlocal.errors import InputError

RAW = {"mnist": "MNIST/raw", "fashion-mnist": "FashionMNIST/raw"}
TRAIN_X, TRAIN_Y = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"
TEST_X, TEST_Y = "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"


def idx(values: torch.Tensor) -> bytes:
    """The IDX coding of a tensor of unsigned bytes."""
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes([0, 0, 8, values.dim()]) + sizes + bytes(values.flatten().tolist())


@pytest.fixture
def images() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {
        TRAIN_X: torch.randint(256, (6, 28, 28), generator=draw),
        TRAIN_Y: torch.tensor([3, 0, 9, 1, 1, 7]),
        TEST_X: torch.randint(256, (4, 28, 28), generator=draw),
        TEST_Y: torch.tensor([2, 8, 0, 5]),
    }


@pytest.fixture
def folder(tmp_path: Path, images: dict[str, torch.Tensor]) -> Path:
    for raw in RAW.values():
        (tmp_path / raw).mkdir(parents=True)
        for name, values in images.items():
            (tmp_path / raw / name).write_bytes(gzip.compress(idx(values)))
    return tmp_path


def equal(one: Dataset, other: Dataset) -> bool:
    fields = ("train_x", "train_y", "test_x", "test_y")
    return all(torch.equal(getattr(one, field), getattr(other, field)) for field in fields)


def test_unpacked_files_are_read_as_the_gzipped_ones_are(folder: Path) -> None:
    zipped = load("mnist", folder)
    for path in list((folder / RAW["mnist"]).iterdir()):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    assert equal(load("mnist", folder), zipped)


def test_digits_are_scaled_images_in_a_stratified_split_that_is_always_the_same() -> None:
    data = load("digits")
    assert data.train_x.shape == (1437, 1, 8, 8)
    assert data.test_x.shape == (360, 1, 8, 8)
    assert (data.train_x.dtype, data.train_y.dtype) == (torch.float32, torch.int64)
    assert (data.train_x.min(), data.train_x.max()) == (0, 1)
    assert data.test_y.bincount().tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    assert data.classes == tuple("0123456789")
    torch.manual_seed(7)
    assert equal(data, load("digits"))


def test_digits_lose_no_sample() -> None:
    from sklearn.datasets import load_digits

    data = load("digits")
    rows = torch.cat([data.train_x, data.test_x]).flatten(1) * 16
    labels = torch.cat([data.train_y, data.test_y])
    ours = sorted([*row, label] for row, label in zip(rows.tolist(), labels.tolist(), strict=True))
    x, y = load_digits(return_X_y=True)
    assert ours == sorted([*row, label] for row, label in zip(x.tolist(), y.tolist(), strict=True))


@pytest.mark.parametrize("name", RAW)
def test_idx_files_become_scaled_images(name: str, folder: Path, images: dict[str, torch.Tensor]) -> None:
    data = load(name, folder)
    assert data.name == name
    assert data.train_x.shape == (6, 1, 28, 28)
    assert data.test_x.dtype == torch.float32
    assert torch.equal(data.train_x[:, 0], images[TRAIN_X].float() / 255)
    assert torch.equal(data.test_x[:, 0], images[TEST_X].float() / 255)
    assert data.train_y.tolist() == [3, 0, 9, 1, 1, 7]
    assert data.test_y.dtype == torch.int64
    assert len(data.classes) == 10


def test_the_first_samples_can_be_had_alone(folder: Path) -> None:
    data, whole = load("mnist", folder, train=4, test=1), load("mnist", folder)
    assert torch.equal(data.train_x, whole.train_x[:4])
    assert torch.equal(data.train_y, whole.train_y[:4])
    assert (len(data.test_x), len(data.test_y)) == (1, 1)


def test_data_folder_is_the_argument_then_the_environment_then_the_cache(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAPHLOCAL_DATA", str(folder))
    assert len(load("fashion-mnist").train_x) == 6
    assert data_folder("~/elsewhere") == Path.home() / "elsewhere"
    monkeypatch.delenv("GRAPHLOCAL_DATA")
    assert data_folder() == Path.home() / ".cache" / "graphlocal"


def test_a_data_set_is_frozen(folder: Path) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load("mnist", folder).name = "other"  # type: ignore[misc]


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"no data set 'fashion_mnist'\n  remedy: did you mean 'fashion-mnist'\?"):
        load("fashion_mnist")
    with pytest.raises(InputError, match="known: digits, mnist, fashion-mnist"):
        load("xyz")


def test_a_missing_file_is_named_with_where_to_get_it(folder: Path) -> None:
    path = folder / RAW["fashion-mnist"] / TEST_Y
    path.unlink()
    with pytest.raises(InputError) as caught:
        load("fashion-mnist", folder)
    assert str(caught.value) == (
        "the data set 'fashion-mnist' is not there\n"
        f"  why: no such file: {path}\n"
        "  remedy: put the file there (they are in data/fashion of the GitHub repository "
        "zalandoresearch/fashion-mnist), or let data_dir or GRAPHLOCAL_DATA name the folder that holds "
        "FashionMNIST/raw"
    )


def test_all_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load("mnist", tmp_path)
    for name in (TRAIN_X, TRAIN_Y, TEST_X, TEST_Y):
        assert str(tmp_path / "MNIST" / "raw" / name) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>not found</html>", "not a whole gzip file"),
        (gzip.compress(idx(torch.zeros(6, dtype=torch.int64)))[:-9], "not a whole gzip file"),
        (gzip.compress(b""), "not an IDX file of unsigned bytes with 1 dimension\n"),
        (gzip.compress(idx(torch.zeros(6, 2, 2, dtype=torch.int64))), "it starts with 00 00 08 03"),
        (gzip.compress(idx(torch.zeros(6, dtype=torch.int64))[:-1]), r"shape \[6\] with 5 bytes of data"),
        (gzip.compress(idx(torch.zeros(5, dtype=torch.int64))), "6 images but 5 labels"),
        (gzip.compress(idx(torch.full((6,), 10))), "label 10 of 10 classes"),
    ],
    ids=["no gzip", "cut off", "empty", "images for labels", "short", "fewer labels", "label too large"],
)
def test_a_file_that_is_not_what_it_must_be_is_named(folder: Path, content: bytes, message: str) -> None:
    path = folder / RAW["mnist"] / TRAIN_Y
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load("mnist", folder)
    assert caught.value.where == str(path)


def test_batches_are_in_order_without_a_generator() -> None:
    x = torch.arange(14).view(7, 2)
    pairs = list(batches(x, torch.arange(7), 3))
    assert [len(part) for part, _ in pairs] == [3, 3, 1]
    assert torch.equal(torch.cat([part for part, _ in pairs]), x)
    assert torch.cat([labels for _, labels in pairs]).tolist() == list(range(7))


def test_batches_are_shuffled_by_their_generator_and_keep_pairs_together() -> None:
    def epoch(generator: torch.Generator) -> list[int]:
        pairs = list(batches(torch.arange(50) * 10, torch.arange(50), 8, generator))
        assert all(torch.equal(x, y * 10) for x, y in pairs)
        return torch.cat([y for _, y in pairs]).tolist()

    generator = torch.Generator().manual_seed(3)
    first, second = epoch(generator), epoch(generator)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second != list(range(50))
    assert first == epoch(torch.Generator().manual_seed(3))


def test_wrong_batches_are_refused_at_the_call() -> None:
    with pytest.raises(InputError, match="a batch size of 0"):
        batches(torch.zeros(3, 1), torch.zeros(3), 0)
    with pytest.raises(InputError, match="3 inputs but 2 labels"):
        batches(torch.zeros(3, 1), torch.zeros(2), 1)
