"""Whether a CUDA graph is being captured."""

from __future__ import annotations

import torch


def is_capturing() -> bool:
    """Whether what is issued now is recorded and not run; False in builds of torch without CUDA."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
