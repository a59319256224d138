"""Sequence-level expert mixing: every row of a sequence becomes the same linear mix, in one pass over memory.

For the rows r of sequence b (row_offsets[b] <= r < row_offsets[b+1]), scalars a_b, c_bj and s:

    y_r = residual_r + s * (a_b x_r + sum_j c_bj S_j,r)

Sequences may share features: given `feature_starts`, row r of sequence b reads of every S_j not row r but row
feature_starts[b] + r - row_offsets[b].

That is the whole sequence-level mixture of experts: copy, zero, noise, CLIP and face experts are all either x or 0 or
`w x + (1 - w) S`, so their gated sum collects into one factor of x and one of each feature S_j. Sums run in float32, in
the order x, S_0, S_1, .., and are rounded once. A row in no sequence (beyond the last offset) gets its residual, or 0.

Backward, with g = dL/dy:  dx = s a_b g,  dS_j = s c_bj g,  da_b = s sum <x_r, g_r>,  dc_bj = s sum <S_j,r, g_r>,
ds = sum <a_b x_r + sum_j c_bj S_j,r, g_r>, sums over the rows of b in a fixed order;  dresidual = g.

Cost: (J + 3) R H elements over memory forward; 2 (J + 1) R H FLOPs. Bound by memory: written as separate operations it
moves about three times as much, which is what a fused kernel saves. Features that sequences share come from memory once
and then from a cache: 3 R H elements. (Gradients want each row's own: with them, shared features are gathered first.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from unif2ace.errors import UserError
from unif2ace.ops import _registry
from unif2ace.ops._checks import as_int32, describe, dtype_name, is_integer


def mix_sequences(
    x: Tensor,
    scale: Tensor,
    features: Sequence[Tensor],
    coefficients: Tensor,
    row_offsets: Tensor,
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
    *,
    feature_starts: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Mix the rows of B packed sequences with J feature streams: `residual + s * (a x + sum_j c_j S_j)`.

    Args:
        x: [R, H] floating point.
        scale: [B] floating point, the factor a of x.
        features: J tensors [R, H], dtype of x, aligned with the rows of x; with `feature_starts` [F, H], any number F.
        coefficients: [B, J] floating point.
        row_offsets: [B + 1] integer, non-decreasing from 0: sequence b owns rows row_offsets[b] up to row_offsets[b+1].
        residual: [R, H] in the dtype of x, or None for 0.
        layer_scale: the scalar s, a tensor of one element, or None for 1.
        feature_starts: [B] integer, the row of every feature where sequence b begins. Sequences may overlap there.
        backend: see `unif2ace.ops.use_backend`.

    Returns:
        [R, H] in the dtype of x. Differentiable in everything that is floating point.

    Raises:
        UserError: wrong shapes or dtypes, or a back end that cannot run the call.

    Cost: x, features, residual and the result once over memory.
    """
    features = list(features)
    _check_mix(x, scale, features, coefficients, row_offsets, residual, layer_scale, feature_starts)
    row_offsets = as_int32("mix_sequences", "row_offsets", row_offsets)
    if feature_starts is not None:
        feature_starts = as_int32("mix_sequences", "feature_starts", feature_starts)
    name = _registry.choose("sequence_mix", backend, x.device, x.dtype)
    if name == "reference" and not torch.compiler.is_compiling():
        return reference_mix_sequences(
            x, scale, features, coefficients, row_offsets, residual, layer_scale, feature_starts
        )
    try:
        if not _registry.needs_grad(x, scale, *features, coefficients, residual, layer_scale):
            mix = _registry.registered(name, "mix_sequences")
            return mix(x, scale, features, coefficients, row_offsets, residual, layer_scale, feature_starts)
        features = _aligned(features, feature_starts, row_offsets, x.shape[0])
        return _MixSequences.apply(name, x, scale, coefficients, row_offsets, residual, layer_scale, *features)
    except RuntimeError as error:
        raise _registry.as_user_error(error, "mix_sequences") from None


