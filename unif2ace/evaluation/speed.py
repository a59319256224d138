"""Faces, answers and training steps per second for several back ends, in one interleaved run.

Rounds go through all back ends in turn, so that a machine that slows down slows all of them: the ratio of two medians
of one run means something where absolute times do not. A first round, untimed, fills caches and loads kernels.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from unif2ace.errors import UserError
from unif2ace.evaluation.faces import held_out_faces
from unif2ace.ops import use_backend
from unif2ace.pipeline import UniF2acePipeline

BACKENDS_COMPARED = ("reference", "auto")
PROMPTS = ("a smiling person with red hair", "a fair face, wearing round glasses, in a blue hoodie")
QUESTIONS = ("What color is the hair?", "What is the mouth doing?", "What eyewear is worn?", "What clothing is worn?")
TRAINING_SEQUENCES = (24, 10)  # generation and understanding sequences in a step, as in recipes/avatars-tiny.toml


@dataclass(frozen=True)
class Speed:
    """One back end: rates as medians over the rounds, and which back end each op really ran on."""

    backend: str
    rates: dict[str, float]
    ops: dict[str, str]

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return asdict(self)


def compare_backends(
    pipe: UniF2acePipeline,
    backends: Sequence[str] = BACKENDS_COMPARED,
    *,
    faces: int = 8,
    rounds: int = 3,
    steps: int | None = None,
    on_round: Callable[[int, int], None] | None = None,
) -> list[Speed]:
    """Faces/s (batches of `faces`, guidance as the model's default) and answers/s (four per face) of each back end.

    Drives `pipe`, which must have been loaded with `backend="auto"`. on_round(done, total) follows the rounds.
    """
    prompts = [PROMPTS[index % len(PROMPTS)] for index in range(faces)]
    images = [image for image in pipe.generate(prompts, steps=1) for _ in QUESTIONS]
    questions = list(QUESTIONS) * faces
    work = {
        "faces/s": (faces, lambda: pipe.generate(prompts, steps=steps, batch_size=faces)),
        "answers/s": (len(images), lambda: pipe.answer(images, questions, batch_size=len(images))),
    }
    return _interleave(pipe, work, backends, rounds, on_round)


def compare_training(
    pipe: UniF2acePipeline,
    backends: Sequence[str] = BACKENDS_COMPARED,
    *,
    rounds: int = 5,
    on_round: Callable[[int, int], None] | None = None,
) -> list[Speed]:
    """Steps/s and tokens/s of training on a mixed batch (24 faces drawn, 10 asked about): forward, backward, update."""
    from unif2ace.training.batches import MixedBatches, TokenizedFaces
    from unif2ace.training.muon import MuonAdamW
    from unif2ace.training.objective import ObjectiveSettings, training_losses

    generation, understanding = TRAINING_SEQUENCES
    table = held_out_faces(generation + understanding, size=pipe.image_size)
    batches = MixedBatches(
        TokenizedFaces(table, *(pipe.read_images(table.images))),
        pipe.tokenizer,
        pipe.model.vocabulary,
        generation=generation,
        turns=4,
        caption_share=0.4,
        condition_dropout=0.1,
    )
    batch = batches(torch.arange(len(table)), np.random.default_rng(0))
    model = copy.deepcopy(pipe.model).train()
    optimizer = MuonAdamW(model, lr=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        training_losses(model, batch, ObjectiveSettings())["loss"].backward()
        optimizer.step()

    work = {"steps/s": (1, step)}
    speeds = _interleave(pipe, work, backends, rounds, on_round)
    tokens = batch.packed.layout.num_rows
    return [Speed(s.backend, {**s.rates, "tokens/s": s.rates["steps/s"] * tokens}, s.ops) for s in speeds]


def _interleave(
    pipe: UniF2acePipeline,
    work: dict[str, tuple[int, Callable[[], object]]],
    backends: Sequence[str],
    rounds: int,
    on_round: Callable[[int, int], None] | None,
) -> list[Speed]:
    """Time every (items, call) of `work` on every back end, `rounds` times after one untimed round."""
    if pipe.backend != "auto":
        raise UserError(f"speed: expected a pipeline with backend='auto', got {pipe.backend!r}")
    seconds: dict[tuple[str, str], list[float]] = {(backend, kind): [] for backend in backends for kind in work}
    for number in range(rounds + 1):
        for backend in backends:
            with use_backend(backend):
                for kind, (_, call) in work.items():
                    started = time.perf_counter()
                    call()
                    if pipe.device.type == "cuda":
                        torch.cuda.synchronize()
                    if number:
                        seconds[backend, kind].append(time.perf_counter() - started)
        if on_round is not None:
            on_round(number + 1, rounds + 1)
    speeds = []
    for backend in backends:
        rates = {kind: items / statistics.median(seconds[backend, kind]) for kind, (items, _) in work.items()}
        with use_backend(backend):
            speeds.append(Speed(backend, rates, pipe.backends()))
    return speeds


def speed_table(speeds: Sequence[Speed]) -> str:
    """Aligned text: one row per back end, ratios against the first, and the ops that do not run on the reference."""
    first = speeds[0]
    titles = "".join(f"{kind:>11}" for kind in first.rates)
    lines = [f"{'back end':<11}{titles}   {'ratio':<14}ops off the reference"]
    for speed in speeds:
        rates = "".join(f"{rate:>11.2f}" if rate < 1000 else f"{rate:>11.0f}" for rate in speed.rates.values())
        ratios = ", ".join(f"{rate / first.rates[kind]:.2f}x" for kind, rate in speed.rates.items())
        fast = ", ".join(f"{op} ({backend})" for op, backend in speed.ops.items() if backend != "reference")
        lines.append(f"{speed.backend:<11}{rates}   {ratios:<14}{fast or 'none'}")
    return "\n".join(lines)


def bench_op(op: str, device: str, as_json: bool) -> None:
    """Run the repository's benchmark of one op (`benchmarks/bench_<op>.py`, pytest-benchmark) and print its table.

    Raises `UserError` outside a checkout, for an op without a benchmark, and where its correctness gate fails.
    """
    root = Path(__file__).resolve().parents[2]
    known = sorted(path.stem.removeprefix("bench_") for path in (root / "benchmarks").glob("bench_*.py"))
    if op not in known:
        hint = "" if known else "; ops are timed in a checkout of the repository only"
        raise UserError(f"bench: expected one of {', '.join(['generate', 'train', *known])}, got {op!r}{hint}")
    try:
        pytest = importlib.import_module("pytest")
        importlib.import_module("pytest_benchmark")
    except ImportError as error:
        raise UserError("bench: timing an op needs pytest-benchmark: pip install pytest-benchmark") from error
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    report = importlib.import_module("benchmarks.report")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{op}.json"
        target = [str(root / "benchmarks" / f"bench_{op}.py"), f"--rootdir={root}", "-p", "no:cacheprovider"]
        collect = ["-o", "python_files=bench_*.py", "-o", "python_functions=bench_*", "--benchmark-quiet", "-q"]
        chosen = ["-k", report.SHORT, f"--device={device}", f"--benchmark-json={path}"]
        with contextlib.redirect_stdout(sys.stderr):  # pytest's own lines are progress, the table is the result
            status = pytest.main([*target, *collect, *chosen])
        if status != pytest.ExitCode.OK:
            raise UserError(f"bench: the benchmark of {op} failed (pytest status {int(status)}), see above")
        if as_json:
            results = [entry["extra_info"] for entry in json.loads(path.read_text())["benchmarks"]]
            print(json.dumps({"what": op, "results": results}, indent=2))
        else:
            print(report.table(path))
