"""Parallel masked-token sampling: logits -> tokens and their confidence, and the choice of which tokens to mask again.

One step of masked generation samples every unknown position at once, keeps the tokens the model is sure of and masks
the rest again (MaskGIT, arXiv 2202.04200; Show-o, arXiv 2408.12528). Per row r with logits z over V codes:

    z          = (1 + w) z_cond - w z_uncond                      classifier-free guidance, w >= 0
    code       = argmax_v  z_v / T + g_v                          Gumbel-max: an exact sample of softmax(z / T)
    confidence = z_code - logsumexp(z)                            log-probability under the model itself (T = 1)

The confidence does not depend on the temperature, so greedy decoding (T = 0, no noise) still ranks its tokens. The
noise g is stateless (`_noise.py`): it depends on the row's seed, position and step only, so a row gives the same token
in any batch, in any order and on any back end. Ties go to the lowest code.

**Rounding, part of the contract** (equal logits must give equal tokens everywhere): logits are converted to float32
(float64 stays), then `z = a*zc - w*zu` with a = float32(1 + w), both products rounded; `key = z * float32(1 / T) + g`,
product and sum rounded. No fused multiply-add in either.

**Remask.** Rank the rows of one image by `confidence + tau * Gumbel(stream 1, word of code 0)`, product and sum rounded
in float32; the `keep_unknown` smallest stay unknown; ties go to the lowest position.

Cost: one pass over the logits (R*V*bytes, twice that with guidance) plus about 75 integer and float operations per
logit for the noise; extra memory is one chunk of rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from unif2ace.errors import UserError
from unif2ace.ops import _noise, _registry
from unif2ace.ops._checks import describe, dtype_name, one_device

# Elements per chunk of rows: the working set of about ten int64/float32 temporaries stays inside a 2 MiB L2 cache.
CHUNK_ELEMENTS = 1 << 16
HEAD_CHUNK_ELEMENTS = 1 << 20  # larger for head_sample: a GEMM of few rows would stream the weight too often


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _guided(cond: Tensor, uncond: Tensor | None, guidance: float) -> Tensor:
    dtype = _compute_dtype(cond)
    if uncond is None or guidance == 0.0:
        return cond.to(dtype)
    return cond.to(dtype) * (1.0 + guidance) - uncond.to(dtype) * guidance


def _sample_chunk(
    z: Tensor, seeds: Tensor, positions: Tensor, steps: Tensor, temperature: float, stream: int
) -> tuple[Tensor, Tensor]:
    key = z
    if temperature > 0.0:
        scaled = z if temperature == 1.0 else z * (1.0 / temperature)
        key = scaled + _noise.gumbel_noise(seeds, positions, steps, stream, z.shape[1])
    codes = key.argmax(dim=1, keepdim=True)  # argmax returns the first of equal values: the lowest code
    # log_softmax reduces every row on its own, whatever the number of rows: confidences are batch-invariant.
    return codes[:, 0], F.log_softmax(z, dim=1).gather(1, codes)[:, 0]


@torch.no_grad()
def reference_sample_tokens(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    steps: Tensor,
    temperature: float = 1.0,
    uncond_logits: Tensor | None = None,
    guidance: float = 0.0,
    stream: int = _noise.TOKEN_STREAM,
) -> tuple[Tensor, Tensor]:
    """The definition of `sample_tokens` in plain PyTorch, a chunk of rows at a time."""
    rows, columns = logits.shape
    codes = torch.empty(rows, dtype=torch.int32, device=logits.device)
    confidence = torch.empty(rows, dtype=torch.float32, device=logits.device)
    chunk = max(1, CHUNK_ELEMENTS // columns)
    for start in range(0, rows, chunk):
        part = slice(start, start + chunk)
        z = _guided(logits[part], None if uncond_logits is None else uncond_logits[part], guidance)
        codes[part], confidence[part] = _sample_chunk(z, seeds[part], positions[part], steps[part], temperature, stream)
    return codes, confidence


@torch.no_grad()
def reference_head_sample(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seeds: Tensor,
    positions: Tensor,
    steps: Tensor,
    temperature: float = 1.0,
    uncond_hidden: Tensor | None = None,
    guidance: float = 0.0,
    stream: int = _noise.TOKEN_STREAM,
) -> tuple[Tensor, Tensor]:
    """The definition of `head_sample`: guidance folded into the hidden rows, then head and sampling chunk by chunk."""
    rows, columns = hidden.shape[0], weight.shape[0]
    codes = torch.empty(rows, dtype=torch.int32, device=hidden.device)
    confidence = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    folded = _guided(hidden, uncond_hidden, guidance).to(hidden.dtype)
    chunk = max(1, HEAD_CHUNK_ELEMENTS // columns)
    for start in range(0, rows, chunk):
        part = slice(start, start + chunk)
        codes[part], confidence[part] = reference_sample_tokens(
            F.linear(folded[part], weight, bias), seeds[part], positions[part], steps[part], temperature, stream=stream
        )
    return codes, confidence


@torch.no_grad()
def reference_remask(
    log_confidence: Tensor,
    row_offsets: Tensor,
    keep_unknown: Tensor,
    seeds: Tensor,
    positions: Tensor,
    steps: Tensor,
    tau: Tensor,
) -> Tensor:
    """The definition of `remask`: three stable sorts give the order (image, key, position) without a host sync."""
    rows, device = log_confidence.shape[0], log_confidence.device
    if rows == 0:
        return torch.empty(0, dtype=torch.bool, device=device)
    offsets = row_offsets.to(torch.int64).contiguous()  # strided, searchsorted would warn
    row = torch.arange(rows, device=device)
    image = torch.searchsorted(offsets, row, right=True) - 1  # empty images are skipped by right=True
    inside = (image >= 0) & (image < seeds.shape[0])  # rows outside the offsets get False
    image = image.clamp(0, max(seeds.shape[0] - 1, 0))
    noise = _noise.gumbel_noise(seeds[image], positions, steps[image], _noise.CONFIDENCE_STREAM, 1)[:, 0]
    key = log_confidence.to(torch.float32) + tau.to(torch.float32)[image] * noise
    order = positions.argsort(stable=True)
    order = order[key[order].argsort(stable=True)]
    order = order[image[order].argsort(stable=True)]
    rank = torch.empty_like(row).scatter_(0, order, row) - offsets[image]
    return (rank < keep_unknown.to(torch.int64)[image]) & inside


# ------------------------------------------------------------------------------------------------------ registered ops


def _fake_codes(scores: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    rows = scores.shape[:1]
    return scores.new_empty(rows, dtype=torch.int32), scores.new_empty(rows, dtype=torch.float32)


_NOISE_SCHEMA = "Tensor seeds, Tensor positions, Tensor steps, float temperature"
_registry.define(
    "sampling",
    "sample_tokens",
    f"(Tensor logits, {_NOISE_SCHEMA}, Tensor? uncond_logits, float guidance, int stream) -> (Tensor, Tensor)",
    _fake_codes,
    reference_sample_tokens,
)
_registry.define(
    "sampling",
    "head_sample",
    f"(Tensor hidden, Tensor weight, Tensor? bias, {_NOISE_SCHEMA}, Tensor? uncond_hidden, float guidance, int stream)"
    " -> (Tensor, Tensor)",
    _fake_codes,
    reference_head_sample,
)
_registry.define(
    "sampling",
    "remask",
    "(Tensor log_confidence, Tensor row_offsets, Tensor keep_unknown, Tensor seeds, Tensor positions, Tensor steps, "
    "Tensor tau) -> Tensor",
    lambda log_confidence, *args: torch.empty_like(log_confidence, dtype=torch.bool),
    reference_remask,
)


def _implementation(name: str, reference: Callable, backend: str | None, tensor: Tensor) -> Callable:
    """The function that runs this call: the plain reference, or the registered op of the chosen back end."""
    chosen = _registry.choose("sampling", backend, tensor.device, tensor.dtype)
    if chosen == "reference" and not torch.compiler.is_compiling():
        return reference
    return _registry.registered(chosen, name)


# ---------------------------------------------------------------------------------------------------- public functions


def _check_rows(op: str, rows: int, **columns: Tensor) -> None:
    """Index-like arguments: one integer per row; seeds use all 64 bits."""
    for name, tensor in columns.items():
        dtypes = (torch.int64,) if name == "seeds" else (torch.int32, torch.int64)
        if tensor.dtype not in dtypes or tensor.shape != (rows,):
            expected = " or ".join(dtype_name(dtype) for dtype in dtypes)
            raise UserError(f"{op}: {name} must be [{rows}] {expected}, got {describe(tensor)}")


def _check_sampling(op: str, name: str, scores: Tensor, uncond: Tensor | None, temperature: float, guidance: float):
    if scores.dim() != 2 or not scores.is_floating_point() or scores.shape[1] == 0:
        columns = "V" if name == "logits" else "H"
        raise UserError(f"{op}: {name} must be [R, {columns} >= 1] floating point, got {describe(scores)}")
    if uncond is not None and (uncond.shape != scores.shape or uncond.dtype != scores.dtype):
        raise UserError(f"{op}: uncond_{name} must be {describe(scores)} like {name}, got {describe(uncond)}")
    for number, value in (("temperature", temperature), ("guidance", guidance)):
        if not 0.0 <= value < math.inf:
            raise UserError(f"{op}: {number} must be a finite number >= 0, got {value}")
    if temperature > 0.0 and not 1e-38 <= temperature <= 1e38:
        # 1 / T has to be a float32 number: infinity or zero times a logit could be NaN, and NaN would be sampled.
        raise UserError(f"{op}: temperature must be 0 or from 1e-38 to 1e38, got {temperature}")
    if guidance > 0.0 and uncond is None:
        raise UserError(f"{op}: guidance {guidance} needs uncond_{name}, got None")


def _can_read_values(tensor: Tensor) -> bool:
    """Value checks need the numbers on the host: free on a CPU, a forbidden sync on a GPU, impossible while tracing."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _refuse_nan_rows(op: str, name: str, confidence: Tensor) -> None:
    # NaN, +inf and rows without a finite logit all end as a NaN confidence, so reading R numbers checks R * V.
    if _can_read_values(confidence) and bool(confidence.isnan().any()):
        row = int(confidence.isnan().nonzero()[0, 0])
        raise UserError(
            f"{op}: {name} of row {row} hold NaN, +inf or no finite value; expected finite or -inf numbers."
        )


