"""The record: appended for good, read after any crash, refused where it belongs to another run."""

import json

import pytest

from unif2ace.batch.record import Record
from unif2ace.errors import UserError

SETTINGS = {"seed": 1, "model_sha256": "abc"}


def line(number, error=None, file=None):
    return {"number": number, "file": file, "error": error}


def test_what_is_recorded_is_done(tmp_path):
    with Record(tmp_path, SETTINGS, 4) as record:
        record.append([line(2), line(0, "broken")])
        assert [record.done(number) for number in range(4)] == [False, False, True, False]
    with Record(tmp_path, SETTINGS, 4) as record:
        assert [record.done(number) for number in range(4)] == [False, False, True, False]
        assert (record.failed, record.complete) == (1, False)
        record.append([line(1), line(3)])
        assert record.complete


@pytest.mark.parametrize("tail", [b"{", b'{"number": 1, "file": null, "error": null}', b"\0" * 40])
def test_a_last_line_without_an_end_is_absent(tmp_path, tail):
    with Record(tmp_path, SETTINGS, 2) as record:
        record.append([line(0)])
    with open(tmp_path / "00000.jsonl", "ab") as part:
        part.write(tail)
    with Record(tmp_path, SETTINGS, 2, rank=1) as record:  # another's part is left alone
        assert [record.done(0), record.done(1)] == [True, False]
    assert (tmp_path / "00000.jsonl").read_bytes().endswith(tail)
    with Record(tmp_path, SETTINGS, 2) as record:
        assert [record.done(0), record.done(1)] == [True, False]
        record.append([line(1)])
        assert list(record.lines_in_order()) == [line(0), line(1)]


def test_a_broken_line_inside_is_named(tmp_path):
    Record(tmp_path, SETTINGS, 2).__exit__()
    (tmp_path / "00003.jsonl").write_text('{"number": 0, "error": null}\n{"number"\n')
    with pytest.raises(UserError, match=r"00003\.jsonl:2: expected a recorded result"):
        Record(tmp_path, SETTINGS, 2)


def test_parts_are_read_as_one_and_success_stands_above_failure(tmp_path):
    with Record(tmp_path, SETTINGS, 3, rank=0) as first, Record(tmp_path, SETTINGS, 3, rank=1) as second:
        first.append([line(2), line(1, "early")])
        second.append([line(0, "early"), line(1)])
        first.append([line(0, "late")])
        first.refresh()
        assert first.complete
        assert list(first.lines_in_order()) == [line(0, "early"), line(1), line(2)]
        assert first.failed == 1


def test_a_picture_that_is_gone_is_made_again(tmp_path):
    (tmp_path / "a.png").write_text("a")
    with Record(tmp_path / "parts", SETTINGS, 2, root=tmp_path) as record:
        record.append([line(0, file="a.png"), line(1, file="b.png")])
        assert [record.done(0), record.done(1)] == [True, False]


def test_a_run_with_other_settings_is_refused_with_what_differs(tmp_path):
    with Record(tmp_path, SETTINGS, 1) as record:
        record.append([line(0)])
    with pytest.raises(UserError, match=r"holds a run with other settings \(seed was 1, is 2; steps was None, is 4\)"):
        Record(tmp_path, {**SETTINGS, "seed": 2, "steps": 4}, 1)
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(UserError, match="other settings"):
        Record(tmp_path, SETTINGS, 1)


def test_settings_of_a_run_without_results_are_replaced(tmp_path):
    Record(tmp_path, {**SETTINGS, "device": "nonsense"}, 1).__exit__()
    with Record(tmp_path, SETTINGS, 1) as record:
        record.append([line(0)])
    with Record(tmp_path, SETTINGS, 1) as record:
        assert record.complete


def test_processes_that_start_together_with_other_settings(tmp_path):
    """Before there is any result: on one of several machines lies another model, say."""
    with Record(tmp_path, SETTINGS, 2, rank=0) as first:
        with pytest.raises(UserError, match=r"other settings \(model_sha256 was 'abc', is 'def'\)"):
            Record(tmp_path, {**SETTINGS, "model_sha256": "def"}, 2, rank=1)
        with Record(tmp_path, SETTINGS, 2, rank=1) as second:
            first.append([line(0)])
            second.append([line(1)])
            assert list(second.lines_in_order()) == [line(0), line(1)]


def test_a_part_has_one_writer(tmp_path):
    with Record(tmp_path, SETTINGS, 1), pytest.raises(UserError, match="another process is at work on it"):
        Record(tmp_path, SETTINGS, 1)
    Record(tmp_path, SETTINGS, 1).__exit__()


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    with Record(tmp_path, SETTINGS, 1) as record:
        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(UserError, match=r"cannot write .*00000\.jsonl: No space left on device"):
            record.append([line(0)])


def test_text_that_is_no_unicode_is_recorded(tmp_path):
    with Record(tmp_path, SETTINGS, 1) as record:
        record.append([{**line(0, "bad"), "prompt": "\ud800"}])
        assert [json.dumps(found["prompt"]) for found in record.lines_in_order()] == ['"\\ud800"']
