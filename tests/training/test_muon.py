"""The optimiser: what it orthogonalises, what it leaves to AdamW, and that the AdamW half is AdamW."""

import pytest
import torch
from torch import nn

from unif2ace.training.muon import MuonAdamW, hidden_matrices, orthogonalise


@pytest.mark.parametrize("shape", [(40, 64), (64, 40), (3, 40, 64)])
def test_singular_values_become_alike(shape):
    torch.manual_seed(0)
    found = torch.linalg.svdvals(orthogonalise(torch.randn(*shape)))
    assert found.min() > 0.6
    assert found.max() < 1.3


def test_zero_stays_zero_and_stacks_are_independent():
    stack = torch.randn(3, 40, 64)
    stack[1] = 0
    found = orthogonalise(stack)
    assert not found[1].any()
    torch.testing.assert_close(found[2], orthogonalise(stack[2]))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 32)
        self.hidden = nn.Linear(32, 32)
        self.conv = nn.Conv2d(4, 32, 3)  # 32 rows, 36 columns
        self.thin = nn.Linear(32, 8)
        self.experts = nn.Parameter(torch.randn(4, 32, 32))
        self.expert_bias = nn.Parameter(torch.randn(64, 32))
        self.head = nn.Linear(32, 64)


def test_only_hidden_matrices_are_chosen():
    net = Net()
    matrices, stacks = hidden_matrices(net)
    assert {id(p) for p in matrices} == {id(net.hidden.weight), id(net.conv.weight)}
    assert [id(p) for p in stacks] == [id(net.experts)]
    held = [p for group in MuonAdamW(net).param_groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held}) == len(list(net.parameters()))


def test_the_other_half_is_adam():
    torch.manual_seed(0)
    ours, theirs = nn.Linear(8, 8), nn.Linear(8, 8)
    theirs.load_state_dict(ours.state_dict())
    mine = MuonAdamW(ours, lr=1e-2)
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0)
    for _ in range(5):
        x = torch.randn(4, 8)
        for layer, optimizer in ((ours, mine), (theirs, reference)):
            optimizer.zero_grad()
            layer(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight)


def test_a_matrix_step_has_the_size_of_an_adamw_step():
    torch.manual_seed(0)
    layer = nn.Linear(64, 128, bias=False)
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.randn_like(layer.weight)
    MuonAdamW(layer, lr=1e-3).step()
    change = (layer.weight.detach() - before).square().mean().sqrt()
    assert change == pytest.approx(0.2e-3, rel=0.3)
