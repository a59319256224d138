"""Ceilings, peak memory and the facts of a machine: plausible, and right where the right answer is known."""

import json
import subprocess

import pytest
import torch

from benchmarks import machine
from benchmarks.ceilings import Ceilings
from unif2ace.errors import UserError
from unif2ace.evaluation import tracing
from unif2ace.ops import route


def test_ceilings_are_measured_once_and_plausible():
    ceilings = Ceilings("cpu")
    assert ceilings.seconds(None, None, torch.float32) is None
    assert ceilings.rates == {}  # nothing asked, nothing measured
    bandwidth, rate = ceilings.bandwidth(), ceilings.rate(torch.float32)
    assert 1e8 < bandwidth < 1e13
    assert 1e8 < rate < 1e15
    assert (ceilings.bandwidth(), ceilings.rate(torch.float32)) == (bandwidth, rate)
    assert ceilings.to_dict() == {"bytes_per_second": bandwidth, "flops_per_second": {"float32": rate}}


def test_the_least_time_is_set_by_the_slower_ceiling():
    ceilings = Ceilings("cpu")
    ceilings.bandwidth, ceilings.rate = lambda: 10.0, lambda dtype: 1000.0
    assert ceilings.seconds(50, 1000, torch.float32) == 5.0
    assert ceilings.seconds(5, 1000, torch.float32) == 1.0
    assert ceilings.seconds(5, None, torch.float32) == 0.5
    assert ceilings.seconds(None, 3000, torch.float32) == 3.0


def allocate(*sizes):
    return [torch.empty(size, dtype=torch.uint8) for size in sizes]


def test_peak_memory_counts_what_lives_at_once():
    before = allocate(2**22)

    def call():
        first, second = allocate(2**20, 2**22)
        before.clear()  # was there before the call: neither counted nor taken off
        del first
        return allocate(2**21), second

    assert tracing.peak_bytes(tracing.trace_call(call, "call")) == 2**22 + 2**21
    assert tracing.peak_bytes(tracing.trace_call(lambda: None, "nothing")) == 0


def test_peak_memory_sees_compiled_kernels():
    logits = torch.randn(1000, 8)
    peak = tracing.peak_bytes(tracing.trace_call(lambda: route(logits, 2), "route"))
    assert peak >= 1000 * (2 * 4 * 4 + 4)  # weights, experts, order, position and logsumexp


def test_traces_carry_their_label_and_can_be_written(tmp_path):
    events = tracing.trace_call(lambda: torch.ones(3).add(1), "the label")
    path = tracing.write_trace(tmp_path / "new" / "trace.json", events)
    names = [event.get("name") for event in json.loads(path.read_text())["traceEvents"]]
    assert "the label" in names
    assert "aten::add" in names
    with pytest.raises(UserError, match="cannot write /proc/nothing/trace"):
        tracing.write_trace("/proc/nothing/trace.json", events)


def test_facts_name_machine_and_time():
    facts = machine.facts("cpu")
    assert facts["cores"] >= 1
    assert facts["threads"] == torch.get_num_threads()
    assert all(facts[name] for name in ("date", "device", "isa", "torch", "python", "system"))
    assert json.loads(json.dumps(facts)) == facts


def test_a_changed_checkout_is_called_dirty(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True)

    assert machine.commit(tmp_path) is None
    git("init")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "one")
    clean = machine.commit(tmp_path)
    assert len(clean) == 12
    (tmp_path / "file").write_text("two")
    assert machine.commit(tmp_path) == f"{clean}-dirty"
