"""What a run has done so far: lines that are only ever appended, each on the disk before the next result is begun.

    parts/run.json        settings of the run, its model and its table, by their sha256
    parts/00000.jsonl     results recorded by process 0, one JSON object per line;   parts/00001.jsonl  process 1, ...

A run that was interrupted, killed or cut off from power goes on from these files, with any number of processes:

* a line is written, and forced to the disk, after its picture has got its name: a recorded picture is there, whole;
* a last line without its end is what a crash left of it: it counts as absent, and its writer cuts it off;
* a picture that is gone is made again, and so is what had failed; a success stands above a failure;
* another model, table or other settings are refused: the result would be of two kinds.

Nobody writes another's part. A lock (flock) keeps a second process from writing the same. Another one, on run.lock,
shared by all that are at work, keeps the settings as they are: only who is alone and finds no results yet writes them.

Memory: one byte per result, 9 more while they are put in order.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from array import array
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from io import FileIO
from pathlib import Path

from unif2ace.errors import UserError
from unif2ace.files import check_folder, replace_file, sync_folder

OPEN, DONE, FAILED = range(3)
RUN_FILE = "run.json"
RUN_LOCK = "run.lock"

Line = dict[str, object]


class Record(AbstractContextManager):
    """The record in `folder` of a run with results 0 .. total - 1, for process `rank` to go on with.

    `settings` are values JSON can hold. `root`: where the pictures that lines name are expected; None: not looked for.
    Raises `UserError` for a folder of another run, one in use, or one that cannot be written.
    """

    def __init__(
        self, folder: Path, settings: dict[str, object], total: int, rank: int = 0, root: Path | None = None
    ) -> None:
        self.folder, self.root = folder, root
        self.state = bytearray(total)
        self.partial = folder / f"partial-{rank:05d}"  # what this process is writing; overwritten after a crash
        self.tasks = folder / "tasks"  # files that an engine divides the work into
        check_folder(folder)
        part = folder / f"{rank:05d}.jsonl"
        with ExitStack() as stack:
            own = open_lock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)  # before all else: `partial` is this process's alone
            if own is None:
                raise UserError(f"{part}: expected to be its only writer, but another process is at work on it")
            self._file = stack.enter_context(own)
            self._settle(settings, stack)
            _cut_incomplete_line(part)
            sync_folder(folder)
            self.refresh()
            self._locks = stack.pop_all()

    def __exit__(self, *_: object) -> None:
        self._locks.close()

    def _settle(self, settings: dict[str, object], stack: ExitStack) -> None:
        """Write the settings, or compare them; `stack` gets the lock that keeps them."""
        path = self.folder / RUN_LOCK
        alone = open_lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lock = stack.enter_context(alone or open_lock(path, fcntl.LOCK_SH))
        if alone is not None and not any(part.stat().st_size for part in self._parts()):
            text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
            path = self.folder / RUN_FILE
            replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"), self.partial)
        fcntl.flock(lock, fcntl.LOCK_SH)
        self._check_settings(settings)

    def _check_settings(self, settings: dict[str, object]) -> None:
        path = self.folder / RUN_FILE
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: expected the settings of a run, got: {error}") from error
        names = sorted(set(found) | set(settings)) if isinstance(found, dict) else []
        other = [name for name in names if found.get(name) != settings.get(name)]
        if other or not names:
            differences = "; ".join(f"{name} was {found.get(name)!r}, is {settings.get(name)!r}" for name in other)
            raise UserError(
                f"{self.folder}: holds a run with other settings ({differences}); give the same ones to go on with it, "
                "or another --out"
            )

    def append(self, lines: Sequence[Line]) -> None:
        """Record results, for good."""
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        rest = memoryview(text.encode("utf-8", errors="backslashreplace"))  # a lone surrogate is no UTF-8
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(f"cannot write {self._file.name}: {error.strerror or error}") from error
        for line in lines:
            self._note(line)

    def refresh(self) -> None:
        """Take note of what all processes have recorded."""
        self.state = bytearray(len(self.state))
        for part in self._parts():
            for _, line in _complete_lines(part):
                self._note(line)

    def done(self, number: int) -> bool:
        """Is there a result that need not be made again?"""
        return self.state[number] == DONE

    @property
    def total(self) -> int:
        """How many results there are to be."""
        return len(self.state)

    @property
    def complete(self) -> bool:
        """Has every result been tried?"""
        return OPEN not in self.state

    @property
    def failed(self) -> int:
        """Results of which there is only the reason why they are none."""
        return self.state.count(FAILED)

    def lines_in_order(self) -> Iterator[Line]:
        """One line per recorded number, ascending: the last success, else the last failure."""
        parts = self._parts()
        offsets, owners = array("q", [-1]) * len(self.state), array("H", [0]) * len(self.state)
        kinds = bytearray(len(self.state))
        for owner, part in enumerate(parts):
            for offset, line in _complete_lines(part):
                number, kind = line["number"], self._kind(line)
                if kind == DONE or kinds[number] != DONE:
                    kinds[number], offsets[number], owners[number] = kind, offset, owner
        with ExitStack() as stack:
            files = [stack.enter_context(open(part, "rb")) for part in parts]
            for offset, owner in zip(offsets, owners, strict=True):
                if offset >= 0:
                    files[owner].seek(offset)
                    yield json.loads(files[owner].readline())

    def tidy(self) -> None:
        """Remove what processes that were killed have left half done; once all is recorded, nobody needs it."""
        for path in self.folder.glob("partial-*"):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.tasks, ignore_errors=True)

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("[0-9]*.jsonl"))

    def _kind(self, line: Line) -> int:
        if line["error"] is not None:
            return FAILED
        gone = self.root is not None and not (self.root / line["file"]).exists()
        return OPEN if gone else DONE

    def _note(self, line: Line) -> None:
        number = line["number"]
        self.state[number] = self._kind(line) if self.state[number] != DONE else DONE


def open_lock(path: Path, operation: int) -> FileIO | None:
    """The file, to append to and with a lock on it as flock does it; None where LOCK_NB forbids to wait for another."""
    try:
        file = FileIO(path, "a+")  # unbuffered: nothing is left to write when a full disk ends the run
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    try:
        fcntl.flock(file, operation)
    except BlockingIOError:
        file.close()
        return None
    except OSError as error:
        file.close()
        raise UserError(f"{path}: expected a file system that can lock files: {error.strerror or error}") from error
    return file


def _cut_incomplete_line(path: Path) -> None:
    with open(path, "rb+") as file:
        file.truncate(sum(len(line) for line in file if line.endswith(b"\n")))


def _complete_lines(path: Path) -> Iterator[tuple[int, Line]]:
    """(offset, line) of every complete line."""
    offset = 0
    with open(path, "rb") as file:
        for number, text in enumerate(file, 1):
            if not text.endswith(b"\n"):
                return
            try:
                yield offset, json.loads(text)
            except ValueError as error:
                raise UserError(f"{path}:{number}: expected a recorded result, got: {error}") from error
            offset += len(text)
