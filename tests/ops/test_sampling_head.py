"""head_sample: the head, then sampling, without the logits in between."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops.places import place
from tests.oracle import assert_close, available_backends, backend_cases
from unif2ace.errors import UserError
from unif2ace.ops import _registry, head_sample, sample_tokens

each_backend = pytest.mark.parametrize("backend", available_backends("sampling"))
each_case = pytest.mark.parametrize(("backend", "dtype"), backend_cases("sampling"), ids=str)


@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_it_is_head_then_sample(guidance: float, monkeypatch: pytest.MonkeyPatch):
    """Folding guidance before the head moves logits by rounding only: in float64 the tokens are the same."""
    monkeypatch.setattr("unif2ace.ops.sampling.HEAD_CHUNK_ELEMENTS", 500)  # several chunks
    hidden, uncond = torch.randn(2, 37, 16, dtype=torch.float64)
    weight, bias, where = torch.randn(41, 16, dtype=torch.float64), torch.randn(41, dtype=torch.float64), place(37)
    codes, confidence = head_sample(hidden, weight, bias, **where, uncond_hidden=uncond, guidance=guidance)
    expected = sample_tokens(
        hidden @ weight.T + bias, **where, uncond_logits=uncond @ weight.T + bias, guidance=guidance
    )
    assert torch.equal(codes, expected[0])
    torch.testing.assert_close(confidence, expected[1])


@each_case
def test_confidence_matches_its_code(backend: str, dtype: torch.dtype):
    hidden, weight = torch.randn(33, 24).to(dtype), torch.randn(51, 24).to(dtype)
    codes, confidence = head_sample(hidden, weight, None, **place(33), backend=backend)
    truth = (hidden.double() @ weight.double().T).log_softmax(1).gather(1, codes.long()[:, None])[:, 0]
    plain = (hidden @ weight.T).float().log_softmax(1).gather(1, codes.long()[:, None])[:, 0]
    assert_close("log_confidence", confidence, truth, plain)


@each_backend
def test_no_rows(backend: str):
    codes, confidence = head_sample(torch.zeros(0, 4), torch.zeros(5, 4), None, **place(0), backend=backend)
    assert codes.shape == confidence.shape == (0,)


@each_backend
def test_opcheck(backend: str):
    hidden, weight, where = torch.randn(39, 8), torch.randn(11, 8), place(39).values()
    torch.library.opcheck(
        _registry.registered(backend, "head_sample"), (hidden, weight, None, *where, 1.0, None, 0.0, 0)
    )


@each_backend
def test_compiles_into_one_graph(backend: str):
    hidden, weight, where = torch.randn(13, 8), torch.randn(11, 8), place(13)

    def step(hidden: Tensor) -> tuple[Tensor, ...]:
        return head_sample(2 * hidden, weight, None, **where, backend=backend)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(hidden), step(hidden), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.zeros(3)}, r"hidden must be \[R, H >= 1\] floating point, got \[3\] float32"),
        ({"weight": torch.zeros(7, 5)}, r"weight must be \[V >= 1, 4\] float32, got \[7, 5\] float32"),
        ({"weight": torch.zeros(7, 4).half()}, r"weight must be .*, got \[7, 4\] float16"),
        ({"bias": torch.zeros(6)}, r"bias must be \[7\] float32, got \[6\] float32"),
        ({"guidance": 1.0}, "guidance 1.0 needs uncond_hidden, got None"),
    ],
)
def test_bad_arguments_are_refused(changes: dict[str, object], message: str):
    arguments = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(7, 4), "bias": None, **place(3), **changes}
    with pytest.raises(UserError, match=f"^head_sample: {message}"):
        head_sample(**arguments)
