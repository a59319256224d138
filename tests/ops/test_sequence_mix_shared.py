"""mix_sequences with `feature_starts`: sequences read features that others read too."""

from __future__ import annotations

import pytest
import torch

from benchmarks.shapes import MixShape
from tests.bits import needs_native
from tests.ops.mixes import Tensors, problem, run_mix
from tests.oracle import assert_matches_reference, available_backends, backend_cases, noncontiguous
from unif2ace.errors import UserError
from unif2ace.ops import mix_sequences

BACKENDS = available_backends("sequence_mix")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_case = pytest.mark.parametrize(("backend", "dtype"), backend_cases("sequence_mix"), ids=str)

SHARED = {  # lengths, rows of the features, where each sequence begins in them
    "one for all": ((3, 3, 3), 3, [0, 0, 0]),
    "overlapping": ((5, 0, 2), 9, [2, 9, 6]),
    "no rows": ((0, 0), 0, [0, 0]),
}
each_sharing = pytest.mark.parametrize(("lengths", "rows", "starts"), SHARED.values(), ids=SHARED.keys())


@each_sharing
@each_case
def test_shared_features(backend: str, dtype: torch.dtype, lengths: tuple[int, ...], rows: int, starts: list[int]):
    """Bits and gradients are those of features gathered for every row before."""
    tensors, offsets = problem(MixShape(lengths, 37, 2), spare=2 if rows else 0)
    index = torch.cat([*(torch.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)), offsets.new_zeros(2)])
    tensors |= {name: torch.randn(rows, 37) for name in ("s0", "s1")}
    starts = torch.tensor(starts)

    def run(backend: str, **tensors: torch.Tensor) -> tuple[torch.Tensor]:
        return (run_mix(tensors, offsets, backend, feature_starts=starts),)

    assert_matches_reference(run, tensors, dtype, backend)
    own = tensors | {name: tensors[name][index[: len(tensors["x"])]] for name in ("s0", "s1")}
    assert torch.equal(*run(backend, **tensors), run_mix(own, offsets, backend))


@each_backend
def test_shared_features_of_any_layout(backend: str):
    tensors, offsets = problem(MixShape((4, 3), 12, 2))
    tensors |= {name: noncontiguous(torch.randn(5, 12)) for name in ("s0", "s1")}
    starts = torch.tensor([1, 9, 2])[::2]
    dense = {name: x.contiguous() for name, x in tensors.items()}
    expected = run_mix(dense, offsets, "reference", feature_starts=torch.tensor([1, 2]))
    torch.testing.assert_close(run_mix(tensors, offsets, backend, feature_starts=starts), expected)


@needs_native
@pytest.mark.parametrize("starts", [[-1, 0], [0, 2], [5, 0], [0, -(2**31)], [2**31 - 1, 0]])
def test_bad_feature_starts_are_refused(starts: list[int]):
    tensors, offsets = problem(MixShape((2, 3), 4, 1))
    tensors["s0"] = torch.randn(4, 4)
    with pytest.raises(UserError, match="mix_sequences: feature_starts and lengths must stay within 4 rows"):
        run_mix(tensors, offsets, "native", feature_starts=torch.tensor(starts))


@pytest.mark.parametrize("starts", [[-1, 0], [0, 2], [5, 0], [0, -(2**31)], [2**31 - 1, 0]])
@pytest.mark.parametrize("offsets", [[0, 2, 5], [0, -(2**31), 2**31 - 1]])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "native"])
def test_bad_feature_starts_harm_nobody_where_values_are_unknown(backend: str, starts: list[int], offsets: list[int]):
    tensors, _ = problem(MixShape((2, 3), 4, 1))
    tensors["s0"] = torch.randn(6, 4)[1:5]
    result = run_mix(tensors, torch.tensor(offsets), backend, feature_starts=torch.tensor(starts))
    assert result.isfinite().all()


@pytest.mark.parametrize("gradients", [False, True])
@each_backend
def test_shared_features_compile_into_one_graph(backend: str, gradients: bool):
    tensors, offsets = problem(MixShape((4, 4), 5, 1))
    tensors["s0"] = torch.randn(4, 5).requires_grad_(gradients)

    def run(tensors: Tensors) -> torch.Tensor:
        return run_mix(tensors, offsets, backend, feature_starts=torch.zeros(2, dtype=torch.int32))

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tensors), run(tensors))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feature_starts": torch.zeros(2)}, r"feature_starts must be \[2\] integer, got \[2\] float32"),
        ({"feature_starts": torch.zeros(3).int()}, r"feature_starts must be \[2\] integer, got \[3\] int32"),
        (
            {"feature_starts": torch.zeros(2).int(), "features": [torch.zeros(0, 4)]},
            r"features\[0\] must be \[F, 4\] float32, with the same F > 0 for every feature, got \[0, 4\] float32",
        ),
        (
            {
                "feature_starts": torch.zeros(2).int(),
                "features": [torch.zeros(3, 4), torch.zeros(2, 4)],
                "coefficients": torch.zeros(2, 2),
            },
            r"features\[1\] must be \[F, 4\] float32, with the same F .*, got \[2, 4\] float32",
        ),
    ],
)
def test_bad_arguments_are_refused(changes: dict[str, object], message: str):
    tensors, offsets = problem(MixShape((2, 3), 4, 1))
    arguments = {"features": [tensors.pop("s0")], "row_offsets": offsets, **tensors, **changes}
    with pytest.raises(UserError, match=f"mix_sequences: {message}"):
        mix_sequences(**arguments)
