"""The work of a table on the machines of a Ray cluster, by Ray Data.

    driver                                              workers (actors with a model each)
    tasks --files of CHUNK results--> from_items(paths) --map_batches--> lines --iter_batches--> record

The driver reads the table and writes tasks into files of a few hundred results; a worker takes a file, makes the
results and hands back their lines, which the driver alone records. When a worker dies, Ray starts another one and
gives it the file again: pictures that stand already are replaced by the same bytes. When the driver dies, what is
recorded is kept, as on one machine. Memory of the driver: one path per file, and the lines on their way.

What Ray does not do here: move files. Table, model and `--out` have to be visible under the same path on every machine
(the model may be a bundled name or a hub id), and `unif2ace` has to be installed there.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, redirect_stdout
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch

from unif2ace.batch.answers import Answers, AnswerTask
from unif2ace.batch.faces import Faces, FaceTask
from unif2ace.batch.record import Line
from unif2ace.bundle import model_sha256, resolve_folder
from unif2ace.errors import UserError
from unif2ace.files import write_text
from unif2ace.memory import keep_freed_memory
from unif2ace.pipeline import UniF2acePipeline

CHUNK = 256  # most results of one file: what is made twice when a worker dies
CHUNKS_PER_WORKER = 4  # at least, where the table is long enough: the last worker to finish is not waited for long

MISTAKE = "mistake"  # in the place of lines: why a worker cannot go on


@dataclass(frozen=True)
class Loading:
    """How a worker loads its model."""

    model: str
    device: str
    backend: str
    threads: int


class Cluster:
    """A connection to the cluster of RAY_ADDRESS, or a new one on this machine, while the context lasts.

    Meanwhile stdout is stderr: Ray prints what it has to say about workers that die, and stdout is the result's.
    """

    def __init__(self) -> None:
        try:
            import ray
            import ray.data
        except ImportError as error:
            raise UserError("--engine ray: needs Ray: pip install 'unif2ace[ray]'") from error
        self.ray = ray

    def __enter__(self) -> Cluster:
        self.own = not self.ray.is_initialized()
        with ExitStack() as stack:
            stack.enter_context(redirect_stdout(sys.stderr))
            if self.own:
                try:
                    self.ray.init(log_to_driver=False, logging_level="error")
                except (ConnectionError, ValueError, RuntimeError) as error:
                    raise UserError(f"--engine ray: cannot reach the cluster: {str(error).splitlines()[0]}") from error
                stack.callback(self.ray.shutdown)
            self._left = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.close()

    def devices(self, kind: str) -> int:
        """How many GPUs or CPUs ("GPU", "CPU") the machines have together."""
        return int(self.ray.cluster_resources().get(kind, 0))

    def run(
        self,
        job: Faces | Answers,
        tasks: Iterable[FaceTask | AnswerTask],
        todo: int,
        load: Loading,
        workers: int,
        scratch: Path,
    ) -> Iterator[list[Line]]:
        """Lines of all tasks, as they come. `scratch`: folder for the files of tasks, removed afterwards."""
        on_gpu = load.device == "cuda"  # which one, Ray says
        free = self.devices("GPU") if on_gpu else self.devices("CPU") // load.threads
        if workers > free:
            raise UserError(
                f"--workers: expected at most {free}, one for {'a GPU' if on_gpu else f'{load.threads} CPU(s)'} of the "
                f"cluster, got {workers}"
            )
        context = self.ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # the run has its own
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        shutil.rmtree(scratch, ignore_errors=True)  # of a driver that was killed
        scratch.mkdir()
        try:
            size = max(1, min(CHUNK, todo // (CHUNKS_PER_WORKER * workers)))
            paths = list(write_chunks(tasks, size, scratch))
            found = self.ray.data.from_items(paths, override_num_blocks=len(paths)).map_batches(
                Worker,
                fn_constructor_args=(job, load, str(scratch)),
                batch_size=1,
                compute=self.ray.data.ActorPoolStrategy(size=min(workers, len(paths))),
                num_cpus=load.threads,
                num_gpus=int(on_gpu),
            )
            for batch in found.iter_batches(batch_size=None, batch_format="pyarrow"):
                lines = [json.loads(line) for line in batch["line"].to_pylist()]
                for line in lines:
                    if MISTAKE in line:
                        raise UserError(line[MISTAKE])
                yield lines
        except self.ray.exceptions.RayError as error:
            raise UserError(f"--engine ray: {str(error).strip().splitlines()[-1]}") from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


class Worker:
    """What runs on the machines: a model, and the tasks of one file after another.

    A `UserError` is handed back like a line: raised, it would reach the driver under Ray's traceback.
    """

    def __init__(self, job: Faces | Answers, load: Loading, scratch: str) -> None:
        import ray

        self.job, self.load = job, load
        self.partial = Path(scratch) / f"partial-{ray.get_runtime_context().get_worker_id()}"

    @cached_property
    def pipe(self) -> UniF2acePipeline:
        """The model, loaded for the first file."""
        load = self.load
        if model_sha256(resolve_folder(load.model)) != self.job.model_sha256:
            raise UserError(f"model: expected {load.model} of the machine that started the run, got another one")
        keep_freed_memory()
        torch.set_num_threads(load.threads)
        return UniF2acePipeline.from_pretrained(load.model, device=load.device, backend=load.backend)

    def __call__(self, batch: dict[str, object]) -> dict[str, list[str]]:
        """A batch holds one path."""
        texts = Path(str(batch["item"][0])).read_text(encoding="utf-8").splitlines()
        tasks = (self.job.task_type(**json.loads(text)) for text in texts)
        try:
            lines = [line for part in self.job.run(self.pipe, tasks, self.partial) for line in part]
        except UserError as error:
            lines = [{MISTAKE: str(error)}]
        return {"line": [json.dumps(line) for line in lines]}


def write_chunks(tasks: Iterable[FaceTask | AnswerTask], size: int, folder: Path) -> Iterator[str]:
    """Files of tasks, each with `size` results or a single task."""
    texts: list[str] = []
    results = number = 0
    for task in tasks:
        if texts and results + len(task.numbers) > size:
            yield _write_chunk(folder / f"{number:08d}.jsonl", texts)
            texts, results, number = [], 0, number + 1
        texts.append(json.dumps(asdict(task)))
        results += len(task.numbers)
    if texts:
        yield _write_chunk(folder / f"{number:08d}.jsonl", texts)


def _write_chunk(path: Path, texts: list[str]) -> str:
    return str(write_text(path, "\n".join(texts)))
