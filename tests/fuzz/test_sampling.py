"""Fuzz of `sample_tokens`, `head_sample`, `remask`: identical tokens and masks; rows without a distribution refused."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.fuzz.strategies import (
    Source,
    assert_agrees,
    assert_refused,
    attempt,
    dtypes,
    fuzz,
    marks,
    refuse_alike,
    resized,
    sizes,
    some,
    spoil_one,
)
from unif2ace.ops import head_sample, remask, sample_tokens

pytestmark = marks("sampling")

columns_ = st.sampled_from([1, 2, 3, 7, 16, 17, 33, 63, 64, 65, 257, 1031, 2049])
temperatures = st.sampled_from([0.0, 1e-3, 0.5, 1.0, 7.0, 1e6])
index_dtypes = st.sampled_from([torch.int32, torch.int64])


def places(source: Source, rows: int) -> dict[str, Tensor]:
    """Seeds of 64 bits, positions and steps of 32, of which some are negative."""
    found = {"seeds": source.integers("seeds", -(2**63), 2**63 - 1, rows, dtype=torch.int64)}
    for name in ("positions", "steps"):
        dtype = source.draw(index_dtypes, f"dtype of {name}")
        found[name] = source.integers(name, -(2**31), 2**31 - 1, rows, dtype=dtype)
    return found


@fuzz
@given(
    rows=sizes,
    columns=columns_,
    dtype=dtypes,
    temperature=temperatures,
    guided=st.booleans(),
    special=st.booleans(),
    data=st.data(),
)
def test_sample_tokens(rows, columns, dtype, temperature, guided, special, data):
    source = Source(data)
    arguments = {"logits": source.floats("logits", rows, columns, dtype=dtype, special=special)}
    arguments |= {**places(source, rows), "temperature": temperature, "stream": source.draw(st.integers(0, 3))}
    if guided:
        arguments["uncond_logits"] = source.floats("uncond_logits", rows, columns, dtype=dtype, special=special)
        arguments["guidance"] = source.draw(st.sampled_from([0.0, 0.5, 5.0]), "guidance")
    found = attempt(lambda: sample_tokens(**arguments, backend="native"))
    wanted = attempt(lambda: sample_tokens(**arguments, backend="reference"))
    if refuse_alike(found, wanted):
        return
    assert torch.equal(found[0], wanted[0])
    logits = arguments["logits"].double()
    if guided and arguments["guidance"]:
        w = arguments["guidance"]
        logits = (1 + w) * logits - w * arguments["uncond_logits"].double()
    truth = logits.log_softmax(1).gather(1, wanted[0].long()[:, None])[:, 0]
    assert_agrees("log_confidence", found[1], wanted[1], truth, 1e-5)


@fuzz
@given(
    rows=sizes,
    hidden=some,
    columns=columns_,
    dtype=dtypes,
    temperature=st.sampled_from([0.0, 1.0]),
    guided=st.booleans(),
    biased=st.booleans(),
    special=st.booleans(),
    data=st.data(),
)
def test_head_sample(rows, hidden, columns, dtype, temperature, guided, biased, special, data):
    """Products round differently, so tokens may differ where keys nearly tie: codes in range, confidences of them."""
    source = Source(data)
    arguments = {
        "hidden": source.floats("hidden", rows, hidden, dtype=dtype, special=special),
        "weight": source.floats("weight", columns, hidden, dtype=dtype),
        "bias": source.floats("bias", columns, dtype=dtype) if biased else None,
        **places(source, rows),
        "temperature": temperature,
    }
    if guided:
        arguments["uncond_hidden"] = source.floats("uncond_hidden", rows, hidden, dtype=dtype)
        arguments["guidance"] = source.draw(st.sampled_from([0.0, 2.0]), "guidance")
    found = attempt(lambda: head_sample(**arguments, backend="native"))
    wanted = attempt(lambda: head_sample(**arguments, backend="reference"))
    if special and isinstance(found, Exception) != isinstance(wanted, Exception):
        return  # 1e18 times a weight may overflow in one order of summation only
    if refuse_alike(found, wanted):
        return
    codes, confidence = found
    assert ((codes >= 0) & (codes < columns)).all()
    assert not confidence.isnan().any()
    assert (confidence <= 1e-6).all()
    if dtype == torch.float32 and not special:
        assert (codes != wanted[0]).sum() <= 1 + rows // 20


def draw_remask(source: Source, images: int, special: bool) -> dict[str, Tensor]:
    counts = source.draw(st.lists(st.sampled_from([0, 1, 2, 7, 16, 33]), min_size=images, max_size=images), "counts")
    rows = sum(counts)
    integer = source.draw(index_dtypes, "dtype of indices")
    confidence = source.floats("log_confidence", rows, special=special)
    tau = torch.rand(images, generator=source.generator) * source.draw(st.sampled_from([0.0, 1.0, 100.0]), "tau")
    place = places(source, rows)
    return {
        "log_confidence": confidence,
        "row_offsets": source.layout(torch.tensor([0, *counts]).cumsum(0).to(integer), "row_offsets", expand=False),
        "keep_unknown": torch.tensor([source.draw(st.integers(0, n), "keep") for n in counts], dtype=integer),
        "seeds": source.integers("seeds", -(2**63), 2**63 - 1, images, dtype=torch.int64),
        "positions": place["positions"],
        "steps": source.integers("steps", 0, 100, images),
        "tau": source.layout(tau, "tau"),
    }


@fuzz
@given(images=st.integers(0, 5), special=st.booleans(), data=st.data())
def test_remask(images, special, data):
    arguments = draw_remask(Source(data), images, special)
    found = attempt(lambda: remask(**arguments, backend="native"))
    wanted = attempt(lambda: remask(**arguments, backend="reference"))
    if not refuse_alike(found, wanted):
        assert torch.equal(found, wanted)


@fuzz
@given(
    images=st.integers(1, 5),
    what=st.sampled_from(["row_offsets", "keep_unknown", "shape"]),
    data=st.data(),
)
def test_remask_malformed(images, what, data):
    source = Source(data)
    arguments = draw_remask(source, images, False)
    if what == "shape":
        name = source.draw(st.sampled_from(list(arguments)), "name")
        if not arguments[name].numel():
            return
        arguments[name] = resized(source, arguments[name])
    else:
        arguments[what] = spoil_one(source, arguments[what], (-(2**31), -1, 2**20, 2**31 - 1))
    assert_refused("remask", *arguments.values())


@fuzz
@given(
    rows=some,
    columns=columns_,
    hidden=some,
    head=st.booleans(),
    what=st.sampled_from(["scores", "weight", "bias", "seeds", "positions", "steps", "uncond", "dtype"]),
    data=st.data(),
)
def test_malformed(rows, columns, hidden, head, what, data):
    source = Source(data)
    width = hidden if head else columns
    arguments = {"scores": torch.zeros(rows, width)}
    if head:
        arguments |= {"weight": torch.zeros(columns, hidden), "bias": torch.zeros(columns)}
    arguments |= {name: torch.zeros(rows, dtype=torch.int64) for name in ("seeds", "positions", "steps")}
    arguments |= {"temperature": 1.0, "uncond": torch.zeros(rows, width), "guidance": 1.0, "stream": 0}
    if what == "dtype":
        name = source.draw(st.sampled_from([name for name, x in arguments.items() if isinstance(x, Tensor)]), "name")
        arguments[name] = arguments[name].to(torch.complex64)
    elif what not in arguments:
        return
    else:
        arguments[what] = resized(source, arguments[what])
        if what == "weight" and arguments[what].shape == (columns + 1, hidden):
            return  # a longer head without a bias to tell
    assert_refused("head_sample" if head else "sample_tokens", *arguments.values())
