"""Pictures in folders, one for each class: read whole into memory, batch by batch, or made up."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from graphlocal.data import Dataset
from graphlocal.errors import InputError
from graphlocal.torchvision_operators import declare_operators

CLASSES = ("disc", "ring", "square", "frame", "cross", "bars", "stripes", "dots", "wedge", "halves")


def load_folder(name: str, folder: Path, train: int | None, test: int | None) -> Dataset:
    """The first pictures of each class below `folder`/train and `folder`/test, as many of each class as of any other.

    Raises InputError where there are none, or of several sizes.
    """
    parts = [_part(folder / part, count) for part, count in (("train", train), ("test", test))]
    (train_x, train_y, classes), (test_x, test_y, _) = parts
    return Dataset(name, train_x, train_y, test_x, test_y, classes)


def _part(folder: Path, count: int | None) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if not classes:
        raise InputError(
            f"there are no pictures in {folder}", why="it has no folder for each class", remedy="name it by --data-dir"
        )
    limit = None if count is None else math.ceil(count / len(classes))
    images, labels = [], []
    for number, name in enumerate(classes):
        for path in sorted((folder / name).iterdir())[:limit]:
            images.append(pixels(path))
            labels.append(number)
    if len({image.shape for image in images}) != 1:
        raise InputError(f"the pictures in {folder} are not of one size")
    return torch.stack(images), torch.tensor(labels), tuple(classes)


def pixels(path: Path) -> Tensor:
    """A picture as 3 x height x width, from 0 to 1."""
    import numpy
    from PIL import Image

    with Image.open(path) as image:
        values = torch.from_numpy(numpy.array(image.convert("RGB")))
    return values.permute(2, 0, 1).float() / 255


def loaders(folder: Path, size: int, batch: int, workers: int) -> tuple[DataLoader[Any], DataLoader[Any], int]:
    """The training and the validation pictures below `folder`/train and `folder`/val, and how many classes they have.

    Raises InputError where there are none.
    """
    declare_operators()
    from torchvision import datasets, transforms

    normal = [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    crop = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    middle = [transforms.Resize(size * 8 // 7), transforms.CenterCrop(size)]
    try:
        train = datasets.ImageFolder(folder / "train", transforms.Compose([*crop, *normal]))
        val = datasets.ImageFolder(folder / "val", transforms.Compose([*middle, *normal]))
    except FileNotFoundError as error:
        remedy = "name a folder with train/CLASS and val/CLASS by --data-dir"
        raise InputError(f"there are no pictures in {folder}", why=str(error), remedy=remedy) from None
    more: dict[str, Any] = {"batch_size": batch, "num_workers": workers}
    return DataLoader(train, shuffle=True, drop_last=True, **more), DataLoader(val, **more), len(train.classes)


def make_folder(folder: Path, classes: int, train: int, val: int, size: int) -> None:
    """A small set of made-up pictures as `torchvision.datasets.ImageFolder` reads it: shapes in random colours."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", train), ("val", val)):
        for name in CLASSES[:classes]:
            (folder / part / name).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                image = (255 * _shape(name, size, generator)).to(torch.uint8).permute(1, 2, 0).contiguous()
                Image.fromarray(image.numpy()).save(folder / part / name / f"{number}.jpg", quality=90)


def _shape(name: str, size: int, generator: torch.Generator) -> Tensor:
    """One shape of a random colour, place and size on a background of another, with noise: 3 x size x size."""
    y0, x0, scale, phase = torch.rand(4, generator=generator).tolist()
    axis = torch.linspace(-1, 1, size)
    y, x = (axis - 0.6 * y0 + 0.3)[:, None].expand(size, size), (axis - 0.6 * x0 + 0.3).expand(size, size)
    radius, edge, limit = (x**2 + y**2).sqrt(), torch.maximum(x.abs(), y.abs()), 0.35 + 0.35 * scale
    wave = torch.sin(12 * x + 6 * phase)
    inside = {
        "disc": radius < limit,
        "ring": (radius < limit) & (radius > 0.6 * limit),
        "square": edge < limit,
        "frame": (edge < limit) & (edge > 0.6 * limit),
        "cross": (torch.minimum(x.abs(), y.abs()) < 0.3 * limit) & (edge < limit),
        "bars": (wave > 0) & (edge < limit),
        "stripes": torch.sin(12 * y + 6 * phase) > 0,
        "dots": (wave > 0) & (torch.sin(12 * y) > 0),
        "wedge": (y > x.abs() - limit) & (y < limit),
        "halves": x > 0,
    }[name]
    colours = torch.rand(2, 3, 1, 1, generator=generator)
    noise = 0.1 * torch.randn(3, size, size, generator=generator)
    return (torch.where(inside, colours[0], colours[1]) + noise).clamp(0, 1)
