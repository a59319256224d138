"""`diffusion_loss`: linear head and loss without the logits in memory.

Cost model: 2*R*H*V FLOPs for values, 6*R*H*V with gradients, which are computed in the same pass. Bytes: hidden,
weight and bias read, with gradients all of them written once more. Extra memory is one chunk of logits, where the
definition keeps all R*V of them, several times over.

"torch: all logits" is the definition as the formula has it; "reference" goes through the logits in chunks, in plain
PyTorch. The column of peak memory holds the gradients too, which every variant returns; a note below the table gives
their size, which has to be taken off both sides of a ratio.

Goals on two CPU cores, shape "laptop-2048" (R = 2048, H = 512, V = 8192), D3Diff forward + backward, native: no slower
than either, and at most 1/8 of the extra memory of all logits.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import peers, shapes
from benchmarks.problems import Problem, each_direction, each_dtype, each_size
from unif2ace.ops import d3diff_loss, linear_loss
from unif2ace.ops.diffusion_loss import reference_d3diff_loss, reference_linear_loss

IMAGE_TOKENS = 256
ALPHA = 0.01


def make_inputs(shape: shapes.LossShape, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Rows of unit variance and a head whose logits have a standard deviation of 2, as a trained model's do."""
    generator = torch.Generator().manual_seed(0)

    def gaussian(scale: float, *size: int) -> Tensor:
        return (scale * torch.randn(size, generator=generator)).to(device, dtype)

    return {
        "hidden": gaussian(1.0, shape.rows, shape.hidden),
        "weight": gaussian(2.0 * shape.hidden**-0.5, shape.columns, shape.hidden),
        "bias": gaussian(0.1, shape.columns),
    }


def make_targets(shape: shapes.LossShape, first: int, device: str) -> Tensor:
    """[R] ids from `first` on. No row is ignored: those would be free on a CPU, and the FLOPs those of the shape."""
    return torch.randint(first, shape.columns, (shape.rows,), generator=torch.Generator().manual_seed(1)).to(device)


def d3diff(shape: shapes.LossShape, device: str, backends: list[str]) -> dict[str, Callable[..., tuple[Tensor]]]:
    """D3Diff over the image codes: every back end, and the definition with all logits."""
    codes = (shape.columns - shape.code_columns, shape.columns)
    targets = make_targets(shape, codes[0], device)
    images = -(-shape.rows // IMAGE_TOKENS)  # each has a mask ratio of its own
    ratio = torch.rand(images, generator=torch.Generator().manual_seed(2)).to(device)
    ratio = ratio.repeat_interleave(IMAGE_TOKENS)[: shape.rows]

    def on(backend: str) -> Callable[..., tuple[Tensor]]:
        return lambda hidden, weight, bias: (
            d3diff_loss(
                hidden, weight, bias, targets, ratio,
                num_image_tokens=IMAGE_TOKENS, code_columns=codes, alpha=ALPHA, backend=backend,
            ).total,
        )  # fmt: skip

    def definition(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
        constants = (IMAGE_TOKENS, ALPHA, "sigma", codes, "code", 18)
        return (reference_d3diff_loss(hidden, weight, bias, targets, ratio, *constants).total,)

    functions = {backend: on(backend) for backend in backends} | {"torch: all logits": definition}
    return functions | peers.compiled(definition, device)


def next_token(shape: shapes.LossShape, device: str, backends: list[str]) -> dict[str, Callable[..., tuple[Tensor]]]:
    """Mean cross entropy over the whole vocabulary: every back end, the definition, and peers."""
    targets = make_targets(shape, 0, device)
    row_weight = torch.full((shape.rows,), 1.0 / shape.rows, device=device)

    def on(backend: str) -> Callable[..., tuple[Tensor]]:
        return lambda hidden, weight, bias: (
            linear_loss(hidden, weight, bias, targets, row_weight, backend=backend)[0],
        )

    def definition(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
        return (reference_linear_loss(hidden, weight, bias, targets, row_weight)[0],)

    functions = {backend: on(backend) for backend in backends} | {"torch: all logits": definition}
    return functions | peers.compiled(definition, device) | peers.present("diffusion_loss", device, targets)


@each_dtype
@each_direction
@pytest.mark.parametrize("loss", [d3diff, next_token], ids=["d3diff_loss", "linear_loss"])
@each_size(shapes.LOSS)
def bench_diffusion_loss(
    shape: str, loss: Callable, direction: str, dtype: torch.dtype, device: str, backends: Callable, compare: Callable
) -> None:
    size = shapes.LOSS[shape]
    inputs = make_inputs(size, dtype, device)
    problem = Problem(inputs, loss(size, device, backends("diffusion_loss", dtype)))
    passes = 1 if direction == "forward" else 3
    columns = size.code_columns if loss is d3diff else size.columns
    moved = sum(x.nbytes for x in inputs.values())
    share = f"{moved / 2**20:.1f} MiB of it are the gradients ({shape}, {str(dtype).removeprefix('torch.')})"
    notes = {} if direction == "forward" else {"peak mem": share}
    compare(
        problem.variants(direction),
        baseline="reference",
        op="d3diff_loss" if loss is d3diff else "linear_loss",
        shape=shape,
        case=direction,
        dtype=dtype,
        flops=passes * 2 * size.rows * size.hidden * columns,
        bytes=moved if direction == "forward" else 2 * moved,
        gate=problem.gate(direction),
        notes=notes | peers.absent("diffusion_loss", device),
    )
