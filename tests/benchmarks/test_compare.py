"""Two revisions side by side: what counts as a change, and that a temporary checkout leaves nothing behind."""

import subprocess

import pytest

from benchmarks import compare
from tests.benchmarks.records import cells, comparison, record


def test_a_change_counts_when_it_leaves_the_scatter():
    old = [record(), record(1.01)]
    text = compare.table(old, [record(1.5), record(1.49)])
    assert cells(text, "routing", "native")[-3:] == ["0.67x", "1.01x", "slower"]
    assert cells(text, "experts", "native", " forward  ")[-3:] == ["1.00x", "1.00x", ""]
    assert text.splitlines()[-1].startswith("9 rows: 0 faster, 2 slower")
    assert cells(compare.table(old, [record(0.8)]), "routing", "native")[-1] == "faster"


KEY = ("op", "shape", "case", "fp32", "warm", "native")
FAST, SLOW = (1.00, 1.01, 1.02), (1.30, 1.31, 1.32)


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        ([FAST], [SLOW], "slower"),
        ([SLOW, SLOW], [FAST, FAST], "faster"),
        ([FAST], [FAST], ""),
        ([(1.00, 1.00, 1.00)], [(1.02, 1.02, 1.02)], ""),  # less than the noise of equal code
        ([(1.0, 1.4, 1.2)], [(1.2, 1.5, 1.3)], ""),  # rounds overlap
        ([FAST, SLOW], [SLOW, SLOW], ""),  # one side differs as much within itself
    ],
)
def test_verdicts(old, new, verdict):
    assert compare.Change(KEY, tuple(old), tuple(new)).verdict == verdict


def test_rows_of_one_side_and_red_rows_are_named():
    new = record()
    new["benchmarks"].append(comparison("sampling", reference=0.1))
    new["red"] = [{"op": "routing", "test": "bench_routing.py::x", "reason": "native is wrong"}]
    text = compare.table([record()], [new])
    assert "only new: sampling, laptop, forward, fp32, cold, reference" in text
    assert "RED new: bench_routing.py::x: native is wrong" in text
    assert "no row was measured on both sides" in compare.table([], [new])


@pytest.fixture
def unbuilt(monkeypatch):
    """Checkouts of this repository's HEAD, without the compiled module."""
    if not (compare.ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    monkeypatch.setattr(compare, "_build", lambda tree: None)


def worktrees():
    return subprocess.run(
        ["git", "-C", compare.ROOT, "worktree", "list"], capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize("ending", [None, KeyboardInterrupt])
def test_a_checkout_has_this_ruler_and_goes_away(unbuilt, ending):
    def use():
        with compare.checkout("HEAD") as tree:
            for name in compare.RULER:
                ours, theirs = compare.ROOT / name, tree / name
                same = (ours / "run.py", theirs / "run.py") if ours.is_dir() else (ours, theirs)
                assert same[0].read_text() == same[1].read_text()
            assert str(tree) in worktrees()
            seen.append(tree)
            if ending is not None:
                raise ending

    seen = []
    if ending is None:
        use()
    else:
        with pytest.raises(ending):
            use()
    assert not seen[0].exists()
    assert str(seen[0]) not in worktrees()


def test_both_sides_are_measured_in_turn(unbuilt, monkeypatch, capsys):
    order = []

    def measure(tree, op, options):
        order.append(("new" if tree == compare.ROOT else "old", op, tuple(options)))
        return record(2.0 if tree == compare.ROOT else 1.0)

    monkeypatch.setattr(compare, "measure", measure)
    assert compare.main(["HEAD", "routing", "--threads", "1"]) == 0
    options = ("--device=cpu", "--threads=1")
    assert order == [(side, "routing", options) for side in ("old", "new", "new", "old")]
    assert cells(capsys.readouterr().out, "routing", "native")[-1] == "slower"


def test_a_package_that_cannot_be_measured_is_red(tmp_path):
    (failure,) = compare.measure(tmp_path, "routing", [])["red"]
    assert failure["op"] == "routing"
    assert "benchmarks" in failure["reason"]


def test_unknown_revisions_and_ops_are_refused(capsys):
    assert compare.main(["no-such-revision"]) == 2
    assert "no-such-revision" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        compare.main(["HEAD", "flying"])
    assert "expected one of" in capsys.readouterr().err
