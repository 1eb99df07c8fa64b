"""A table of numbers for each sample of a data set, in memory or in a file, which outlives the training step.

One row a sample: a number that says whether the sample was visited, then the sample's fields one after another. Rows
are zeros, which take no room, until they are written. A file holds the rows alone; beside it lies a header in JSON.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphlocal.errors import InputError

IN_MEMORY = 4 * 2**30
"""The most bytes of a store in memory, where the user names no bound."""

_FORMAT = "graphlocal sample store, version 1"


class SampleStore:
    """Named vectors for each sample.

    fields: numbers a sample for each name. samples: how many there are; None grows with the largest index. path: the
    file that holds the rows (on the CPU then); an existing one is gone on with. max_bytes: the most that the rows may
    take; None is `IN_MEMORY`, for a file what the disk has free.

    Raises InputError if the bound is too small for `samples`, or a file holds something else.
    """

    def __init__(
        self,
        fields: Mapping[str, int],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        samples: int | None = None,
        path: str | Path | None = None,
        max_bytes: int | None = None,
    ) -> None:
        self.fields, self.dtype, self.samples = dict(fields), dtype, samples
        self.path = None if path is None else Path(path)
        self.device = torch.device(device if path is None else "cpu")
        self.max_bytes = max_bytes
        self._width = 1 + sum(self.fields.values())
        self._rows = torch.zeros(0, self._width, dtype=dtype, device=self.device)
        if self.path is not None:
            self._open(self.path)
        if samples is not None and len(self._rows) != samples:
            self._resize(samples)

    # Size.

    @property
    def bytes_per_sample(self) -> int:
        return self._width * self._rows.element_size()

    def needed(self, samples: int) -> int:
        """The bytes that so many samples take."""
        return samples * self.bytes_per_sample

    @property
    def bytes(self) -> int:
        """The bytes that the rows take up now, visited or not."""
        return self.needed(len(self._rows))

    def __len__(self) -> int:
        """The samples that have a row."""
        return len(self._rows)

    def __repr__(self) -> str:
        where = f"in {self.path}" if self.path else f"in memory ({self.device})"
        return f"SampleStore({len(self)} samples x {self.bytes_per_sample:,} bytes = {self.bytes:,} bytes {where})"

    # Rows.

    def read(self, index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Which of the samples were written before, and the fields, samples x numbers (zeros where not).

        Raises InputError for an index that is none, or beyond the samples.
        """
        index = self._checked(index)
        rows = self._rows.index_select(0, index)
        visited, *values = rows.split([1, *self.fields.values()], dim=1)
        return visited.squeeze(1) != 0, dict(zip(self.fields, values, strict=True))

    def write(self, index: Tensor, values: Mapping[str, Tensor]) -> None:
        """Keep the fields of some samples; takes what `read` gives."""
        index = self._checked(index)
        parts = [values[name].to(self._rows) for name in self.fields]
        self._rows.index_copy_(0, index, torch.cat([self._rows.new_ones(len(index), 1), *parts], dim=1))

    def _checked(self, index: Tensor) -> Tensor:
        if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.dim() != 1:
            kind = f"{index.dtype} {list(index.shape)}" if isinstance(index, Tensor) else type(index).__name__
            raise InputError(
                f"index is a {kind}", remedy="pass a LongTensor with the number of each sample, torch.int64 [batch]"
            )
        if not len(index):
            raise InputError("index is empty", remedy="leave out batches without samples")
        low, high = int(index.min()), int(index.max())
        if low < 0 or (self.samples is not None and high >= self.samples):
            known = "" if self.samples is None else f" to {self.samples - 1}"
            raise InputError(
                f"index holds the sample {low if low < 0 else high}",
                why=f"samples are numbered from 0{known}",
                remedy="number the samples as they stand in the data set, and say with samples= how many there are",
            )
        if len(index.unique()) < len(index):
            values, counts = index.unique(return_counts=True)
            raise InputError(
                f"index holds the sample {int(values[counts.argmax()])} more than once",
                why="a sample has one set of variables, which a batch can update once",
                remedy="draw the samples of a batch without replacement",
            )
        if high >= len(self._rows):
            self._resize(high + 1)
        return index.to(self.device)

    def _resize(self, samples: int) -> None:
        """Make room for `samples` at least; where their number is open, for twice those there were if that fits."""
        limit = self._limit()
        wanted = samples if self.samples is not None else max(samples, 2 * len(self._rows))
        if self.needed(wanted) > limit:
            wanted = samples
        if self.needed(wanted) > limit:
            raise InputError(
                f"the variables of {wanted:,} samples take {_size(self.needed(wanted))}",
                why=f"each sample takes {self.bytes_per_sample:,} bytes, and "
                + (
                    f"the disk of {self.path} has {_size(limit)} left"
                    if self.path and self.max_bytes is None
                    else f"max_bytes is {_size(limit)}"
                ),
                remedy="free some of the disk, or name another path"
                if self.path and self.max_bytes is None
                else "raise max_bytes"
                + ("" if self.path else ", keep them on disk with store='mmap' and path=...")
                + ", or cut the model into fewer subgraphs (partition=k)",
            )
        if self.path is None:
            rows = torch.zeros(wanted, self._width, dtype=self.dtype, device=self.device)
            rows[: len(self._rows)] = self._rows
            self._rows = rows
        else:
            self._map(self.path, wanted)

    def _limit(self) -> int:
        if self.max_bytes is not None:
            return self.max_bytes
        return IN_MEMORY if self.path is None else self.bytes + shutil.disk_usage(self.path.parent).free

    # The file.

    def _header(self) -> dict[str, Any]:
        dtype = str(self.dtype).removeprefix("torch.")
        return {"format": _FORMAT, "samples": self.samples, "dtype": dtype, "fields": self.fields}

    def _open(self, path: Path) -> None:
        header = path.with_name(path.name + ".json")
        if not path.parent.is_dir():
            raise InputError(f"no folder for the sample store {path}", remedy=f"make the folder {path.parent} first")
        if not path.exists() and not header.exists():
            path.touch()
            partial = header.with_name(header.name + ".partial")
            partial.write_text(json.dumps(self._header(), indent=1))
            os.replace(partial, header)
            return
        remedy = "name another path, or delete both files to start anew"
        try:
            found = json.loads(header.read_text())
            size = path.stat().st_size
        except (OSError, ValueError) as error:
            raise InputError(f"{path} is no sample store", why=f"{header}: {error}", remedy=remedy) from None
        wanted = self._header()
        if not isinstance(found, dict) or found != wanted:
            keys = [key for key in wanted if not isinstance(found, dict) or found.get(key) != wanted[key]]
            first = keys[0] if keys else "format"
            was = found.get(first) if isinstance(found, dict) else found
            raise InputError(
                f"the sample store {path} was made for another model or data set",
                why=f"its {first} is {was!r}, and now {wanted[first]!r}",
                remedy=remedy,
            )
        if size % self.bytes_per_sample or (self.samples and size not in (0, self.needed(self.samples))):
            raise InputError(
                f"the sample store {path} is damaged",
                why=f"its {size} bytes are not a whole number of samples of {self.bytes_per_sample} bytes",
                remedy=remedy,
            )
        if size:
            self._map(path, size // self.bytes_per_sample)

    def _map(self, path: Path, samples: int) -> None:
        count = samples * self._width
        self._rows = torch.from_file(str(path), shared=True, size=count, dtype=self.dtype).view(samples, self._width)


def _size(count: int) -> str:
    for unit, bytes_ in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= bytes_:
            return f"{count / bytes_:.1f} {unit}"
    return f"{count} bytes"
