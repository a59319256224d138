"""The activations of `experts` and their derivatives, elementwise on float32 tensors.

    gelu_tanh   p s(2 sqrt(2/pi) (p + 0.044715 p^3))     since (1 + tanh u) / 2 = s(2u), s the logistic function
    gelu        p Phi(p), Phi the normal distribution function
    silu        p s(p)
    relu2       max(p, 0)^2
    swiglu      silu(p) u                                gated: p is the gate, u the up half of the pre-activation
    geglu       gelu(p) u

`ACTIVATION` is a name of `unif2ace.ops.experts.ACTIVATIONS`, or "none" for a plain product. Functions without a gate
ignore `up`; callers hand them the pre-activation twice. About one exponential and one division per element: for a tile
of 128 x 256 over a depth of 2048 that is under 1 % of the instructions.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(pre, up, ACTIVATION: tl.constexpr):
    """act(pre), gated act(pre) * up; "none" gives pre."""
    value = pre
    if ACTIVATION != "none":
        value = _curve(pre, ACTIVATION)[0]
    if ACTIVATION == "swiglu" or ACTIVATION == "geglu":
        value = value * up
    return value


@triton.jit
def activation_gradient(pre, up, grad, ACTIVATION: tl.constexpr):
    """(act, gradient of pre, gradient of up) for the gradient `grad` of act; without a gate the third is `grad`."""
    value, slope = _curve(pre, ACTIVATION)
    to_pre, to_up = grad * slope, grad
    if ACTIVATION == "swiglu" or ACTIVATION == "geglu":
        to_pre, to_up = to_pre * up, grad * value
        value = value * up
    return value, to_pre, to_up


@triton.jit
def _curve(x, ACTIVATION: tl.constexpr):
    """f(x) and f'(x), f acting on the pre-activation or its gate; the compiler drops what nobody uses."""
    if ACTIVATION == "relu2":
        positive = tl.where(x < 0.0, 0.0, x)  # NaN stays NaN
        value, slope = positive * positive, 2.0 * positive
    elif ACTIVATION == "gelu" or ACTIVATION == "geglu":
        phi = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        value, slope = x * phi, phi + x * (0.3989422804014327 * tl.exp(-0.5 * x * x))
    elif ACTIVATION == "gelu_tanh":
        square = x * x
        s, ds = _logistic(x * (1.5957691216057308 + 0.07135481627260025 * square))  # 2 sqrt(2/pi) (1, 0.044715)
        value, slope = x * s, s + x * ds * (1.5957691216057308 + 0.21406444881780076 * square)
    else:
        s, ds = _logistic(x)
        value, slope = x * s, s + x * ds
    return value, slope


@triton.jit
def _logistic(x):
    """s(x) and s'(x) = s (1 - s) = e / (1 + e)^2 with e = exp(-|x|): no overflow and no cancellation on either side."""
    e = tl.exp(-tl.abs(x))
    r = 1.0 / (1.0 + e)
    return tl.where(x < 0.0, e * r, r), e * r * r


@triton.jit
def columns_of(x, part: tl.constexpr, PARTS: tl.constexpr):
    """Part `part` of the columns of a tile. Halving by reshape and split leaves every element in its thread.

    Epilogues take an accumulator some columns at a time: addresses and intermediate values of a whole tile would not
    fit into the registers beside it.
    """
    if PARTS > 1:
        low, high = x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()
        if part < PARTS // 2:
            x = columns_of(low, part, PARTS // 2)
        else:
            x = columns_of(high, part - PARTS // 2, PARTS // 2)
    return x