def sample_tokens(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    steps: Tensor,
    *,
    temperature: float = 1.0,
    uncond_logits: Tensor | None = None,
    guidance: float = 0.0,
    stream: int = _noise.TOKEN_STREAM,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample one code per row from softmax(z / temperature) and report how sure the model is of it.

    Args:
        logits: [R, V] float; -inf marks forbidden codes.
        seeds: [R] int64, the seed of the row's request. positions, steps: [R] int32 or int64, the row's place in the
            image and the number of the denoising step; together they select the noise.
        temperature: 0 takes the most likely code without noise; otherwise 1e-38 to 1e38.
        uncond_logits, guidance: z = (1 + guidance) * logits - guidance * uncond_logits.
        stream: noise stream, one per purpose (`_noise.py`): 0 image tokens, 2 text decoding.

    Returns:
        codes [R] int32 and log_confidence [R] float32 = log softmax(z)[code] (not divided by the temperature).

    Raises:
        UserError: shapes, dtypes or ranges that do not fit; on CPU also rows with NaN, +inf or no finite logit.

    Not differentiable. Source: Gumbel-max sampling, MaskGIT (arXiv 2202.04200); noise of Philox 4x32-10.
    """
    _check_sampling("sample_tokens", "logits", logits, uncond_logits, temperature, guidance)
    _check_rows("sample_tokens", logits.shape[0], seeds=seeds, positions=positions, steps=steps)
    one_device("sample_tokens", logits, uncond_logits=uncond_logits, seeds=seeds, positions=positions, steps=steps)
    run = _implementation("sample_tokens", reference_sample_tokens, backend, logits)
    codes, confidence = run(logits, seeds, positions, steps, float(temperature), uncond_logits, float(guidance), stream)
    _refuse_nan_rows("sample_tokens", "logits", confidence)
    return codes, confidence


def head_sample(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seeds: Tensor,
    positions: Tensor,
    steps: Tensor,
    *,
    temperature: float = 1.0,
    uncond_hidden: Tensor | None = None,
    guidance: float = 0.0,
    stream: int = _noise.TOKEN_STREAM,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`sample_tokens(hidden @ weight.T + bias, ...)` without ever holding all logits.

    Guidance is folded before the head, which is linear: z = W [(1 + w) h_cond - w h_uncond] + b. That halves the head's
    work and rounds once instead of twice.

    Args:
        hidden: [R, H] float. weight: [V, H] of the same dtype (slice the code columns of the model's head). bias: [V].
        uncond_hidden: [R, H], needed when guidance > 0. The other arguments: see `sample_tokens`.

    Returns:
        codes [R] int32 in [0, V) and log_confidence [R] float32.

    Cost: 2*R*H*V FLOPs; extra memory is one chunk of rows (about one million logits).
    """
    _check_sampling("head_sample", "hidden", hidden, uncond_hidden, temperature, guidance)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or weight.shape[0] == 0 or weight.dtype != hidden.dtype:
        expected = f"[V >= 1, {hidden.shape[1]}] {dtype_name(hidden.dtype)}"
        raise UserError(f"head_sample: weight must be {expected}, got {describe(weight)}")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        expected = f"[{weight.shape[0]}] {dtype_name(weight.dtype)}"
        raise UserError(f"head_sample: bias must be {expected}, got {describe(bias)}")
    _check_rows("head_sample", hidden.shape[0], seeds=seeds, positions=positions, steps=steps)
    others = {"weight": weight, "bias": bias, "uncond_hidden": uncond_hidden}
    one_device("head_sample", hidden, **others, seeds=seeds, positions=positions, steps=steps)
    run = _implementation("head_sample", reference_head_sample, backend, hidden)
    codes, confidence = run(
        hidden, weight, bias, seeds, positions, steps, float(temperature), uncond_hidden, float(guidance), stream
    )
    _refuse_nan_rows("head_sample", "logits", confidence)
    return codes, confidence


def remask(
    log_confidence: Tensor,
    row_offsets: Tensor,
    keep_unknown: Tensor,
    seeds: Tensor,
    positions: Tensor,
    steps: Tensor,
    tau: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """Choose which freshly sampled tokens go back to `mask`: the least certain ones of every image.

    Args:
        log_confidence: [R] float, from `sample_tokens`; image b owns the rows row_offsets[b] : row_offsets[b + 1].
        row_offsets: [B + 1] int32 or int64, from 0 to R.
        keep_unknown: [B] int32 or int64, how many rows of each image stay unknown (known before the first step).
        seeds: [B] int64. steps: [B] int32 or int64. positions: [R] int32 or int64.
        tau: [B] float, the weight of the Gumbel noise in the ranking; 0 ranks by confidence alone.

    Returns:
        mask [R] bool, True where the row stays unknown: exactly keep_unknown[b] rows of image b.

    Raises:
        UserError: shapes and dtypes that do not fit; on CPU also offsets that do not run from 0 to R, keep_unknown
            outside [0, rows of the image], NaN confidences and negative or infinite tau.

    Cost: three stable sorts of R keys (reference). No host sync on a GPU.
    """
    if log_confidence.dim() != 1 or not log_confidence.is_floating_point():
        raise UserError(f"remask: log_confidence must be [R] floating point, got {describe(log_confidence)}")
    rows, images = log_confidence.shape[0], seeds.shape[0] if seeds.dim() == 1 else 0
    _check_rows("remask", images, seeds=seeds, steps=steps, keep_unknown=keep_unknown)
    _check_rows("remask", images + 1, row_offsets=row_offsets)
    _check_rows("remask", rows, positions=positions)
    if tau.shape != (images,) or not tau.is_floating_point():
        raise UserError(f"remask: tau must be [{images}] floating point, got {describe(tau)}")
    images_of = {"row_offsets": row_offsets, "keep_unknown": keep_unknown, "tau": tau}
    one_device("remask", log_confidence, **images_of, seeds=seeds, positions=positions, steps=steps)
    if _can_read_values(log_confidence):
        _check_remask_values(log_confidence, row_offsets, keep_unknown, tau)
    run = _implementation("remask", reference_remask, backend, log_confidence)
    return run(log_confidence, row_offsets, keep_unknown, seeds, positions, steps, tau)


def _check_remask_values(log_confidence: Tensor, row_offsets: Tensor, keep_unknown: Tensor, tau: Tensor) -> None:
    counts = row_offsets.diff()
    if row_offsets[0] != 0 or row_offsets[-1] != log_confidence.shape[0] or bool((counts < 0).any()):
        raise UserError(
            f"remask: row_offsets must rise from 0 to {log_confidence.shape[0]}, got {row_offsets.tolist()[:8]}"
        )
    if bool(((keep_unknown < 0) | (keep_unknown > counts)).any()):
        raise UserError(
            f"remask: keep_unknown must lie between 0 and the rows of each image {counts.tolist()[:8]}, "
            f"got {keep_unknown.tolist()[:8]}"
        )
    if bool(log_confidence.isnan().any()):
        raise UserError("remask: log_confidence must hold no NaN")
    if not bool((tau.isfinite() & (tau >= 0)).all()):
        raise UserError(f"remask: tau must be finite and >= 0, got {tau.tolist()[:8]}")
