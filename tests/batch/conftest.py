"""A saved tiny model, and tables to work on."""

import json

import pytest

from tests.tiny import tiny_pipeline
from unif2ace.cli import main


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return str(tiny_pipeline().save_pretrained(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture
def table(tmp_path):
    """Write rows to a .jsonl file; a string is written as it is."""

    def write(*rows, name="table.jsonl"):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / name).write_text("".join(line + "\n" for line in lines))
        return str(tmp_path / name)

    return write


@pytest.fixture
def generate(model, monkeypatch):
    """`unif2ace generate --prompts ...` in this process; returns the exit status."""

    def run(prompts, out, *options, shard=None):
        for name, value in zip(("RANK", "WORLD_SIZE"), shard or (0, 1), strict=True):
            monkeypatch.setenv(name, str(value))
        return main(["generate", "--prompts", prompts, "--out", str(out), "--model", model, "--steps", "2", *options])

    return run


@pytest.fixture
def ask(model, monkeypatch):
    """`unif2ace ask --questions ...` in this process; returns the exit status."""

    def run(questions, out, *options, shard=None):
        for name, value in zip(("RANK", "WORLD_SIZE"), shard or (0, 1), strict=True):
            monkeypatch.setenv(name, str(value))
        return main(["ask", "--questions", questions, "--out", str(out), "--model", model, *options])

    return run
