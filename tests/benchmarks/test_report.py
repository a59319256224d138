"""Tables and pictures of a small record."""

import json
import xml.dom.minidom

import pytest
from PIL import Image

from benchmarks import report
from tests.benchmarks.records import cells, comparison, record


def test_the_table_computes_rates_from_the_median():
    text = report.table(record())
    assert cells(text, "experts", "native", " forward  ") == [
        "experts", "laptop", "forward", "fp32", "cold", "native", "20 ms", "0.2", "0.05", "50", "3 MiB", "2 %", "2.00x",
    ]  # fmt: skip
    assert cells(text, "routing", "reference")[-1] == "baseline"
    assert cells(text, "routing", "native")[6:10] == ["200 µs", "20", "", "100"]
    assert "a processor, 2 cores, avx2, 2 thread(s), torch 2.13, commit 0123456789ab, 2026-01-02 03:04 UTC" in text
    assert "copy 20 GB/s; dense product fp32 0.1 TFLOP/s" in text
    assert "can exceed 100 %" in text
    assert len({len(line) for line in text.splitlines() if line.startswith("|")}) == 1  # aligned


def test_a_busy_machine_is_said_to_be_busy():
    disturbed = record()
    assert "busy" not in report.table(disturbed)
    for entry in disturbed["benchmarks"]:
        entry["extra_info"]["spread"] = dict.fromkeys(entry["extra_info"]["spread"], 0.5)
    assert "busy: half of the rows spread by more than 50%" in report.table(disturbed)


def test_an_empty_record_is_said_to_be_empty():
    assert report.table({"benchmarks": []}) == "no results"


def test_the_readme_sets_ours_against_reference_and_best_peer():
    text = report.readme(record())
    assert cells(text, "experts")[3:] == [
        "native",
        "20 ms, **2.0x**, 1.5x torch: grouped_mm",
        "60 ms, **2.0x**, 1.5x hf: eager",
    ]
    assert cells(text, "routing")[4:] == ["200 µs, **25.0x**", ""]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2.5, "2.5 s"), (0.0123, "12.3 ms"), (0.9996, "1000 ms"), (4.56e-5, "45.6 µs"), (3e-9, "3 ns")],
)
def test_durations_have_three_digits(seconds, text):
    assert report.duration(seconds) == text


@pytest.mark.parametrize(("amount", "text"), [(0, "0 B"), (1536, "1.5 KiB"), (5 * 2**30, "5 GiB")])
def test_memory_has_binary_units(amount, text):
    assert report.memory(amount) == text


def test_pictures_are_written_from_the_command_line(tmp_path, capsys):
    source = tmp_path / "record.json"
    made = record()
    made["benchmarks"].append(comparison("savings", reference=0.04, plain=0.03))  # no back end of ours
    source.write_text(json.dumps(made))
    assert report.main([str(source), "--plot", str(tmp_path / "speed.png")]) == 0
    assert Image.open(tmp_path / "speed-speed.png").width > 1000
    assert report.main([str(source), "--plot", str(tmp_path / "p.svg"), "--readme"]) == 0
    texts = []
    for name in ("p-speed.svg", "p-roofline.svg"):
        document = xml.dom.minidom.parse(str(tmp_path / name))
        texts.append(" ".join(node.firstChild.data for node in document.getElementsByTagName("text")))
    assert "laptop, fwd, fp32, cold" in texts[0]
    assert "25x" in texts[0]
    assert "savings" not in texts[0]
    assert "dense product, fp32" in texts[1]
    assert "picture: " in capsys.readouterr().out
