"""What the batch engine takes and gives, and what it makes of a request: a job, checked."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from torch import Tensor

from unif2ace.errors import UserError
from unif2ace.generation.schedule import Step, check_steps, schedule_steps
from unif2ace.generation.settings import MAX_GUIDANCE, MAX_SEED, MAX_TEMPERATURE, check_number, codes_to_draw
from unif2ace.model.transformer import UniF2ace

Key = tuple[tuple[int, ...], bytes]  # of a prefix: the prompt, and the codes to start from


@dataclass(frozen=True, eq=False)
class Request:
    """Images of one prompt (text ids without control tokens), one for each seed; `key` is the caller's.

    In-painting and variations: `known_codes` and `known`, both [N], keep a region or any set of tokens and draw the
    rest, anew for every seed.
    """

    prompt: Sequence[int]
    seeds: Sequence[int] = (0,)
    steps: int = 18
    guidance: float = 3.0
    temperature: float = 1.0
    tau: float = 1.0
    known_codes: Tensor | None = None
    known: Tensor | None = None
    key: Hashable = None


@dataclass(frozen=True, eq=False)
class Face:
    """Image `index` of a request: codes [N] int64 and pixels [S, S, 3] uint8 on the CPU, or why there are none."""

    request: Request
    index: int
    codes: Tensor | None = None
    pixels: Tensor | None = None
    error: str | None = None


@dataclass(eq=False)
class Job:
    """An accepted request: where its images start, and how many of them are being drawn or done."""

    request: Request
    codes: Tensor  # [N] on the host
    steps: tuple[Step, ...]
    taken: int = 0

    def __post_init__(self) -> None:
        start = self.codes.numpy().tobytes()
        self.cond: Key = tuple(self.request.prompt), start
        self.uncond: Key | None = ((), start) if self.request.guidance > 0 else None

    @property
    def keys(self) -> list[Key]:
        """Of the prefixes its images need."""
        return [key for key in (self.cond, self.uncond) if key is not None]

    @property
    def waiting(self) -> int:
        return len(self.request.seeds) - self.taken


def accept(request: Request, model: UniF2ace, max_prompt_tokens: int) -> Job:
    """The job of a request; `UserError` where anything in it does not fit."""
    check_steps(request.steps)
    check_number("guidance", request.guidance, MAX_GUIDANCE)
    check_number("temperature", request.temperature, MAX_TEMPERATURE)
    check_number("tau", request.tau, MAX_TEMPERATURE)
    text_ids = model.vocabulary.n_text
    for name, value in (("prompt", request.prompt), ("seeds", request.seeds)):
        if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
            raise UserError(f"{name}: expected a sequence of integers, got {type(value).__name__}")
    if not request.seeds:
        raise UserError("seeds: expected at least one, got none")
    if len(request.prompt) > max_prompt_tokens:
        raise UserError(f"prompt: expected at most {max_prompt_tokens} tokens, got {len(request.prompt)}")
    for token in request.prompt:
        if not isinstance(token, int) or not 0 <= token < text_ids:
            raise UserError(f"prompt: expected text ids in 0..{text_ids - 1}, got {token!r}")
    for seed in request.seeds:
        if not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
            raise UserError(f"seed: expected integers from 0 to 2^64 - 1, got {seed!r}")
    known, known_codes = (
        value.cpu() if isinstance(value, Tensor) else value for value in (request.known, request.known_codes)
    )
    mask_code = model.vocabulary.mask_code
    codes = codes_to_draw((model.config.num_image_tokens,), mask_code, known_codes, known)
    unknown = int((codes == mask_code).sum())
    return Job(request, codes, tuple(schedule_steps(unknown, request.steps, tau=request.tau)))
