"""How a command meets the world outside: streams that may be closed or full, Ctrl-C, memory that does not suffice.

Only the standard library is imported here.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import AbstractContextManager
from types import FrameType
from typing import TextIO


def complain(message: str) -> None:
    """One line on stderr."""
    print("unif2ace: error: " + " ".join(message.split()), file=sys.stderr)


def open_streams() -> None:
    """Give stdout and stderr a place where a service or a shell (`>&-`) has closed them: Python leaves None there."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))


def silence(stream: TextIO) -> None:
    """What is left in it goes nowhere: Python's exit would write it, and fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Interrupts(AbstractContextManager):
    """Whatever comes of Ctrl-C leaves as `KeyboardInterrupt`: libraries turn it into errors of their own.

    Where the signal is ignored, as by `nohup`, or someone else's, it stays so.
    """

    def __enter__(self) -> Interrupts:
        self.came = False
        ours = threading.current_thread() is threading.main_thread()
        self.handled = ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self.handled:
            signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        signal.default_int_handler(number, frame)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.handled:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.came and isinstance(error, Exception):
            raise KeyboardInterrupt from error


def lack_of_memory(error: MemoryError | RuntimeError) -> str | None:
    """What did not fit into memory; None where that is not what the error says."""
    text = str(error)
    if isinstance(error, MemoryError):
        return text or "none is left"
    if "out of memory" not in text and "allocate memory" not in text:  # torch has no other sign of it on a CPU
        return None
    return (text.partition("DefaultCPUAllocator: ")[2] or text).splitlines()[0]
