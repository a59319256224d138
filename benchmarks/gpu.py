"""Prove the engine on a GPU and measure it: `make gpu`, or `python -m benchmarks.gpu [--quick]`.

Four steps, under nine minutes together (`--quick`: under two):

1. build: the compiled module with nvcc, in place, for this GPU alone;
2. tests: those of the ops, on the device: the oracle in float32, bfloat16 and float16, the same bits over repeats and
   batch splits, one CUDA graph, no wait for the device, `torch.compile(fullgraph=True)`, more than 2^31 elements, empty
   experts, NaN in unwritten memory;
3. benchmarks: the ceilings of the GPU (copy, dense product), every op at the sizes of `shapes.SHORT["cuda"]` against
   torch, compiled torch, transformers and whichever peers are installed, then whole models: faces drawn, answers and
   training steps of a random `unif2ace-1.8b`, reference and engine;
4. record: one table, `benchmarks/results/<gpu>-<date>.json`, and beside it pictures of speed and roofline.

What does not fit into the time, or is not installed, is listed as such. Without a CUDA device the steps run on the CPU
on next to nothing, so that they are known to work: a dry run, whose record goes to `out/bench/` and says nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import report, run, shapes
from benchmarks.machine import ROOT
from unif2ace.files import write_text

NEEDED = ("pytest", "pytest_benchmark", "hypothesis")
WELCOME = ("xdist", "matplotlib", "transformers", "liger_kernel", "flash_attn")
TEST_PROCESSES = 8  # they mostly compile kernels, which keeps one core busy each


@dataclass(frozen=True)
class Plan:
    """What one run does: `seconds` bounds tests and benchmarks together, `test_seconds` the tests alone."""

    device: str
    tests: tuple[str, ...]
    ops: tuple[str, ...]
    shapes: tuple[str, ...]
    test_seconds: float
    seconds: float


FULL = Plan("cuda", ("tests/ops",), tuple(shapes.SHORT["cuda"]), (), 260, 500)
QUICK = Plan(
    "cuda",
    ("tests/ops/test_promises.py",),
    ("experts", "sampling", "routing"),
    ("T512-I512-k4", "T8192-I1024-k2", "faces-32", "train"),
    50,
    100,
)
DRY = Plan("cpu", ("tests/ops/test_promises.py", "-k", "remask"), ("routing",), ("decode-64",), 120, 240)


def build() -> dict[str, object]:
    """Compile the module in place for the present GPU."""
    from torch.utils import cpp_extension

    if torch.version.cuda is None or cpp_extension.CUDA_HOME is None:
        missing = "nvcc" if torch.version.cuda else "a CUDA build of torch"
        return {"ok": True, "summary": f"not compiled, {missing} is missing: native CUDA kernels are absent"}
    major, minor = torch.cuda.get_device_capability()
    architecture = f"{major}.{minor}" + ("a" if (major, minor) == (9, 0) else "")
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    environment = {**os.environ, "TORCH_CUDA_ARCH_LIST": architecture}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"ok": False, "summary": "the compiled module does not build:\n" + (done.stdout + done.stderr)[-2000:]}
    return {"ok": True, "summary": f"compiled for sm_{architecture.replace('.', '')}"}


def test(plan: Plan) -> dict[str, object]:
    """Run the op tests on the device: counts, and the names of those that failed."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *plan.tests]
        command += [f"--device={plan.device}", f"--junitxml={log}"]
        if importlib.util.find_spec("xdist") is not None and plan.device == "cuda":
            command += ["-n", str(TEST_PROCESSES)]
        try:
            done = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, timeout=plan.test_seconds, check=False
            )
        except subprocess.TimeoutExpired:
            return {"ok": False, "summary": f"stopped after {plan.test_seconds:.0f} s, the time for tests"}
        if not log.is_file():
            return {"ok": False, "summary": "pytest did not run:\n" + (done.stdout + done.stderr)[-2000:]}
        return read_tests(log.read_text(encoding="utf-8"))


def read_tests(junit: str) -> dict[str, object]:
    """Counts and failed tests out of pytest's JUnit XML; no test at all is a failure."""
    cases = list(ElementTree.fromstring(junit).iter("testcase"))
    kinds = {case: {child.tag for child in case} for case in cases}
    failed = [f"{case.get('classname')}::{case.get('name')}" for case in cases if kinds[case] & {"failure", "error"}]
    skipped = sum("skipped" in kinds[case] for case in cases)
    passed = len(cases) - len(failed) - skipped
    summary = f"{passed} passed, {len(failed)} failed, {skipped} skipped"
    return {"ok": not failed and passed > 0, "summary": summary, "failed": failed}


def absent() -> list[str]:
    """What is not installed here and would have been compared or used."""
    return [name for name in WELCOME if importlib.util.find_spec(name) is None]


def prove(plan: Plan, path: Path) -> bool:
    """All steps; writes the record and prints the table last. True when every test passed and no row is red."""
    started, steps = time.monotonic(), {}
    for name, step in (("build", build), ("tests", lambda: test(plan))):
        if name == "build" and plan.device == "cpu":
            continue
        before = time.monotonic()
        steps[name] = {**step(), "seconds": round(time.monotonic() - before, 1)}
        print(f"{name}: {steps[name]['summary']} ({steps[name]['seconds']:.0f} s)", flush=True)
        for failure in steps[name].get("failed", []):
            print(f"  FAILED {failure}")
    left = plan.seconds - (time.monotonic() - started)
    selection = run.Selection(plan.ops, plan.device, shapes=plan.shapes, seconds=max(left, 1.0))
    record = {**run.run(selection), "steps": steps, "absent": absent()}
    write_text(path, json.dumps(record, indent=1))
    print(f"benchmarks: {len(record['benchmarks'])} comparisons, {len(record['red'])} red")
    print(f"absent: {', '.join(record['absent']) or 'nothing'}")
    print(f"record: {path}")
    if importlib.util.find_spec("matplotlib") is not None and record["benchmarks"]:
        from benchmarks import plots

        for picture in plots.write(record, path.with_suffix(".svg")):
            print(f"picture: {picture}")
    print(f"all of it took {time.monotonic() - started:.0f} s\n")
    print(report.table(record))
    return all(step["ok"] for step in steps.values()) and not record["red"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under two minutes: the promises, and four sizes")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the record there")
    options = parser.parse_args(arguments)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"unif2ace: testing and timing need {', '.join(missing)}: pip install them", file=sys.stderr)
        return 2
    if torch.cuda.is_available():
        plan = QUICK if options.quick else FULL
        path = run.default_path(run.Selection(device="cuda"), "quick" if options.quick else None)
    else:
        print("unif2ace: no CUDA device here (torch.cuda.is_available() is False): nothing is proved or measured.")
        print("unif2ace: a dry run of the steps on the CPU, to see that they work:\n")
        plan, path = DRY, run.default_path(run.Selection(["gpu", "dry", "run"]), None)
    return 0 if prove(plan, options.out or path) else 1


if __name__ == "__main__":
    raise SystemExit(main())
