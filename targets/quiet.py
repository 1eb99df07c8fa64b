"""Silence for the exporters' own warnings and logs."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporters' own warnings and logs, which are about their code; the checks decide, not they."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            for module in (r"torch\..*", r"onnx.*", r"copyreg"):
                warnings.filterwarnings("ignore", module=module)
            yield
    finally:
        logging.disable(before)
