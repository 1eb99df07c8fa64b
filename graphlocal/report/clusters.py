"""Representations of a run's test samples in two dimensions, by t-SNE."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from graphlocal.errors import InputError
from graphlocal.snapshots import kept, read

PERPLEXITY = 30.0
FEWEST = 10


@dataclass(frozen=True)
class Clusters:
    """One picture: points (x, y, class) of a subgraph's representation after an epoch (0: before training)."""

    subgraph: str
    epoch: int
    points: tuple[tuple[float, float, int], ...]


def clusters(folder: Path) -> tuple[list[Clusters], list[str]]:
    """Pictures of what the run kept, of the first and the last epoch, and the classes' names; none if it kept nothing.

    Raises InputError where scikit-learn is not installed, and for a damaged file.
    """
    known = kept(folder)
    if known is None or not known[1]:
        return [], []
    about, files = known
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise InputError(
            "t-SNE needs scikit-learn", why=str(error), remedy="pip install 'graphlocal[demo]', and report again"
        ) from None
    found = []
    for epoch in dict.fromkeys((min(files), max(files))):
        tensors = read(files[epoch])
        for name in about["subgraphs"]:
            if name in tensors and len(tensors[name]) >= FEWEST:
                values = tensors[name].numpy()
                perplexity = min(PERPLEXITY, (len(values) - 1) / 3)
                tsne = TSNE(2, perplexity=perplexity, init="pca" if values.shape[1] > 1 else "random", random_state=0)
                places = tsne.fit_transform(values) if values.std() > 0 else values[:, :1].repeat(2, 1)
                points = zip(*places.T.tolist(), about["labels"], strict=True)
                found.append(Clusters(name, epoch, tuple((x, y, c) for x, y, c in points)))
    return found, list(about["classes"])
