"""What codec and encoders share: PyTorch's values and, in any company and for any number of threads, the same bits."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.bits import assert_same_in_any_company
from unif2ace.codec.invariant import Conv2d, GroupNorm, gelu, in_parts

# (in, out, kernel, side): of avatars-tiny (pixels, a block, a halving, codes) and small odd ones.
CONVOLUTIONS = [(12, 32, 3, 32), (64, 64, 3, 16), (512, 128, 1, 8), (5, 128, 3, 8), (3, 7, 3, 5), (1, 1, 1, 1)]


def maps(channels: int, side: int, count: int = 9) -> torch.Tensor:
    return torch.randn(count, channels, side, side).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("channels", "out", "kernel", "side"), CONVOLUTIONS)
@torch.no_grad()
def test_convolution(channels, out, kernel, side):
    torch.manual_seed(0)
    convolution, x = Conv2d(channels, out, kernel, padding=kernel // 2), maps(channels, side, 17)
    double = F.conv2d(x.double(), convolution.weight.double(), convolution.bias.double(), padding=kernel // 2)
    torch.testing.assert_close(convolution(x), double.float(), rtol=1e-5, atol=1e-5)
    assert_same_in_any_company(lambda some: in_parts(convolution, some), x)


@pytest.mark.parametrize("side", [4, 31, 32, 64])
@torch.no_grad()
def test_gelu_and_group_norm(side):
    torch.manual_seed(0)
    x, norm = maps(16, side), GroupNorm(8, 16)
    torch.testing.assert_close(gelu(x), F.gelu(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(norm(x), F.group_norm(x.double(), 8).float(), rtol=1e-5, atol=1e-5)
    assert_same_in_any_company(lambda some: in_parts(gelu, some), x)
    assert_same_in_any_company(lambda some: in_parts(norm, some), x)


def test_with_gradients_all_is_pytorch_s():
    torch.manual_seed(0)
    x = maps(16, 32).requires_grad_()
    for ours, theirs in ((Conv2d(16, 8, 3), nn.Conv2d(16, 8, 3)), (GroupNorm(8, 16), nn.GroupNorm(8, 16))):
        theirs.load_state_dict(ours.state_dict())
        assert torch.equal(ours(x), theirs(x))
        ours(x).square().sum().backward()
        assert ours.weight.grad.abs().max() > 0
    assert torch.equal(gelu(x), F.gelu(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@torch.no_grad()
def test_other_dtypes(dtype):
    x, convolution = maps(16, 8).to(dtype), Conv2d(16, 8, 3).to(dtype)
    assert torch.equal(convolution(x), F.conv2d(x, convolution.weight, convolution.bias))


def test_parts_are_small_and_in_order():
    sizes, x = [], torch.randn(19, 3, 4, 5)
    assert torch.equal(in_parts(lambda part: sizes.append(len(part)) or part + 1, x), x + 1)
    assert sizes == [8, 8, 3]


@pytest.mark.parametrize("shape", [(1, 3, 4, 5), (2, 3, 4, 5), (1, 1, 4, 5), (1, 3, 1, 1), (2, 3, 1, 1)])
def test_parts_are_channels_last_whatever_comes(shape):
    x = torch.randn(shape)
    expected = torch.empty(shape).to(memory_format=torch.channels_last).stride()
    for some in (x, x[0][None].expand(shape), x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)):
        assert torch.equal(in_parts(lambda part: part, some), some)
        assert in_parts(lambda part: part, some).stride() == expected
