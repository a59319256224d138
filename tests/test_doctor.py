"""`unif2ace doctor`: every back end of every op has an answer, and what is missing has a reason."""

from __future__ import annotations

import json

from unif2ace import doctor, native
from unif2ace.ops import BACKENDS, _registry, _varlen


def test_report_is_plain_data():
    facts = doctor.report()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["packages"]["torch"]
    assert facts["native"]["available"] == (native.load() is not None)


def test_every_op_and_back_end_is_answered():
    rows = [row for row in doctor.report()["backends"] if row["device"] == "cpu"]
    names = {row["op"] for row in rows}
    assert "routing" in names
    assert {(row["op"], row["backend"]) for row in rows} == {(op, backend) for op in names for backend in BACKENDS}
    for row in rows:
        assert row["available"] == (row["reason"] is None)
        assert row["available"] or row["backend"] != "reference"


def test_text_shows_reasons_and_stays_aligned():
    facts = doctor.report()
    text = doctor.format_report(facts)
    for row in facts["backends"]:
        if row["reason"] is not None:
            assert row["reason"] in text
    lines = text.splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("  on cpu"))
    column = lines[header].index("reference")
    cells = [line[column:].split()[0] for line in lines[header + 1 :] if line.startswith("  ") and line[2] != "("]
    assert cells
    assert set(cells) == {"yes"}
    assert all(line == line.rstrip() for line in lines)


def test_attention_libraries_are_listed_in_the_order_they_are_tried(monkeypatch):
    def attend():
        raise ImportError("libcudart.so.11.0: cannot open shared object file")

    broken = _varlen.LIBRARIES[1]._replace(load=attend)
    monkeypatch.setattr(_varlen, "LIBRARIES", (broken, _varlen.LIBRARIES[2]))
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: False)
    facts = doctor.report()
    assert facts["attention"] == {
        "flash-attn 2": "does not load: libcudart.so.11.0: cannot open shared object file",
        "PyTorch": "ready",
    }
    lines = doctor.format_report(facts).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("attention on CUDA"))
    assert [line.split()[0] for line in lines[start + 1 : start + 3]] == ["flash-attn", "PyTorch"]


def test_a_missing_module_is_told(monkeypatch):
    """The report of a machine without the compiled module: the reason is there, nothing fails."""
    monkeypatch.setattr(native, "_attempt", lambda: (None, "the compiled module is not built; build it"))
    _registry._missing.cache_clear()
    try:
        facts = doctor.report()
    finally:
        _registry._missing.cache_clear()
    assert facts["native"] == {
        "available": False,
        "reason": "the compiled module is not built; build it",
        "build": None,
    }
    assert "the compiled module is not built" in doctor.format_report(facts)
