"""Small image data sets for the demo, the examples and the benchmarks.

`digits` comes with scikit-learn. `mnist` and `fashion-mnist` are read from the gzipped IDX files of their
authors, laid out as torchvision does (`FashionMNIST/raw/train-images-idx3-ubyte.gz`) below a folder:
`data_dir`, else the environment variable GRAPHLOCAL_DATA, else `~/.cache/graphlocal`. Nothing is downloaded.

    data = load("digits")
    for x, y in batches(data.train_x, data.train_y, 32, torch.Generator().manual_seed(0)):
        ...
"""

from __future__ import annotations

import gzip
import math
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from graphlocal.errors import InputError, nearest


@dataclass(frozen=True)
class Dataset:
    """Images N x 1 x H x W, float32 in [0, 1], and labels N, int64, which index `classes`."""

    name: str
    train_x: torch.Tensor
    train_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor
    classes: tuple[str, ...]


@dataclass(frozen=True)
class _Source:
    """Where the IDX files of a data set lie below the data folder, and where they come from."""

    folder: str
    classes: tuple[str, ...]
    origin: str


_DIGITS = tuple("0123456789")
_IDX = {
    "mnist": _Source("MNIST/raw", _DIGITS, "torchvision.datasets.MNIST(data_dir, download=True) lays them out"),
    "fashion-mnist": _Source(
        "FashionMNIST/raw",
        (
            "T-shirt/top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ),
        "they are in data/fashion of the GitHub repository zalandoresearch/fashion-mnist",
    ),
}
_FILES = {
    "train_x": "train-images-idx3-ubyte.gz",
    "train_y": "train-labels-idx1-ubyte.gz",
    "test_x": "t10k-images-idx3-ubyte.gz",
    "test_y": "t10k-labels-idx1-ubyte.gz",
}
_UNSIGNED_BYTE = 8  # the type code of the IDX format


def load(
    name: str,
    data_dir: str | Path | None = None,
    *,
    train: int | None = None,
    test: int | None = None,
) -> Dataset:
    """The data set `name`, or only its first `train` and `test` samples.

    The split of `digits` is a fixed stratified one: 1437 samples for training, 360 for testing.

    Raises InputError for an unknown name, and for a file that is missing or is not what it must be.
    """
    if name == "digits":
        data = _digits()
    elif name in _IDX:
        data = _from_idx(name, _IDX[name], data_folder(data_dir))
    else:
        raise InputError(f"there is no data set {name!r}", remedy=nearest(name, ["digits", *_IDX]))
    return Dataset(
        name, data.train_x[:train], data.train_y[:train], data.test_x[:test], data.test_y[:test], data.classes
    )


def data_folder(data_dir: str | Path | None = None) -> Path:
    """`data_dir`, else the environment variable GRAPHLOCAL_DATA, else `~/.cache/graphlocal`."""
    return Path(data_dir or os.environ.get("GRAPHLOCAL_DATA") or "~/.cache/graphlocal").expanduser()


def batches(
    x: torch.Tensor, y: torch.Tensor, size: int, generator: torch.Generator | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One epoch of pairs of at most `size` samples: shuffled by `generator`, in order without one.

    Raises InputError for a size below 1 and for inputs and labels of unlike length.
    """
    if size < 1:
        raise InputError(f"a batch size of {size}", remedy="pass 1 or more")
    if len(x) != len(y):
        raise InputError(f"{len(x)} inputs but {len(y)} labels", remedy="pass one label for each input")
    if generator is None:
        return zip(x.split(size), y.split(size), strict=True)
    order = torch.randperm(len(x), generator=generator, device=generator.device).to(x.device)
    return ((x[chosen], y[chosen]) for chosen in order.split(size))


def _digits() -> Dataset:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise InputError(
            "the data set 'digits' needs scikit-learn",
            why=str(error),
            remedy="pip install 'graphlocal[demo]'",
        ) from None
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels)
    train_x, test_x = (torch.tensor(part / 16, dtype=torch.float32).view(-1, 1, 8, 8) for part in split[:2])
    train_y, test_y = (torch.tensor(part, dtype=torch.int64) for part in split[2:])
    return Dataset("digits", train_x, train_y, test_x, test_y, _DIGITS)


def _from_idx(name: str, source: _Source, folder: Path) -> Dataset:
    paths = {field: _zipped_or_not(folder / source.folder / file) for field, file in _FILES.items()}
    missing = [str(path) for path in paths.values() if not path.is_file()]
    if missing:
        raise InputError(
            f"the data set {name!r} is not there",
            why="no such file: " + ", ".join(missing),
            remedy=f"put the file there ({source.origin}), "
            f"or let data_dir or GRAPHLOCAL_DATA name the folder that holds {source.folder}",
        )
    loaded = {field: _read_idx(path, 3 if field.endswith("_x") else 1) for field, path in paths.items()}
    for part in ("train", "test"):
        x, y = loaded[f"{part}_x"], loaded[f"{part}_y"]
        where = str(paths[f"{part}_y"])
        if len(x) != len(y):
            raise InputError(f"{len(x)} images but {len(y)} labels", where=where, remedy="fetch both files again")
        if len(y) and int(y.max()) >= len(source.classes):
            raise InputError(
                f"label {int(y.max())} of {len(source.classes)} classes", where=where, remedy="fetch it again"
            )
        loaded[f"{part}_x"] = x.unsqueeze(1).to(torch.float32) / 255
        loaded[f"{part}_y"] = y.to(torch.int64)
    return Dataset(name=name, classes=source.classes, **loaded)


def _zipped_or_not(path: Path) -> Path:
    """The gzip file as it is distributed, or else the unpacked one beside it."""
    unpacked = path.with_suffix("")
    return unpacked if unpacked.is_file() and not path.is_file() else path


def _read_idx(path: Path, dims: int) -> torch.Tensor:
    """The unsigned bytes of an IDX file, gzipped or not: two zeros, type, rank, then the sizes as big-endian int32."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError("not a whole gzip file", where=str(path), why=str(error), remedy="fetch it again") from None
    start = 4 + 4 * dims
    if content[:4] != bytes([0, 0, _UNSIGNED_BYTE, dims]):
        raise InputError(
            f"not an IDX file of unsigned bytes with {dims} dimension{'s' * (dims > 1)}",
            where=str(path),
            why=f"it starts with {content[:4].hex(' ')}",
            remedy="fetch it again",
        )
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    if len(content) - start != math.prod(shape):
        raise InputError(
            f"an IDX file of shape {shape} with {len(content) - start} bytes of data",
            where=str(path),
            why=f"there should be {math.prod(shape)}",
            remedy="fetch it again",
        )
    return torch.frombuffer(bytearray(content[start:]), dtype=torch.uint8).view(shape)
