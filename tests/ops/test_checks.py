"""Index arguments travel as int32: a number that int32 cannot hold is refused, and does not wrap into a valid one.
Tensors of two devices are refused by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from unif2ace.errors import UserError
from unif2ace.ops import expert_mlp, grouped_gemm, head_sample, mix_sequences, remask, route, sample_tokens

WIDE = torch.tensor([0, 2**32 + 1])


def test_wide_integers_are_refused():
    x, plan = torch.zeros(2, 4), route(torch.zeros(2, 4), 1)
    with pytest.raises(UserError, match="route: token_group must fit into int32, got 4294967297"):
        route(x, 1, token_group=WIDE, group_bounds=(0, 2, 4))
    with pytest.raises(UserError, match="mix_sequences: row_offsets must fit into int32, got 4294967297"):
        mix_sequences(x, torch.ones(1), [], torch.zeros(1, 0), WIDE)
    with pytest.raises(UserError, match="grouped_gemm: offsets must fit into int32"):
        grouped_gemm(x, torch.zeros(1, 3, 4), WIDE)
    with pytest.raises(UserError, match="grouped_gemm: gather must fit into int32"):
        grouped_gemm(x, torch.zeros(1, 3, 4), torch.tensor([0, 2]), gather=WIDE)
    with pytest.raises(UserError, match=r"expert_mlp: plan\.order must fit into int32"):
        expert_mlp(x, plan._replace(order=WIDE), torch.zeros(4, 3, 4), torch.zeros(4, 4, 3))


def test_int64_indices_that_fit_are_taken():
    x = torch.ones(2, 4)
    found = mix_sequences(x, torch.full((1,), 3.0), [], torch.zeros(1, 0), torch.tensor([0, 2]))
    assert torch.equal(found, 3 * x)


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        (route, {"logits": (2, 4), "token_group": (2,), "selection_bias": (4,)}),
        (sample_tokens, {"logits": (2, 4), "seeds": (2,), "positions": (2,), "steps": (2,), "uncond_logits": (2, 4)}),
        (
            head_sample,
            {"hidden": (2, 4), "weight": (3, 4), "bias": (3,), "seeds": (2,), "positions": (2,), "steps": (2,)},
        ),
        (
            remask,
            {"log_confidence": (2,), "row_offsets": (2,), "keep_unknown": (1,), "seeds": (1,), "positions": (2,)}
            | {"steps": (1,), "tau": (1,)},
        ),
    ],
)
def test_tensors_of_two_devices_are_refused(op: Callable, arguments: dict[str, tuple[int, ...]]):
    whole = {"token_group", "seeds", "positions", "steps", "row_offsets", "keep_unknown"}
    tensors = {
        name: torch.zeros(shape, dtype=torch.int64 if name in whole else torch.float32)
        for name, shape in arguments.items()
    }
    options = {"top_k": 1} if op is route else {}
    for name in list(arguments)[1:]:
        with pytest.raises(UserError, match=rf"^{op.__name__}: all tensors must be on \S+, but {name} is on meta$"):
            op(**tensors | {name: tensors[name].to("meta")}, **options)