def reference_mix_sequences(
    x: Tensor,
    scale: Tensor,
    features: Sequence[Tensor],
    coefficients: Tensor,
    row_offsets: Tensor,
    residual: Tensor | None,
    layer_scale: Tensor | None,
    feature_starts: Tensor | None = None,
) -> Tensor:
    """The definition, differentiable."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    features = _aligned(features, feature_starts, row_offsets, x.shape[0])
    _, sequence = _sequence_of_rows(row_offsets, x.shape[0])
    factors = torch.cat([scale[:, None].to(dtype), coefficients.to(dtype)], dim=1)
    factors = F.pad(factors, (0, 0, 0, 1))[sequence]  # [R, 1 + J]; rows in no sequence read the zero row
    total = x.to(dtype) * factors[:, :1]
    for j, feature in enumerate(features, start=1):
        total = torch.addcmul(total, factors[:, j : j + 1], feature.to(dtype))
    if layer_scale is not None:
        total = total * layer_scale.to(dtype).reshape(())
    if residual is not None:
        total = residual.to(dtype) + total
    return total.to(x.dtype)


def _sequence_of_rows(row_offsets: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Rows 0 .. count - 1 and the sequence of each, B for those in none."""
    rows = torch.arange(count, device=row_offsets.device, dtype=row_offsets.dtype)
    return rows, torch.searchsorted(row_offsets[1:].contiguous(), rows, right=True)


def _aligned(
    features: Sequence[Tensor], feature_starts: Tensor | None, row_offsets: Tensor, count: int
) -> Sequence[Tensor]:
    """The features with `count` rows, one for each of x. Starts that lead outside of them are moved inside."""
    if feature_starts is None or not features:
        return features
    rows, sequence = _sequence_of_rows(row_offsets, count)
    shift = F.pad(feature_starts.long() - row_offsets[:-1], (0, 1))[sequence]
    index = (rows + shift).clamp(0, features[0].shape[0] - 1)
    return [feature.index_select(0, index) for feature in features]


# ---------------------------------------------------------------------------------------------- registration, autograd


def _mix_fake(x, scale, features, coefficients, row_offsets, residual, layer_scale, feature_starts):
    return x.new_empty(x.shape)


def _mix_backward_fake(grad, x, scale, features, coefficients, row_offsets, layer_scale):
    return (
        x.new_empty(x.shape),
        scale.new_empty(scale.shape),
        x.new_empty(len(features), *x.shape),
        coefficients.new_empty(coefficients.shape),
        x.new_empty(0) if layer_scale is None else layer_scale.new_empty(layer_scale.shape),
    )


def _mix_backward_reference(grad, x, scale, features, coefficients, row_offsets, layer_scale):
    count = len(features)

    def forward(x, scale, coefficients, *rest):
        return reference_mix_sequences(
            x, scale, rest[:count], coefficients, row_offsets, None, rest[count] if len(rest) > count else None
        )

    inputs = [x, scale, coefficients, *features] + ([] if layer_scale is None else [layer_scale])
    grads = [g.contiguous() for g in _registry.vjp(forward, inputs, [grad])]
    grad_features = torch.stack(grads[3 : 3 + count]) if count else x.new_empty(0, *x.shape)
    grad_layer_scale = x.new_empty(0) if layer_scale is None else grads[-1]
    return grads[0], grads[1], grad_features, grads[2], grad_layer_scale


_registry.define(
    "sequence_mix",
    "mix_sequences",
    "(Tensor x, Tensor scale, Tensor[] features, Tensor coefficients, Tensor row_offsets, Tensor? residual,"
    " Tensor? layer_scale, Tensor? feature_starts) -> Tensor",
    _mix_fake,
    lambda *arguments: reference_mix_sequences(*arguments).contiguous(),
)
_registry.define(
    "sequence_mix",
    "mix_sequences_backward",
    "(Tensor grad, Tensor x, Tensor scale, Tensor[] features, Tensor coefficients, Tensor row_offsets,"
    " Tensor? layer_scale) -> (Tensor grad_x, Tensor grad_scale, Tensor grad_features, Tensor grad_coefficients,"
    " Tensor grad_layer_scale)",
    _mix_backward_fake,
    _mix_backward_reference,
)


