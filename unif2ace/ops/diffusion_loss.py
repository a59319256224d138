"""Linear head + loss without storing the logits: next-token cross entropy and the D3Diff loss.

Both losses read, per row r of `hidden`, the logits z = W h + b only through a few sums over columns:

    nll_r  = logsumexp_all(z) - z_target          over `columns` (default: every column of the head)
    mass_r = sum_{y in mass columns} softmax(z)_y

and minimise `sum_r row_weight_r * nll_r + mass_weight_r * mass_r`. The gradient of row r with respect to its logits is

    row_weight * (softmax - onehot)  +  mass_weight * softmax * ([y in mass columns] - mass)

so the registered op computes dhidden, dW and db in the same pass over a chunk of rows in which the logits are alive,
and backward only multiplies them by the incoming scalar. Cost: 2*R*H*V FLOPs, three times that with gradients; extra
memory is one chunk of logits. (Source of the idea: Cut Cross Entropy, arXiv 2411.09009; Liger, arXiv 2410.10989.)

**D3Diff** (UniF2ace, arXiv 2503.08120) = mean over masked tokens of `-log p(x0) + alpha * L_score`, where L_score is
the score entropy of absorbing discrete diffusion (SEDD, arXiv 2310.16834) with s_y = p_y / m, m the mask ratio,
a = (1 - m) / m:

    L_score = w_t * ( sum_{y code} s_y - a log s_x0 + a (log a - 1) )                               the definition
            = w_t * ( a * nll + 1 + a log(1 - m) + (mass - 1) / m ),   mass = sum_{y code} p_y      the closed form

The definition is `reference_d3diff_loss`; the op uses the closed form, which is a `linear_loss` with row_weight
(1 + alpha w a) / n and mass_weight alpha w / (m n). Where softmax and sum run over the same columns
(`score_columns="code"`) the mass is 1 and its term vanishes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from unif2ace.errors import UserError
from unif2ace.ops import _registry
from unif2ace.ops._checks import describe, dtype_name

IGNORE = -100
# Logits per chunk: 2 MiB of float32 measured best on a 2 MiB L2 cache: few enough to stay there between the passes,
# rows enough for an efficient GEMM.
CHUNK_ELEMENTS = 1 << 19
SCORE_WEIGHTS = ("sigma", "none", "discrete")
SCORE_COLUMNS = ("code", "all")


class D3DiffLoss(NamedTuple):
    """total = mask_nll + alpha * score is differentiable; the other fields are detached, for reports."""

    total: Tensor  # scalar
    mask_nll: Tensor  # scalar, mean over the masked tokens
    score: Tensor  # scalar, mean of L_score with its constant kappa
    nll: Tensor  # [R], 0 where the target is ignored


# ----------------------------------------------------------------------------------------------------------- reference


def reference_linear_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_weight: Tensor,
    columns: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition of `linear_loss`, with all logits in memory."""
    start, end = columns or (0, weight.shape[0])
    logits = F.linear(hidden, weight[start:end], None if bias is None else bias[start:end])
    valid = targets != IGNORE
    log_p = F.log_softmax(logits.to(_loss_dtype(hidden)), dim=1)
    nll = -log_p.gather(1, (targets.long() - start).masked_fill(~valid, 0)[:, None])[:, 0]
    nll = torch.where(valid, nll, 0.0)
    return (row_weight.to(nll.dtype) * nll).sum(), nll.detach()


def reference_d3diff_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    mask_ratio: Tensor,
    num_image_tokens: int,
    alpha: float,
    score_weight: str,
    code_columns: tuple[int, int],
    score_columns: str,
    discrete_steps: int,
) -> D3DiffLoss:
    """The definition of `d3diff_loss`: the score entropy as a sum over every code."""
    start, end = code_columns if score_columns == "code" else (0, weight.shape[0])
    logits = F.linear(hidden, weight[start:end], None if bias is None else bias[start:end])
    log_p = F.log_softmax(logits.to(_loss_dtype(hidden)), dim=1)
    valid = targets != IGNORE
    nll = -log_p.gather(1, (targets.long() - start).masked_fill(~valid, 0)[:, None])[:, 0]

    m, a, time_weight = _time(mask_ratio.to(nll.dtype), num_image_tokens, score_weight, discrete_steps)
    log_s = log_p[:, code_columns[0] - start : code_columns[1] - start] - m.log()[:, None]
    log_s_x0 = -nll - m.log()
    score = time_weight * (log_s.exp().sum(dim=1) - a * log_s_x0 + a * (a.log() - 1.0))

    count = valid.sum().clamp(min=1)
    nll, score = torch.where(valid, nll, 0.0), torch.where(valid, score, 0.0)
    total = (nll + alpha * score).sum() / count
    return D3DiffLoss(total, nll.detach().sum() / count, score.detach().sum() / count, nll.detach())


