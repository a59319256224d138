"""Tables and pictures of a small record, and the comparison of two revisions."""

import json
import xml.dom.minidom

import pytest
from PIL import Image

from benchmarks import compare, report

RUN = {
    "device": "a processor",
    "cores": 2,
    "isa": "avx2",
    "threads": 2,
    "torch": "2.13",
    "commit": "0123456789ab",
    "date": "2026-01-02 03:04 UTC",
    "ceilings": {"bytes_per_second": 2e10, "flops_per_second": {"float32": 1e11}},
}


def comparison(op, case="forward", flops=None, scale=1.0, **seconds):
    """One entry of a record; keyword names with two underscores are peers ("torch__x" is "torch: x")."""
    seconds = {name.replace("__", ": "): value * scale for name, value in seconds.items()}
    bytes = 4_000_000
    floor = max(bytes / 2e10, (flops or 0) / 1e11)
    info = {
        "op": op,
        "shape": "laptop",
        "case": case,
        "dtype": "float32",
        "cache": "cold",
        "bytes": bytes,
        "flops": flops,
        "items": None,
        "baseline": "reference",
        "seconds": seconds,
        "rounds": {name: [0.99 * s, s, s, s, 1.01 * s] for name, s in seconds.items()},
        "spread": dict.fromkeys(seconds, 0.021),
        "roofline": {name: floor / s for name, s in seconds.items()},
        "peak_bytes": dict.fromkeys(seconds, 3 * 2**20),
        "notes": {},
        "run": RUN,
    }
    return {"extra_info": info}


def record(scale=1.0):
    return {
        "benchmarks": [
            comparison("experts", flops=10**9, reference=0.04, native=0.02, torch__grouped_mm=0.03, hf__eager=0.08),
            comparison("experts", "forward+backward", 3 * 10**9, reference=0.12, native=0.06, hf__eager=0.09),
            comparison("routing", scale=scale, reference=0.005, native=0.0002),
        ],
        "red": [],
    }


def cells(text, *words):
    """The cells of the one row that holds all words."""
    (row,) = [line for line in text.splitlines() if line.startswith("|") and all(word in line for word in words)]
    return [cell.strip() for cell in row.strip("|").split("|")]


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


def test_an_empty_record_is_said_to_be_empty():
    assert report.table({"benchmarks": []}) == "no results"


def test_the_readme_sets_ours_against_reference_and_best_peer():
    text = report.readme(record())
    assert cells(text, "experts")[3:] == [
        "native",
        "20 ms, **2.0x**",
        "60 ms, **2.0x**",
        "1.5x torch: grouped_mm (forward); 1.5x hf: eager (forward+backward)",
    ]
    assert cells(text, "routing")[4:] == ["200 µs, **25.0x**", "", ""]


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
    source.write_text(json.dumps(record()))
    assert report.main([str(source), "--plot", str(tmp_path / "speed.png")]) == 0
    assert Image.open(tmp_path / "speed-speed.png").width > 1000
    assert report.main([str(source), "--plot", str(tmp_path / "p.svg"), "--readme"]) == 0
    texts = []
    for name in ("p-speed.svg", "p-roofline.svg"):
        document = xml.dom.minidom.parse(str(tmp_path / name))
        texts.append(" ".join(node.firstChild.data for node in document.getElementsByTagName("text")))
    assert "laptop, forward, fp32, cold" in texts[0]
    assert "25x" in texts[0]
    assert "fp32 product" in texts[1]
    assert "picture: " in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------- two revisions


def test_a_change_counts_when_it_leaves_the_spread():
    old = [record(), record(1.01)]
    text = compare.table(old, [record(1.5), record(1.49)])
    assert cells(text, "routing", "native")[-2:] == ["0.67x", "slower"]
    assert cells(text, "experts", "native", " forward  ")[-2:] == ["1.00x", ""]
    assert text.splitlines()[-1].startswith("9 rows: 0 faster, 2 slower")
    assert cells(compare.table(old, [record(0.8)]), "routing", "native")[-2:] == ["1.26x", "faster"]


def test_a_small_or_scattered_change_does_not_count():
    key = ("op", "shape", "case", "fp32", "warm", "native")
    assert compare.Change(key, (1.00, 1.00, 1.00), (1.02, 1.02, 1.02)).verdict == ""
    assert compare.Change(key, (1.0, 1.4, 1.2), (1.2, 1.5, 1.3)).verdict == ""
    assert compare.Change(key, (1.0, 1.01, 1.02), (1.3, 1.31, 1.32)).verdict == "slower"


def test_rows_of_one_side_and_red_rows_are_named():
    new = record()
    new["benchmarks"].append(comparison("sampling", reference=0.1))
    new["red"] = [{"op": "routing", "test": "bench_routing.py::x", "reason": "native is wrong"}]
    text = compare.table([record()], [new])
    assert "only new: sampling, laptop, forward, fp32, cold, reference" in text
    assert "RED new: bench_routing.py::x: native is wrong" in text
    assert "no row was measured on both sides" in compare.table([], [new])
