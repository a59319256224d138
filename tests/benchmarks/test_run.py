"""The suite itself, on an op made up for the purpose: what runs, what is recorded, what a wrong variant does."""

import json

import pytest

from benchmarks import report, run, shapes
from unif2ace.cli import main
from unif2ace.errors import UserError

BENCHMARKS = """
import pytest
import torch

SIZES = {"small": 8, "large": 64, "wrong": 16}


@pytest.mark.parametrize("shape", SIZES)
def bench_adding(shape, backends, compare):
    x = torch.ones(SIZES[shape])
    assert "reference" in backends("routing", torch.float32)

    def gate(name):
        assert shape != "wrong" or name != "native", "values differ"

    compare(
        {name: lambda: x.add(1.0) for name in ("reference", "native", "torch: add")},
        baseline="reference",
        op="adding",
        shape=shape,
        case="forward",
        dtype=torch.float32,
        bytes=2 * x.nbytes,
        gate=gate,
        items=(SIZES[shape], "numbers"),
        notes={"torch: add": "the same thing"},
    )


def bench_crash(compare):
    raise ValueError("out of luck")
"""


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """run(**selection) -> record of the made-up suite."""
    folder = tmp_path / "made_up"  # another `benchmarks.conftest` would be taken for the real one
    folder.mkdir()
    (folder / "conftest.py").write_text("from benchmarks.conftest import *\n")
    (folder / "bench_adding.py").write_text(BENCHMARKS)
    monkeypatch.setattr(run, "FOLDER", folder)
    monkeypatch.setitem(shapes.SHORT["cpu"], "adding", ("small",))
    return lambda op="adding", **selection: run.run(run.Selection([op], **selection))


def shapes_of(record):
    return [result.info["shape"] for result in report.results(record)]


def test_a_short_run_records_everything_about_its_figures(suite):
    record = suite()
    assert shapes_of(record) == ["small"]
    info = report.results(record)[0].info
    names = ["reference", "native", "torch: add"]
    for figure in ("seconds", "rounds", "spread", "method", "roofline", "peak_bytes"):
        assert list(info[figure]) == names
    assert info["cache"] == "warm"
    assert all(seconds > 0 for seconds in info["seconds"].values())
    assert 8 * 4 <= info["peak_bytes"]["native"] <= 8 * 4 + 16  # the result, and a scalar operand
    assert info["ratio"]["native"] == info["seconds"]["reference"] / info["seconds"]["native"]
    assert {"commit", "date", "device", "threads", "ceilings"} <= info["run"].keys()


def test_failures_leave_red_rows_beside_the_figures(suite, tmp_path, monkeypatch, capsys):
    record = suite(full=True)
    assert shapes_of(record) == ["small", "large"]
    gate, crash = record["red"]
    assert (gate["shape"], gate["case"], gate["reason"]) == ("wrong", "forward", "native is wrong: values differ")
    assert crash["reason"] == "ValueError: out of luck"
    text = report.table(record)
    assert text.count("**RED**") == 2
    assert "native is wrong: values differ" in text
    assert "numbers/s" in text
    assert "adding torch: add: the same thing" in text
    monkeypatch.setattr(run, "run", lambda selection: record)
    out = tmp_path / "new" / "record.json"
    assert run.main(["adding", "--full", "--out", str(out)]) == 1
    assert "**RED**" in capsys.readouterr().out
    assert json.loads(out.read_text()) == json.loads(json.dumps(record))


def test_a_run_where_everything_is_red_still_has_a_record(suite):
    record = suite(shapes=["wrong"])
    assert shapes_of(record) == []
    assert [failure["reason"] for failure in record["red"]] == [
        "native is wrong: values differ",
        "ValueError: out of luck",
    ]
    assert "RED, no figures (2)" in report.table(record)


def test_a_benchmark_that_cannot_be_imported_is_red(suite):
    (run.FOLDER / "bench_broken.py").write_text("import nothing_of_that_name\n")
    (failure,) = suite("broken")["red"]
    assert failure["op"] == "broken"
    assert failure["reason"] == "ModuleNotFoundError: No module named 'nothing_of_that_name'"


@pytest.mark.parametrize(
    ("backends", "variants"),
    [
        (["native"], ["reference", "native"]),
        (["peers"], ["reference", "torch: add"]),
        (["reference"], ["reference"]),
    ],
)
def test_backends_narrow_the_variants_and_keep_the_baseline(suite, backends, variants):
    (result,) = report.results(suite(backends=backends))
    assert list(result.seconds) == variants


def test_shapes_are_chosen_by_name(suite):
    assert shapes_of(suite(shapes=["large"])) == ["large"]
    with pytest.raises(UserError, match=r"expected shapes among small, large, wrong; got 'huge'"):
        suite(shapes=["large", "huge"])


def test_one_trace_holds_a_call_of_every_variant(suite, tmp_path):
    suite(trace_file=str(tmp_path / "trace.json"))
    names = {event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert {f"adding small forward float32: {name}" for name in ("reference", "native", "torch: add")} <= names


@pytest.mark.parametrize(
    ("ops", "keep", "name"),
    [
        ([], None, "out/bench/cpu-20"),
        (["routing", "experts"], None, "out/bench/cpu-routing-experts-20"),
        ([], "zen5", "benchmarks/results/cpu-zen5-20"),
    ],
)
def test_records_go_where_they_belong(ops, keep, name):
    path = run.default_path(run.Selection(ops), keep)
    assert path.relative_to(run.ROOT).as_posix().startswith(name)


def test_the_short_list_names_shapes_that_exist():
    known = {name for table in vars(shapes).values() if isinstance(table, dict) for name in table}
    for short in shapes.SHORT.values():
        assert all(name in known for names in short.values() for name in names)
        assert short.keys() >= set(run.known_ops())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["flying"], "bench: expected one of generate, train"),
        (
            ["routing", "--backends", "magic"],
            "bench: expected back ends among reference, native, triton, auto, peers; got",
        ),
        (["routing", "--shapes", "huge"], "bench: expected shapes among decode-1, decode-64"),
        (["generate", "--shapes", "train"], "bench: expected --shapes with an op only, got it with generate"),
        (["generate", "--backends", "magic"], "unknown back end 'magic'; expected one of auto, reference"),
        (["routing", "--trace", "/proc/nothing/t.json"], "cannot write into /proc/nothing"),
        (["train", "--model", "random-3t"], "model: expected a bundled name"),
    ],
)
def test_mistakes_on_the_command_line_are_one_sentence(capsys, arguments, sentence):
    assert main(["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert sentence in captured.err
    assert captured.err.count("\n") == 1