def _loss_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _time(mask_ratio: Tensor, num_image_tokens: int, score_weight: str, discrete_steps: int) -> tuple[Tensor, ...]:
    """Per row: clamped mask ratio m, a = (1 - m) / m and the weight w_t of the time.

    Realised ratios are multiples of 1/N. m = 1 (all masked) is moved half a token below 1: there a = 0 and w_t of the
    cosine schedule is infinite, though their product is finite.
    """
    highest = 1.0 - 0.5 / num_image_tokens
    m = mask_ratio.clamp(min(1.0 / num_image_tokens, highest), highest)
    a = (1.0 - m) / m
    if score_weight == "sigma":  # w a = (pi / 2) sqrt(1 - m^2) / m: the rate of m = cos(pi t / 2)
        return m, a, (math.pi / 2) * ((1.0 + m) / (1.0 - m)).sqrt()
    if score_weight == "none":  # w a = (1 - m) / m
        return m, a, torch.ones_like(m)
    # w a = (m_k - m_{k-1}) / m_k, with m_{k-1} one of `discrete_steps` equal time steps nearer to the clean image
    time = (2.0 / math.pi) * m.acos()
    before = ((math.pi / 2) * (time + 1.0 / discrete_steps).clamp(max=1.0)).cos()
    return m, a, (m - before) / (1.0 - m)


def score_constant(mask_ratio: Tensor) -> Tensor:
    """kappa(m) = 1 + (1 - m) / m * log(1 - m); for small m by its series sum m^n / (n (n + 1)), as the sum cancels."""
    m = mask_ratio
    series = torch.zeros_like(m)
    for n in range(6, 0, -1):
        series = (series + 1.0 / (n * (n + 1))) * m
    return torch.where(m < 0.05, series, 1.0 + (1.0 - m) / m * torch.log1p(-m))


# -------------------------------------------------------------------------------------------- registered op, autograd


def _linear_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_weight: Tensor,
    mass_weight: Tensor | None,
    columns: list[int],
    mass_columns: list[int],
    with_grads: bool,
) -> tuple[Tensor, ...]:
    """Values and gradients, one chunk of rows at a time; see the schema below for the six results."""
    dtype, rows, (start, end) = _loss_dtype(hidden), hidden.shape[0], columns
    valid = targets != IGNORE
    # Ignored rows (a third of the image rows, most text rows) cost no GEMM on a CPU; on a GPU counting them would sync.
    index = valid.nonzero()[:, 0] if hidden.device.type == "cpu" else torch.arange(rows, device=hidden.device)
    w, b = weight[start:end], None if bias is None else bias[start:end]
    row_weight = torch.where(valid, row_weight.to(dtype), 0.0)

    nll, mass = hidden.new_zeros(rows, dtype=dtype), hidden.new_zeros(rows, dtype=dtype)
    grad_hidden = torch.zeros_like(hidden) if with_grads else hidden.new_empty(0)
    grad_weight = weight.new_zeros(weight.shape if with_grads else 0, dtype=dtype)
    grad_bias = weight.new_zeros(weight.shape[0] if with_grads else 0, dtype=dtype)
    chunk = max(1, CHUNK_ELEMENTS // (end - start))
    for part in index.split(chunk):
        h = hidden[part].masked_fill(~valid[part][:, None], 0.0)  # on a GPU: 0 times what stands there may be NaN
        column = (targets[part].long() - start).clamp_(min=0)[:, None]
        z = F.log_softmax(F.linear(h, w, b).to(dtype), dim=1)
        nll[part] = -z.gather(1, column)[:, 0]
        if not with_grads and mass_weight is None:
            continue
        p = z.exp_()
        scale = row_weight[part][:, None]
        if mass_weight is not None:
            inside = p[:, mass_columns[0] - start : mass_columns[1] - start]
            row_mass = inside.sum(dim=1, keepdim=True)
            mass[part] = row_mass[:, 0]
            pull = torch.where(valid[part], mass_weight[part].to(dtype), 0.0)[:, None]
            extra = inside * pull
            p.mul_(scale - pull * row_mass)
            inside.add_(extra)
        elif with_grads:
            p.mul_(scale)
        if with_grads:
            grad_z = p.scatter_add_(1, column, -scale)
            grad_bias[start:end].add_(grad_z.sum(dim=0))
            grad_z = grad_z.to(h.dtype)
            grad_hidden[part] = grad_z @ w
            grad_weight[start:end].add_(grad_z.t() @ h)
    nll, mass = nll.where(valid, 0.0), mass.where(valid, 0.0)
    loss = (row_weight * nll).sum()
    if mass_weight is not None:
        loss = loss + (mass_weight.to(dtype) * mass).sum()
    return loss, nll, mass, grad_hidden, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def _linear_loss_fake(hidden, weight, bias, targets, row_weight, mass_weight, columns, mass_columns, with_grads):
    dtype, rows = _loss_dtype(hidden), hidden.shape[0]
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(rows, dtype=dtype),
        hidden.new_empty(rows, dtype=dtype),
        hidden.new_empty(hidden.shape if with_grads else 0),
        weight.new_empty(weight.shape if with_grads else 0),
        weight.new_empty(weight.shape[0] if with_grads else 0),
    )


