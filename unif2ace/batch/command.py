"""`unif2ace generate --prompts` and `unif2ace ask --questions`: whole tables, resumable, on one machine or many.

* one process: `unif2ace generate --prompts prompts.jsonl --out faces`;
* shards: under `torchrun`, or anything else that sets RANK and WORLD_SIZE, process r takes the rows r, r + WORLD_SIZE,
  ...; they share `--out` and nothing else, and the last one to end writes the result. They need not be as many when
  the run is gone on with;
* a Ray cluster: `--engine ray`.

Exit status: 1 if results have failed, their reasons being in the result. Of several shards only those that find all
others done say so: torchrun ends the others when one fails.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

import unif2ace
from unif2ace import inputs
from unif2ace.batch import answers, faces
from unif2ace.batch.answers import Answers, AnswerTask
from unif2ace.batch.faces import Faces, FaceTask
from unif2ace.batch.output import Output
from unif2ace.batch.ray import Cluster, Loading
from unif2ace.batch.record import OPEN, Line, Record
from unif2ace.batch.table import Table, place
from unif2ace.bundle import load_defaults, model_sha256, resolve_folder
from unif2ace.errors import UserError
from unif2ace.pipeline import UniF2acePipeline

REASONS_SHOWN = 3


def generate(options: argparse.Namespace) -> int:
    """`unif2ace generate --prompts`; returns the exit status."""
    for name in ("prompt", "image", "mask", "fit"):
        if getattr(options, name):
            raise UserError(f"generate: expected --prompts without {'--' * (name != 'prompt')}{name}, got both")
    folder = resolve_folder(options.model)
    output = Output.of_faces(Path(options.out or "faces"), faces.FIELDS)
    settings = load_defaults(folder).override_drawing(options.steps, options.guidance, options.temperature)
    inputs.as_seeds(options.seed, 1)
    digest = model_sha256(folder)
    job = Faces(settings, options.num, options.seed, digest, output.root.absolute(), options.batch_size)
    table = Table.open(Path(options.prompts), faces.COLUMNS, job.count)
    chosen = {
        "num_images": options.num,
        "seed": options.seed,
        "steps": settings.steps,
        "guidance": float(settings.guidance_scale),
        "temperature": float(settings.temperature),
    }
    return _Run(options, "generate", "image", job, table, output, chosen).run()


def ask(options: argparse.Namespace) -> int:
    """`unif2ace ask --questions`; returns the exit status."""
    for name in ("image", "question", "caption"):
        if getattr(options, name):
            raise UserError(f"ask: expected --questions without {'--' * (name == 'caption')}{name}, got both")
    folder = resolve_folder(options.model)
    output = Output.of_answers(Path(options.out or "answers.jsonl"), answers.FIELDS)
    questions = Path(options.questions)
    if questions.suffix.lower() == ".txt":
        raise UserError(f"--questions: expected a table with columns, .jsonl or .parquet, got {questions}")
    job = Answers(questions.absolute().parent, options.fit, model_sha256(folder), options.batch_size)
    table = Table.open(questions, answers.COLUMNS, job.count)
    return _Run(options, "ask", "answer", job, table, output, {"fit": options.fit}).run()


@dataclass(frozen=True)
class _Run:
    options: argparse.Namespace
    command: str
    unit: str
    job: Faces | Answers
    table: Table
    output: Output
    chosen: dict[str, object]

    def run(self) -> int:
        """Do what is not done yet, and write the result."""
        rank, world_size = shard()
        if self.options.engine != "ray":
            device = self.options.device or _local_device()
            return self._record(rank, world_size, device, None)()
        if world_size > 1:
            raise UserError("--engine ray: expected a single process, got WORLD_SIZE > 1; Ray divides the work itself")
        with Cluster() as cluster:
            device = self.options.device or ("cuda" if cluster.devices("GPU") else "cpu")
            report = self._record(rank, world_size, device, cluster)
        return report()

    def _record(self, rank: int, world_size: int, device: str, cluster: Cluster | None) -> Callable[[], int]:
        """Do the work; what to call for the report of it, which gives the exit status."""
        output, table = self.output, self.table
        output.refuse_foreign()
        settings = {
            "command": self.command,
            "unif2ace": unif2ace.__version__,
            "model_sha256": self.job.model_sha256,
            "table_sha256": table.sha256,
            **self.chosen,
            "device": device.partition(":")[0],
            "backend": self.options.backend,
        }
        started, made = time.perf_counter(), 0
        root = None if output.pictures_moved else output.root
        with Record(output.parts, settings, table.total, rank, root) as record:
            own = sum(map(len, table.numbers(rank, world_size)))
            todo = sum(not record.done(n) for numbers in table.numbers(rank, world_size) for n in numbers)
            tasks = self._tasks(record, rank, world_size)
            with tqdm(total=own, initial=own - todo, unit=self.unit, disable=None) as bar:
                try:
                    for lines in self._lines(record, tasks, todo, device, cluster):
                        record.append(lines)
                        made += sum(line["error"] is None for line in lines)
                        bar.update(len(lines))
                except KeyboardInterrupt:
                    number = record.total - record.state.count(OPEN)
                    bar.write(
                        f"unif2ace: {number} of {record.total} {self.unit}s are recorded; the same command goes on",
                        file=sys.stderr,
                    )
                    raise
            seconds = time.perf_counter() - started
            finished = output.finish(record)
            return partial(self._report, record, own, todo, made, seconds, finished, device)

    def _tasks(self, record: Record, rank: int, world_size: int) -> Iterator[FaceTask | AnswerTask]:
        for row, numbers in self.table.rows(rank, world_size):
            if missing := [number for number in numbers if not record.done(number)]:
                yield from self.job.tasks(row, numbers.start, missing)

    def _lines(
        self,
        record: Record,
        tasks: Iterator[FaceTask | AnswerTask],
        todo: int,
        device: str,
        cluster: Cluster | None,
    ) -> Iterator[list[Line]]:
        options = self.options
        if not todo:
            return iter(())
        if cluster is not None:
            path = Path(options.model).expanduser()  # a path is made absolute: workers start in other folders
            model = str(path.absolute()) if resolve_folder(options.model) == path else options.model
            load = Loading(model, device.partition(":")[0], options.backend, options.threads or 1)
            return cluster.run(self.job, tasks, todo, load, options.workers, record.tasks.absolute())
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        pipe = UniF2acePipeline.from_pretrained(options.model, device=device, backend=options.backend)
        return self.job.run(pipe, tasks, record.partial)

    def _report(
        self, record: Record, own: int, todo: int, made: int, seconds: float, finished: bool, device: str
    ) -> int:
        """Print what came of it. Of `own` results `todo` have been tried now, and `made` of these have succeeded."""
        failed = record.failed if finished else 0
        facts = {
            "out": str(self.output.final),
            "finished": finished,
            f"{self.unit}s": own,
            "done_before": own - todo,
            "made": made,
            "failed": failed,
            "seconds": round(seconds, 4),
            f"{self.unit}s_per_second": round(made / seconds, 3),
            "model": self.options.model,
            "model_sha256": self.job.model_sha256,
            "device": device,
        }
        if self.options.json:
            print(json.dumps(facts, indent=2))
        else:
            before = f", {own - todo} were done before" if own > todo else ""
            waiting = "" if finished else "; other processes are still at work"
            print(
                f"{self.output.final}: {own} {self.unit}s{before}; {made} made in {seconds:.1f} s "
                f"({made / seconds:.2f} {self.unit}s/s){waiting}"
            )
        if failed:
            reasons = (
                f"{place(self.table.path, line.get('row', line['number']))}: {line['error']}"
                for line in record.lines_in_order()
                if line["error"] is not None
            )
            for reason in islice(reasons, REASONS_SHOWN):
                print(f"unif2ace: {' '.join(reason.split())}", file=sys.stderr)
            print(f"unif2ace: {failed} of {record.total} {self.unit}s failed; see {self.output.final}", file=sys.stderr)
        return int(failed > 0)


def shard() -> tuple[int, int]:
    """(rank, number of processes) from RANK and WORLD_SIZE, as torchrun and other launchers set them; else (0, 1)."""
    texts = [os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))]
    if not all(text.isdecimal() for text in texts) or not int(texts[0]) < int(texts[1]):
        raise UserError(f"RANK, WORLD_SIZE: expected integers with RANK below WORLD_SIZE, got {' and '.join(texts)}")
    return int(texts[0]), int(texts[1])


def _local_device() -> str:
    """The GPU of this process where there are some, else the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    local = os.environ.get("LOCAL_RANK", "")
    return f"cuda:{int(local) % torch.cuda.device_count()}" if local.isdecimal() else "cuda"
