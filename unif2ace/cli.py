"""The command `unif2ace`: what it can be asked, and how mistakes are reported.

Only the standard library is imported here, so that help is instant; `unif2ace.commands` does the work. A mistake of the
user ends with one sentence on stderr and status 2, an interrupt with status 130, a table some of whose rows have failed
with status 1; results go to stdout, progress to stderr and only where that is a terminal.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import unif2ace
from unif2ace import console
from unif2ace.errors import UserError

MODEL = "avatars-tiny"
MAX_FACES, MAX_BATCH, MAX_THREADS = 1_000_000, 65_536, 1024  # more is a slip of the keyboard, and would take all memory
START = """start here:
  unif2ace demo
  unif2ace generate "a smiling person with red hair" --num 16 --out faces.png
  unif2ace ask face.png "What color is the hair?"

unif2ace COMMAND --help explains a command by examples.
"""


class _Parser(argparse.ArgumentParser):
    """Reports like every other mistake: one line, status 2. Options may stand anywhere among the arguments."""

    _gathering = False  # `parse_known_intermixed_args` calls `parse_known_args` itself

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """argparse takes a list of arguments up to the first option only; here all of them are gathered."""
        asks_for_help = not {"-h", "--help"}.isdisjoint(args or ())  # which is written as nothing is being gathered
        if self._subparsers is not None or self._gathering or asks_for_help:
            return super().parse_known_args(args, namespace)
        self._gathering = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._gathering = False

    def error(self, message: str) -> NoReturn:
        console.complain(f"{message} (see {self.prog} --help)")
        raise SystemExit(2)


def _count(high: int = 2**31 - 1) -> Callable[[str], int]:
    """The type of an option: an integer from 1 to `high`."""

    def count(text: str) -> int:
        if not text.isdecimal() or not 1 <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"expected an integer from 1 to {high}, got {text[:40]!r}")
        return int(text)

    return count


def _listed(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=MODEL, help="a bundled name, a folder or a hub id (default: %(default)s)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--backend", default="auto", help="auto, reference, native or triton (default: %(default)s)")
    _machine(parser)


def _machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=_count(MAX_THREADS), metavar="N", help="CPU threads (default: all cores)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of sentences")


def _sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, metavar="T", help="denoising steps; fewer are faster")
    parser.add_argument(
        "--guidance", type=float, metavar="W", help="how strictly to follow the sentence; 0 is twice as fast"
    )
    parser.add_argument("--temperature", type=float, metavar="X", help="0 takes the likeliest tokens, 1 samples")


def _table(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch-size",
        type=_count(MAX_BATCH),
        default=32,
        metavar="N",
        help="results made at a time (default: %(default)s)",
    )
    parser.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="for a table; ray: the cluster of RAY_ADDRESS, else a new one here (default: %(default)s)",
    )
    parser.add_argument(
        "--workers", type=_count(), default=1, metavar="N", help="--engine ray: how many (default: %(default)s)"
    )


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(
        prog="unif2ace",
        description="Draw faces from sentences and answer questions about faces.",
        epilog=START,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"unif2ace {unif2ace.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, summary: str, *examples: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=summary[0].lower() + summary[1:].rstrip("."),
            description=summary,
            epilog="examples:\n" + "\n".join(f"  {example}" for example in examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    demo = add(
        "demo",
        "Show everything the bundled model does, in under a minute.",
        "unif2ace demo",
        "unif2ace demo --out pictures",
    )
    demo.add_argument("--out", default="demo", help="folder for the pictures and answers (default: %(default)s)")
    demo.add_argument("--model", default=MODEL, help="a bundled name, a folder or a hub id (default: %(default)s)")

    generate = add(
        "generate",
        "Draw faces from sentences.",
        'unif2ace generate "a smiling person with red hair" --num 16 --seed 7 --out faces.png   # a grid',
        'unif2ace generate "a bald man with a long beard" --num 100 --out faces   # a folder of PNGs',
        'unif2ace generate "a sad face" "a happy face" --steps 8 --guidance 1.5   # faster',
        'unif2ace generate "dark sunglasses" --image face.png --mask keep.png     # redraw where keep.png is black',
        "unif2ace generate --prompts prompts.jsonl --out faces             # a table; stopped, it goes on",
        "torchrun --nproc-per-node 8 -m unif2ace generate --prompts prompts.parquet --out faces.parquet",
    )
    generate.add_argument("prompt", nargs="*", help="what to draw; each prompt gives --num faces")
    generate.add_argument(
        "--prompts",
        metavar="FILE",
        help="a table instead: .txt (one prompt per line), or .jsonl or .parquet with the columns prompt and, where "
        "wanted, id, num_images, seed, steps, guidance, temperature",
    )
    generate.add_argument(
        "--num", type=_count(MAX_FACES), default=1, metavar="N", help="faces per prompt (default: %(default)s)"
    )
    generate.add_argument(
        "--seed", type=int, default=0, metavar="S", help="face i is drawn with seed S + i (default: %(default)s)"
    )
    generate.add_argument(
        "--out",
        help="a picture file (several faces: a grid), or a folder (default: faces.png); for --prompts a folder or a "
        ".parquet file (default: faces)",
    )
    generate.add_argument("--image", help="in-painting: the picture to keep parts of")
    generate.add_argument("--mask", help="in-painting: a picture, white where --image is kept")
    generate.add_argument("--fit", action="store_true", help="crop and resize --image and --mask to the model's size")
    _sampling(generate)
    _table(generate)
    _common(generate)

    ask = add(
        "ask",
        "Answer questions about a face, or describe it.",
        'unif2ace ask face.png "What color is the hair?" "Is there a beard or moustache?"',
        "unif2ace ask face.png --caption",
        'unif2ace ask photo.jpg --fit --json "What is worn over the eyes?"',
        "unif2ace ask --questions questions.jsonl --out answers.jsonl",
    )
    ask.add_argument("image", nargs="?", help="a picture file")
    ask.add_argument("question", nargs="*", help="one or more questions")
    ask.add_argument("--caption", action="store_true", help="describe the face as well")
    ask.add_argument(
        "--questions",
        metavar="FILE",
        help="a table instead: .jsonl or .parquet with the columns image (a path, relative to the table), question or "
        "caption (true: describe), and id",
    )
    ask.add_argument("--out", help="for --questions: a .jsonl or .parquet file (default: answers.jsonl)")
    ask.add_argument("--fit", action="store_true", help="crop and resize the picture to the model's size")
    _table(ask)
    _common(ask)

    train = add(
        "train",
        "Train a model from a recipe; a run that stopped goes on where it was.",
        "unif2ace train recipes/avatars-tiny.toml --out runs/avatars-tiny",
        "unif2ace train recipes/avatars-tiny.toml --out runs/avatars-tiny --stage data --stage tokenizer",
        "unif2ace train recipes/ablations/no-score.toml --out runs/no-score --reuse runs/avatars-tiny",
    )
    train.add_argument("recipe", help="a TOML file, such as recipes/avatars-tiny.toml")
    train.add_argument("--out", required=True, help="folder of the run; its export/ is the finished model")
    train.add_argument(
        "--stage", action="append", metavar="NAME", help="run only this stage (may be repeated; default: all)"
    )
    train.add_argument(
        "--reuse", metavar="DIR", help="another run: its finished stages before `train` are read, not repeated"
    )
    train.add_argument("--threads", type=_count(MAX_THREADS), metavar="N", help="CPU threads (default: all cores)")

    data = add(
        "data", "Make a dataset of labelled faces.", "unif2ace data avatars --out data/avatars --faces 30000 --seed 0"
    )
    data.add_argument("kind", choices=("avatars",), help="avatars: cartoon faces with exact labels, drawn on the spot")
    data.add_argument("--out", required=True, help="folder for the Parquet files")
    data.add_argument("--faces", type=_count(), default=24000, metavar="N", help="how many (default: %(default)s)")
    data.add_argument("--seed", type=int, default=0, metavar="S", help="which ones (default: %(default)s)")
    data.add_argument(
        "--size", type=_count(), default=64, metavar="PIXELS", help="side of a picture (default: %(default)s)"
    )
    data.add_argument("--workers", type=_count(), metavar="W", help="processes (default: one per core)")

    evaluate = add(
        "evaluate",
        "Measure a model on faces it has not seen: drawing, answering, describing.",
        "unif2ace evaluate",
        "unif2ace evaluate --model runs/avatars-tiny/export --data runs/avatars-tiny/data --faces 512 --json",
    )
    evaluate.add_argument("--data", help="dataset folder; its test split is used (default: held-out faces are drawn)")
    evaluate.add_argument(
        "--faces", type=_count(), default=256, metavar="N", help="how many faces (default: %(default)s)"
    )
    evaluate.add_argument(
        "--seed", type=int, default=0, metavar="S", help="face i is drawn with seed S + i (default: %(default)s)"
    )
    _sampling(evaluate)
    _common(evaluate)

    doctor = add(
        "doctor",
        "Say what this machine can run, and why not the rest.",
        "unif2ace doctor",
        "unif2ace doctor --json",
        "unif2ace doctor --kernels             # compile the GPU kernels: registers, shared memory, spills",
        "unif2ace doctor --kernels experts     # of one op",
    )
    doctor.add_argument(
        "--kernels", nargs="*", metavar="OP", help="what the GPU kernels (of these ops; default: all) cost the chip"
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object instead of a table")

    bench = add(
        "bench",
        "Time back ends against each other in one interleaved run.",
        "unif2ace bench                                            # faces and answers per second",
        "unif2ace bench generate --model random-100m               # where matrix products dominate",
        "unif2ace bench train --backends reference,native          # training tokens per second",
        "unif2ace bench routing --shapes train,decode-64           # one op, in a checkout of the repository",
        "unif2ace bench experts --backends native --trace t.json   # look at it in chrome://tracing",
        "unif2ace bench experts --tune --shapes train              # on a GPU: find the launch configurations",
    )
    bench.add_argument(
        "what", nargs="?", default="generate", help="generate, train or the name of an op (default: %(default)s)"
    )
    bench.add_argument("--faces", type=_count(), metavar="N", help="faces in a batch (default: 16; random-100m: 4)")
    bench.add_argument("--steps", type=_count(), metavar="T", help="denoising steps of a face (default: the model's)")
    bench.add_argument(
        "--rounds", type=_count(), default=5, metavar="N", help="measurements per back end (default: %(default)s)"
    )
    bench.add_argument(
        "--model", default=MODEL, help="a bundled name, a folder, a hub id, or random-100m (default: %(default)s)"
    )
    bench.add_argument(
        "--shapes", type=_listed, default=[], metavar="A,B", help="an op's problem sizes (default: a short list)"
    )
    bench.add_argument(
        "--backends", type=_listed, default=[], metavar="A,B", help="which to time (default: all that run here)"
    )
    bench.add_argument(
        "--tune", action="store_true", help="experts on a GPU: measure launch configurations, write kernels/tuning/"
    )
    bench.add_argument("--trace", metavar="FILE", help="write a Chrome trace with one run of everything timed")
    bench.add_argument("--device", help="cpu or cuda (default: cuda where there is one; for an op: cpu)")
    _machine(bench)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 where some results of a table failed or a kernel breaks a limit, 2
    for mistakes, 130 when interrupted.
    """
    console.open_streams()
    parser = build_parser()
    options = parser.parse_args(arguments)
    for name, value in vars(options).items():
        if value == "":  # what a shell makes of a variable that is not set
            parser.error(f"{name.replace('_', '-')}: expected something, got an empty string")
    try:
        with console.Interrupts():
            from unif2ace import commands, memory

            memory.keep_freed_memory()
            status = getattr(commands, options.command)(options)
            sys.stdout.flush()
    except UserError as error:
        console.complain(str(error))
        return 2
    except KeyboardInterrupt:
        print("unif2ace: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader (head, a pager) has gone
        console.silence(sys.stdout)
        return 141
    except OSError as error:  # most of them are `UserError`s by now
        if error.filename is None:  # a full disk behind stdout
            console.silence(sys.stdout)
        console.complain(f"{error.filename or 'cannot write the output'}: {error.strerror or error}")
        return 2
    except (MemoryError, RuntimeError) as error:
        lack = console.lack_of_memory(error)
        if lack is None:
            raise
        hint = "; a smaller --batch-size takes less" if hasattr(options, "batch_size") else ""
        console.complain(f"not enough memory: {lack}{hint}")
        return 2
    return status or 0


if __name__ == "__main__":
    raise SystemExit(main())