# Without gradients (`with_grads=False`) the last three results are empty. `mass` is zero without mass_weight.
_registry.define(
    "diffusion_loss",
    "linear_loss",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor row_weight, Tensor? mass_weight,"
    " int[] columns, int[] mass_columns, bool with_grads) -> (Tensor loss, Tensor nll, Tensor mass, Tensor grad_hidden,"
    " Tensor grad_weight, Tensor grad_bias)",
    _linear_loss_fake,
    _linear_loss,
)


class _LinearLoss(torch.autograd.Function):
    """The registered op has computed the gradients for a unit loss already: backward scales them."""

    @staticmethod
    def forward(
        ctx, backend, with_grads, hidden, weight, bias, targets, row_weight, mass_weight, columns, mass_columns
    ):
        loss, nll, mass, *grads = _registry.registered(backend, "linear_loss")(
            hidden, weight, bias, targets, row_weight, mass_weight, columns, mass_columns, with_grads
        )
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(nll, mass)
        return loss, nll, mass

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _nll, _mass):
        needed = ctx.needs_input_grad[2:5]
        grads = [g * grad_loss.to(g.dtype) if n else None for g, n in zip(ctx.saved_tensors, needed, strict=True)]
        return None, None, *grads, None, None, None, None, None


def _run(backend, hidden, weight, bias, targets, row_weight, mass_weight, columns, mass_columns):
    name = _registry.choose("diffusion_loss", backend, hidden.device, hidden.dtype)
    wanted = hidden.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    with_grads = torch.is_grad_enabled() and wanted
    try:
        return _LinearLoss.apply(
            name, with_grads, hidden, weight, bias, targets, row_weight, mass_weight, columns, mass_columns
        )
    except RuntimeError as error:
        raise _registry.as_user_error(error, "linear_loss") from None