class _MixSequences(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, x, scale, coefficients, row_offsets, residual, layer_scale, *features):
        ctx.save_for_backward(x, scale, coefficients, row_offsets, layer_scale, *features)
        ctx.backend, ctx.has_residual = backend, residual is not None
        mix = _registry.registered(backend, "mix_sequences")
        return mix(x, scale, list(features), coefficients, row_offsets, residual, layer_scale, None)

    @staticmethod
    def backward(ctx, grad):
        x, scale, coefficients, row_offsets, layer_scale, *features = ctx.saved_tensors
        grad_x, grad_scale, grad_features, grad_coefficients, grad_layer_scale = _registry.registered(
            ctx.backend, "mix_sequences_backward"
        )(grad, x, scale, list(features), coefficients, row_offsets, layer_scale)
        return (
            None,
            grad_x,
            grad_scale,
            grad_coefficients,
            None,
            grad if ctx.has_residual else None,
            None if layer_scale is None else grad_layer_scale,
            *grad_features.unbind(0),
        )


# ------------------------------------------------------------------------------------------------------------- checks


def _check_mix(
    x: Tensor,
    scale: Tensor,
    features: list[Tensor],
    coefficients: Tensor,
    row_offsets: Tensor,
    residual: Tensor | None,
    layer_scale: Tensor | None,
    feature_starts: Tensor | None,
) -> None:
    if x.dim() != 2 or not x.is_floating_point():
        raise UserError(f"mix_sequences: x must be [R, H] floating point, got {describe(x)}")
    if scale.dim() != 1 or not scale.is_floating_point():
        raise UserError(f"mix_sequences: scale must be [B] floating point, got {describe(scale)}")
    batch, count = scale.shape[0], len(features)
    if tuple(coefficients.shape) != (batch, count) or not coefficients.is_floating_point():
        raise UserError(
            f"mix_sequences: coefficients must be [{batch}, {count}] floating point (sequences, features), "
            f"got {describe(coefficients)}"
        )
    if tuple(row_offsets.shape) != (batch + 1,) or not is_integer(row_offsets):
        raise UserError(f"mix_sequences: row_offsets must be [{batch + 1}] integer, got {describe(row_offsets)}")
    streams = [(f"features[{j}]", feature) for j, feature in enumerate(features)]
    if feature_starts is not None:
        _check_shared(x, streams, feature_starts, batch)
        streams = []
    for name, rows in streams + ([] if residual is None else [("residual", residual)]):
        if rows.shape != x.shape or rows.dtype != x.dtype:
            raise UserError(f"mix_sequences: {name} must be like x, {describe(x)}, got {describe(rows)}")
    if layer_scale is not None and (layer_scale.numel() != 1 or not layer_scale.is_floating_point()):
        raise UserError(f"mix_sequences: layer_scale must be one floating point number, got {describe(layer_scale)}")


def _check_shared(x: Tensor, streams: list[tuple[str, Tensor]], feature_starts: Tensor, batch: int) -> None:
    if tuple(feature_starts.shape) != (batch,) or not is_integer(feature_starts):
        raise UserError(f"mix_sequences: feature_starts must be [{batch}] integer, got {describe(feature_starts)}")
    rows = streams[0][1].shape[:1] if streams else ()
    for name, feature in streams:
        if feature.shape != (*rows, x.shape[1]) or feature.dtype != x.dtype or (x.shape[0] and not feature.shape[0]):
            raise UserError(
                f"mix_sequences: {name} must be [F, {x.shape[1]}] {dtype_name(x.dtype)}, with the same F > 0 for every "
                f"feature, got {describe(feature)}"
            )
