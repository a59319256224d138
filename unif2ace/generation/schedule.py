"""How many tokens are still unknown after each step: a function of (u0, T) alone, known before step 0.

    n_k+1 = max(1, min(n_k - 1, floor(u0 cos(pi (k+1) / 2T))))   and 0 after the last step
    tau_k = tau_0 (1 - (k+1) / T)

The published Show-o loop differs in two ways, kept under the name "show-o" for comparison: it scales the cosine by N
instead of u0, and multiplies tau by (1 - (k+1)/T) at every step instead of computing it afresh.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from unif2ace.errors import UserError

SCHEDULES = ("cosine", "show-o")
MAX_STEPS = 1024


class Step(NamedTuple):
    """`unknown` tokens when the step starts, `keep` of them stay unknown after it, `tau` scales the re-masking
    noise.
    """

    unknown: int
    keep: int
    tau: float


def schedule_steps(
    unknown: int, steps: int, *, tau: float = 1.0, num_tokens: int | None = None, schedule: str = "cosine"
) -> list[Step]:
    """The steps for an image that starts with `unknown` tokens to draw; shorter than `steps` once nothing is unknown.

    `num_tokens` (N) is read by "show-o" only. Raises `UserError` for an unknown schedule or a number of steps out of
    range.
    """
    if schedule not in SCHEDULES:
        raise UserError(f"schedule: expected one of {', '.join(SCHEDULES)}, got {schedule!r}")
    check_steps(steps)
    total = unknown if schedule == "cosine" or num_tokens is None else num_tokens
    result: list[Step] = []
    current, compounded = unknown, tau
    for k in range(steps):
        if current == 0:
            break
        remaining = 1.0 - (k + 1) / steps
        compounded *= remaining
        keep = max(1, min(current - 1, math.floor(total * math.cos(0.5 * math.pi * (k + 1) / steps))))
        if k == steps - 1 or current == 1:
            keep = 0
        result.append(Step(current, keep, tau * remaining if schedule == "cosine" else compounded))
        current = keep
    return result


def check_steps(steps: object) -> int:
    """`steps` as an int, or a `UserError`."""
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MAX_STEPS:
        raise UserError(f"steps: expected an integer from 1 to {MAX_STEPS}, got {steps!r}")
    return steps
