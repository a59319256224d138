"""What selects the noise of each row, for the tests of sampling."""

from __future__ import annotations

import torch
from torch import Tensor


def place(rows: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """seeds, positions and steps, in this order."""
    return {
        "seeds": torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator),
        "positions": torch.arange(rows) * 65537 - 5,
        "steps": torch.arange(rows, dtype=torch.int32) % 7 - 1,
    }
