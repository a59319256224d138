"""How a pipeline draws and answers unless it is told otherwise: one small record, checked wherever it is made.

steps             denoising steps T: every step runs the transformer once (twice with guidance)
guidance_scale    w of z = (1 + w) z_cond - w z_uncond: how strictly a face follows its sentence; 0 halves the work
temperature       of the choice of image tokens: 0 takes the likeliest, 1 samples from the model's distribution
remask_tau        scale of the noise in the choice of tokens that are drawn again; fades to 0 over the steps
max_prompt_tokens longest prompt or question, in tokens
max_new_tokens    longest answer, in tokens
"""

from __future__ import annotations

import dataclasses
import numbers
from dataclasses import dataclass

import torch
from torch import Tensor

from unif2ace.errors import UserError
from unif2ace.generation.schedule import check_steps

MAX_GUIDANCE = 100.0
MAX_TEMPERATURE = 100.0
MAX_SEED = 2**64 - 1


@dataclass(frozen=True)
class GenerationConfig:
    """The defaults stored as `generation_config.json`. Raises `UserError` for a value out of range."""

    steps: int = 18
    guidance_scale: float = 3.0
    temperature: float = 1.0
    remask_tau: float = 1.0
    max_prompt_tokens: int = 128
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        check_steps(self.steps)
        check_number("guidance_scale", self.guidance_scale, MAX_GUIDANCE)
        check_number("temperature", self.temperature, MAX_TEMPERATURE)
        check_number("remask_tau", self.remask_tau, MAX_TEMPERATURE)
        check_count("max_prompt_tokens", self.max_prompt_tokens)
        check_count("max_new_tokens", self.max_new_tokens)

    def override(self, **changes: object) -> GenerationConfig:
        """The same settings with every value of `changes` that is not None, checked."""
        return dataclasses.replace(self, **{name: value for name, value in changes.items() if value is not None})

    def override_drawing(self, steps: object, guidance: object, temperature: object) -> GenerationConfig:
        """The same, for options and columns of tables, where `guidance_scale` is `guidance`: errors name that."""
        if guidance is not None:
            check_number("guidance", guidance, MAX_GUIDANCE)
        return self.override(steps=steps, guidance_scale=guidance, temperature=temperature)


def check_number(name: str, value: object, high: float) -> float:
    """`value` as a float from 0 to `high`, or a `UserError`."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)  # NumPy scalars are numbers too
    if not number or not 0 <= value <= high:  # NaN is not
        raise UserError(f"{name}: expected a number from 0 to {high:g}, got {value!r}")
    return float(value)


def check_count(name: str, value: object) -> int:
    """`value` as an int of at least 1, or a `UserError`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{name}: expected an integer of at least 1, got {value!r}")
    return value


def check_answering(max_new_tokens: object, temperature: object, top_k: object, top_p: object) -> None:
    """Refuse what answers cannot be decoded with; `top_k` and `top_p` None: no limit."""
    check_count("max_new_tokens", max_new_tokens)
    check_number("temperature", temperature, MAX_TEMPERATURE)
    if top_k is not None:
        check_count("top_k", top_k)
    if top_p is not None and check_number("top_p", top_p, 1.0) == 0.0:
        raise UserError(f"top_p: expected a number above 0 and up to 1, got {top_p!r}")


def codes_to_draw(shape: torch.Size | tuple[int, ...], mask_code: int, known_codes: object, known: object) -> Tensor:
    """Codes [.., N] int64 to start from: `known_codes` where `known` (bool) is true, `mask_code` elsewhere.

    Both None: nothing is known. Raises `UserError` for other shapes or dtypes, one without the other, and, on the CPU,
    known codes that are none.
    """
    if known is None and known_codes is None:
        return torch.full(shape, mask_code)
    for name, value in (("known_codes", known_codes), ("known", known)):
        if not isinstance(value, Tensor) or value.shape != shape:
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise UserError(f"generate: {name} must be {list(shape)}, got {got}")
    if known.dtype != torch.bool or known_codes.dtype not in (torch.int64, torch.int32):
        raise UserError(
            f"generate: known must be bool and known_codes integers, got {known.dtype} and {known_codes.dtype}"
        )
    codes = torch.where(known, known_codes.long(), mask_code)
    if codes.device.type == "cpu" and bool((known & ((codes < 0) | (codes >= mask_code))).any()):
        raise UserError(f"generate: known codes must lie in 0..{mask_code - 1}")
    return codes


def to_signed(seed: int) -> int:
    """A 64-bit seed as the int64 with the same bits."""
    return (seed + 2**63) % 2**64 - 2**63
