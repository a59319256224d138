"""A table of prompts to pictures.

| column | meaning | where it is missing |
|---|---|---|
| `prompt` | one sentence | the row fails |
| `id` | text or an integer, copied into the manifest | the row's index |
| `num_images` | pictures of this row | `--num` |
| `seed` | picture j of the row has the seed `seed + j` | `--seed` + the running number of the picture in the table |
| `steps`, `guidance`, `temperature` | as on the command line | as on the command line |

The manifest says of each picture which `row` it belongs to: rows count from 0, so that row i is line i + 1 of a .txt or
.jsonl file.

A picture depends on its own row and seed alone (`generation/engine.py`), so neither the process that draws it nor those
drawn beside it matter. Its PNG holds pixels and nothing else; one release of Pillow gives one sequence of bytes.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
from PIL import Image

from unif2ace import inputs
from unif2ace.batch.output import IMAGE_TYPE, IMAGES
from unif2ace.batch.record import Line
from unif2ace.batch.table import Row
from unif2ace.errors import UserError
from unif2ace.files import replace_file, sync_folder
from unif2ace.generation.engine import Face, GenerationEngine, Request
from unif2ace.generation.settings import GenerationConfig, check_count
from unif2ace.pipeline import UniF2acePipeline

COLUMNS = ("prompt", "id", "num_images", "seed", "steps", "guidance", "temperature")
MAX_IMAGES = 1_000_000  # of one row
TASK_IMAGES = 256  # most pictures of one task: rows of many are divided
FOLDER_IMAGES = 10_000  # pictures in one folder
FIELDS = (
    ("number", pa.int64()),
    ("row", pa.int64()),
    ("id", pa.string()),
    ("prompt", pa.string()),
    ("seed", pa.uint64()),
    ("steps", pa.int64()),
    ("guidance", pa.float64()),
    ("temperature", pa.float64()),
    ("image", IMAGE_TYPE),
    ("sha256", pa.string()),
    ("model_sha256", pa.string()),
    ("error", pa.string()),
)  # of a Parquet file; a manifest names the picture's `file` instead of `image`


@dataclass(frozen=True)
class FaceTask:
    """Some pictures of one row, numbered `numbers`; or why there are none. Holds what JSON can hold."""

    numbers: list[int]
    row: int
    id: str
    prompt: str | None = None
    seeds: list[int] | None = None
    steps: int | None = None
    guidance: float | None = None
    temperature: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Faces:
    """What drawing a table takes beside the model: defaults of the rows, and where the pictures go."""

    task_type: ClassVar[type] = FaceTask

    settings: GenerationConfig
    num_images: int
    seed: int
    model_sha256: str
    root: Path
    max_batch: int

    def count(self, row: Row) -> int:
        """Pictures of a row; a row that cannot be read, or does not say how many, has a single number."""
        try:
            row.check()
            return _num_images(row) if "num_images" in row.values else self.num_images
        except UserError:
            return 1

    def tasks(self, row: Row, first: int, numbers: list[int]) -> Iterator[FaceTask]:
        """The work of pictures `numbers` of a row whose first number is `first`."""
        values = row.values
        known = {"row": row.index, "id": row.id, "prompt": row.text("prompt")}
        try:
            row.check()
            known |= self._settings(row)
            start, base = (_seed(values["seed"]), first) if "seed" in values else (self.seed, 0)
        except UserError as error:
            yield FaceTask(numbers, **known, error=str(error))
            return
        for index in range(0, len(numbers), TASK_IMAGES):
            part = numbers[index : index + TASK_IMAGES]
            yield FaceTask(part, **known, seeds=[(start + number - base) % (inputs.MAX_SEED + 1) for number in part])

    def _settings(self, row: Row) -> dict[str, object]:
        values = row.values
        if "prompt" not in values:
            raise UserError("prompt: expected a sentence, got none")
        inputs.as_texts("prompt", [values["prompt"]])
        if "num_images" in values:
            _num_images(row)
        drawing = (values.get(name) for name in ("steps", "guidance", "temperature"))
        settings = self.settings.override_drawing(*drawing)
        return {
            "steps": settings.steps,
            "guidance": float(settings.guidance_scale),
            "temperature": float(settings.temperature),
        }

    def run(self, pipe: UniF2acePipeline, tasks: Iterable[FaceTask], partial: Path) -> Iterator[list[Line]]:
        """Draw; every list of lines comes after its pictures are on the disk. `partial`: name while writing one."""
        return pipe.each_on_backend(self._run(pipe, tasks, partial))

    def _run(self, pipe: UniF2acePipeline, tasks: Iterable[FaceTask], partial: Path) -> Iterator[list[Line]]:
        limit = self.settings.max_prompt_tokens
        engine = GenerationEngine(pipe.model, pipe.codec, self.max_batch, max_prompt_tokens=limit)
        for task in tasks:
            try:
                if task.error is not None:
                    raise UserError(task.error)
                ids = inputs.encode_texts("prompt", [task.prompt], pipe.tokenizer, limit, question=False)[0]
            except UserError as error:
                yield [self._line(task, index, error=str(error)) for index in range(len(task.numbers))]
                continue
            engine.submit(
                Request(
                    ids,
                    task.seeds,
                    task.steps,
                    task.guidance,
                    task.temperature,
                    self.settings.remask_tau,
                    key=task,
                )
            )
            if faces := list(engine.finished()):
                yield self._save(faces, partial)
        while engine.busy:
            engine.step()
            if faces := list(engine.finished()):
                yield self._save(faces, partial)

    def _save(self, faces: list[Face], partial: Path) -> list[Line]:
        lines, folders = [], set()
        for face in faces:
            task = face.request.key
            if face.error is not None:
                lines.append(self._line(task, face.index, error=face.error))
                continue
            number = task.numbers[face.index]
            name = f"{IMAGES}/{number // FOLDER_IMAGES:04d}/{number:08d}.png"
            png = encode_png(Image.fromarray(face.pixels.numpy()))
            replace_file(self.root / name, _writing(png), partial)
            folders.add((self.root / name).parent)
            lines.append(self._line(task, face.index, name, hashlib.sha256(png).hexdigest()))
        for folder in folders:
            sync_folder(folder)
        return lines

    def _line(
        self, task: FaceTask, index: int, file: str | None = None, digest: str | None = None, error: str | None = None
    ) -> Line:
        return {
            "number": task.numbers[index],
            "row": task.row,
            "id": task.id,
            "prompt": task.prompt,
            "seed": None if task.seeds is None else task.seeds[index],
            "steps": task.steps,
            "guidance": task.guidance,
            "temperature": task.temperature,
            "file": file,
            "sha256": digest,
            "model_sha256": self.model_sha256,
            "error": error,
        }


def encode_png(image: Image.Image) -> bytes:
    """The same bytes for the same pixels."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def _seed(value: object) -> int:
    if type(value) is not int or not 0 <= value <= inputs.MAX_SEED:
        raise UserError(f"seed: expected an integer from 0 to 2^64 - 1, got {value!r}")
    return value


def _num_images(row: Row) -> int:
    number = check_count("num_images", row.values["num_images"])
    if number > MAX_IMAGES:
        raise UserError(f"num_images: expected at most {MAX_IMAGES}, got {number}")
    return number


def _writing(data: bytes) -> Callable[[Path], object]:
    return lambda partial: partial.write_bytes(data)