# ---------------------------------------------------------------------------------------------------- public functions


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_weight: Tensor,
    *,
    columns: tuple[int, int] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross entropy of a linear head, weighted per row: loss = sum_r row_weight_r * nll_r.

    Args:
        hidden: [R, H] float. weight: [V, H], bias: [V] or None, both of hidden's dtype.
        targets: [R] int32 or int64, rows of `weight` (vocabulary ids, also with `columns`); -100 is ignored.
        row_weight: [R] float, no gradient; 1 / count for a mean.
        columns: (start, end) restricts the softmax to these rows of `weight`; targets must lie inside.

    Returns:
        loss: scalar (float32; float64 for float64 inputs), differentiable once in hidden, weight and bias.
        nll: [R] detached, 0 where ignored.

    Raises:
        UserError: shapes and dtypes that do not fit; on CPU also targets outside the columns.

    Cost: 2*R*H*V FLOPs, 6*R*H*V with gradients (computed in the same pass); on a CPU, R counts rows not ignored.
    """
    start, end = _check_linear("linear_loss", hidden, weight, bias, targets, columns, "columns")
    _check_row_values("linear_loss", "row_weight", row_weight, hidden.shape[0])
    loss, nll, _ = _run(backend, hidden, weight, bias, targets, row_weight, None, [start, end], [start, end])
    return loss, nll


def d3diff_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    mask_ratio: Tensor,
    *,
    num_image_tokens: int,
    code_columns: tuple[int, int],
    alpha: float = 0.01,
    score_weight: str = "sigma",
    score_columns: str = "code",
    discrete_steps: int = 18,
    backend: str | None = None,
) -> D3DiffLoss:
    """Mean over the masked tokens of -log p(x0) + alpha * L_score (module docstring).

    Args:
        hidden: [R, H] image rows. weight: [V, H], bias: [V] or None: the whole head.
        targets: [R] int32 or int64 vocabulary ids of the masked tokens inside `code_columns`; -100 for known tokens.
        mask_ratio: [R] float, realised ratio n / N of the row's image; clamped to [1 / N, 1 - 1 / (2 N)].
        num_image_tokens: N. code_columns: (start, end) of the image codes in the vocabulary.
        score_weight: weight w_t of the time, given as w a with a = (1 - m) / m: "sigma" (pi/2) sqrt(1 - m^2) / m,
            "none" a, "discrete" (m_k - m_{k-1}) / m_k for `discrete_steps` equal steps of the cosine schedule.
        score_columns: "code" takes the softmax over the codes, "all" over the whole vocabulary.

    Returns:
        D3DiffLoss(total, mask_nll, score, nll); without a masked token everything is 0.

    Raises:
        UserError: as `linear_loss`; also unknown `score_weight` or `score_columns`.
    """
    columns = code_columns if score_columns == "code" else None
    start, end = _check_linear("d3diff_loss", hidden, weight, bias, targets, columns, "code_columns", code_columns)
    _check_row_values("d3diff_loss", "mask_ratio", mask_ratio, hidden.shape[0])
    for name, value, known in (
        ("score_weight", score_weight, SCORE_WEIGHTS),
        ("score_columns", score_columns, SCORE_COLUMNS),
    ):
        if value not in known:
            raise UserError(f"d3diff_loss: {name} must be one of {', '.join(known)}, got {value!r}")
    if num_image_tokens < 1 or discrete_steps < 1:
        raise UserError(
            f"d3diff_loss: num_image_tokens and discrete_steps must be >= 1, got {num_image_tokens}, {discrete_steps}"
        )
    valid = targets != IGNORE
    count = valid.sum().clamp(min=1)
    ratio = torch.where(valid, mask_ratio.to(_loss_dtype(hidden)), 0.5)  # whatever stands in ignored rows, even NaN
    m, a, time_weight = _time(ratio, num_image_tokens, score_weight, discrete_steps)
    over_all = score_columns == "all"
    loss, nll, mass = _run(
        backend, hidden, weight, bias, targets, (1.0 + alpha * time_weight * a) / count,
        alpha * time_weight / (m * count) if over_all else None, [start, end], list(code_columns),
    )  # fmt: skip
    constant = score_constant(m) - 1.0 / m if over_all else score_constant(m)
    constant = torch.where(valid, time_weight * constant, 0.0).sum() / count
    score = (time_weight * (a * nll + mass / m)).sum() / count + constant
    return D3DiffLoss(loss + alpha * constant, nll.sum() / count, score, nll)


def _check_linear(op, hidden, weight, bias, targets, columns, columns_name, target_columns=None) -> tuple[int, int]:
    """Refuse what does not fit; returns the (start, end) of the softmax."""
    if hidden.dim() != 2 or not hidden.is_floating_point():
        raise UserError(f"{op}: hidden must be [R, H] floating point, got {describe(hidden)}")
    rows, width = hidden.shape
    if weight.dim() != 2 or weight.shape[1] != width or weight.shape[0] == 0 or weight.dtype != hidden.dtype:
        raise UserError(f"{op}: weight must be [V >= 1, {width}] {dtype_name(hidden.dtype)}, got {describe(weight)}")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise UserError(f"{op}: bias must be [{weight.shape[0]}] {dtype_name(weight.dtype)}, got {describe(bias)}")
    if targets.shape != (rows,) or targets.dtype not in (torch.int32, torch.int64):
        raise UserError(f"{op}: targets must be [{rows}] int32 or int64, got {describe(targets)}")
    whole = (0, weight.shape[0])
    for bounds in (columns, target_columns):
        if bounds is not None and not 0 <= bounds[0] < bounds[1] <= whole[1]:
            raise UserError(f"{op}: {columns_name} must be a range within 0 .. {whole[1]}, got {tuple(bounds)}")
    low, high = target_columns or columns or whole
    if targets.device.type == "cpu" and not torch.compiler.is_compiling():
        outside = (targets != IGNORE) & ((targets < low) | (targets >= high))
        if bool(outside.any()):
            raise UserError(f"{op}: targets must be -100 or in {low} .. {high - 1}, got {int(targets[outside][0])}")
    return columns or whole


def _check_row_values(op: str, name: str, values: Tensor, rows: int) -> None:
    if values.shape != (rows,) or not values.is_floating_point():
        raise UserError(f"{op}: {name} must be [{rows}] floating point, got {describe(values)}")
