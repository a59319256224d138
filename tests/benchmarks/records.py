"""A small record with round numbers, as `benchmarks.run` would write it, and a reader of table rows."""

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
