"""Streams that are closed or full, Ctrl-C that a library swallows, memory that does not suffice: never a traceback."""

import os
import signal
import subprocess
import sys

import pytest

from unif2ace import commands, console
from unif2ace.cli import main

PROGRAM = """
import sys, types
import unif2ace
unif2ace.commands = sys.modules["unif2ace.commands"] = types.ModuleType("unif2ace.commands")
unif2ace.commands.doctor = lambda options: print("fine too", file=sys.stderr) or print("fine")
from unif2ace.cli import main
sys.exit(main(["doctor"]))
"""


def shell(redirection):
    """A command that prints a line to either stream, without the weight of a real one."""
    line = f'exec "$0" -c "$1" {redirection}'
    paths = [os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(
        ["sh", "-c", line, sys.executable, PROGRAM], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("redirection", "status", "out", "error"),
    [
        ("", 0, "fine\n", "fine too\n"),
        (">&-", 0, "", "fine too\n"),
        ("2>&-", 0, "fine\n", ""),
        (">&- 2>&-", 0, "", ""),
        (">/dev/full", 2, "", "fine too\nunif2ace: error: cannot write the output: No space left on device\n"),
    ],
)
def test_streams_that_are_closed_or_full(redirection, status, out, error):
    run = shell(redirection)
    assert (run.returncode, run.stdout, run.stderr) == (status, out, error)


def raising(error):
    def command(options):
        raise error

    return command


def swallowing(options):
    """As a library does that calls back into Python."""
    try:
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()
    except KeyboardInterrupt:
        raise ValueError("could not determine the shape") from None


def test_an_interrupt_that_a_library_turns_into_its_own_error(monkeypatch, capsys):
    monkeypatch.setattr(commands, "doctor", swallowing)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "unif2ace: interrupted\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_without_an_interrupt_stays_what_it_is():
    with pytest.raises(ValueError, match="mine"), console.Interrupts():
        raise ValueError("mine")


def test_an_interrupt_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with console.Interrupts() as interrupts:
            os.kill(os.getpid(), signal.SIGINT)
        assert not interrupts.came
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_error_of_the_system_names_its_file(monkeypatch, capsys):
    monkeypatch.setattr(commands, "doctor", raising(PermissionError(13, "Permission denied", "weights")))
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == "unif2ace: error: weights: Permission denied\n"


def test_too_little_memory_is_one_sentence(monkeypatch, capsys):
    text = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: 5 bytes\nmore"
    for error, sentence in [
        (RuntimeError(text), "not enough memory: can't allocate memory: 5 bytes; a smaller --batch-size takes less"),
        (MemoryError(), "not enough memory: none is left; a smaller --batch-size takes less"),
    ]:
        monkeypatch.setattr(commands, "generate", raising(error))
        assert main(["generate", "a face"]) == 2
        assert capsys.readouterr().err == f"unif2ace: error: {sentence}\n"
    monkeypatch.setattr(commands, "generate", raising(RuntimeError("illegal memory access")))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        main(["generate", "a face"])
