"""Faces, answers and training tokens per second for several back ends, in one interleaved run.

Rounds go through all back ends in turn, so that a machine that slows down slows all of them: the ratio of two medians
of one run means something where absolute times do not. A first round, untimed, fills caches and loads kernels.

What is timed is a `Workload`: `drawing`, `answering` and `training` make them, `on_backend` binds a call to a back end.
`load` knows two models more than the pipeline does, with random weights: they draw noise, at a trained model's speed.
`random-100m` stands between the tokenizer, codec and encoders of `avatars-tiny`, and its products are large enough to
matter; `random-1.8b` has the shape of `unif2ace-1.8b`, with 256 tokens of 8192 codes for pictures of 128 pixels.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image

from unif2ace.codec import SmallCodec, SmallCodecConfig
from unif2ace.config import SequenceMoEConfig, preset
from unif2ace.errors import UserError
from unif2ace.evaluation import tracing
from unif2ace.evaluation.faces import held_out_faces
from unif2ace.ops import use_backend
from unif2ace.pipeline import UniF2acePipeline

BACKENDS_COMPARED = ("reference", "auto")
RANDOM_MODELS: dict[str, tuple[str, dict[str, object]]] = {  # name -> preset, and what differs from it
    "random-100m": ("avatars-100m", {}),
    "random-1.8b": (
        "unif2ace-1.8b",
        {
            "image_size": 128,
            "end_of_text": 0,
            "sequence_moe": SequenceMoEConfig(clip_rows=64, clip_width=64, face_rows=1, face_width=64),
        },
    ),
}
CODEC_LEVELS = (8, 8, 8, 4, 4)  # 8192 codes
PROMPTS = ("a smiling person with red hair", "a fair face, wearing round glasses, in a blue hoodie")
QUESTIONS = ("What color is the hair?", "What is the mouth doing?", "What eyewear is worn?", "What clothing is worn?")


T = TypeVar("T")


class Size(NamedTuple):
    """How much one call works on: faces drawn or asked about; (generation, understanding) sequences of a step, and
    whether the step updates the weights.
    """

    faces: int
    sequences: tuple[int, int]
    update: bool


TRAINED_SIZE = Size(16, (24, 10), True)  # sequences as in recipes/avatars-tiny.toml
# Keeps `unif2ace bench` below a minute on two cores. An update costs the same for any batch: 100 M weights take Muon's
# orthogonalisation 8 s there, which would hide the 1 s of such a small batch.
RANDOM_SIZE = Size(4, (6, 2), False)


@dataclass(frozen=True)
class Workload:
    """One thing to time: `call()` makes `items` of `unit`."""

    unit: str
    items: int
    call: Callable[[], object]


@dataclass(frozen=True)
class Speed:
    """One back end: rates as medians over the rounds, and which back end each op really ran on."""

    backend: str
    rates: dict[str, float]
    ops: dict[str, str]

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return asdict(self)


def load(name: str, device: torch.device | str | None = None) -> UniF2acePipeline:
    """The pipeline to measure: as `UniF2acePipeline.from_pretrained`, or one of `RANDOM_MODELS`."""
    if name not in RANDOM_MODELS:
        return UniF2acePipeline.from_pretrained(name, device=device)
    from unif2ace.model.features import SmallClipEncoder, SmallFaceEncoder, TowerConfig
    from unif2ace.model.transformer import UniF2ace

    pipe = UniF2acePipeline.from_pretrained("avatars-tiny", device=device)
    base, changes = RANDOM_MODELS[name]
    config = preset(base, **changes)
    parts: dict[str, object] = {"defaults": pipe.defaults.override(steps=4, max_new_tokens=8)}  # no answer ends itself
    with torch.random.fork_rng(), pipe.device:
        torch.manual_seed(0)
        parts["model"] = UniF2ace(config).to(pipe.dtype).eval()
        if config.image_size != pipe.image_size:
            tower = TowerConfig(image_size=config.image_size)
            parts["encoders"] = {"clip": SmallClipEncoder(tower).eval(), "face": SmallFaceEncoder(tower).eval()}
            parts["codec"] = SmallCodec(SmallCodecConfig(image_size=config.image_size, levels=CODEC_LEVELS)).eval()
    return UniF2acePipeline(dataclasses.replace(pipe.parts, **parts))


def size_of(name: str) -> Size:
    """How much to give the model `name` at once."""
    return RANDOM_SIZE if name in RANDOM_MODELS else TRAINED_SIZE


def drawing(pipe: UniF2acePipeline, faces: int = 8, steps: int | None = None) -> Workload:
    """Draw a batch of faces, with the model's guidance and, unless told otherwise, its number of steps."""
    prompts = [PROMPTS[index % len(PROMPTS)] for index in range(faces)]
    return Workload("faces", faces, lambda: pipe.generate(prompts, steps=steps, batch_size=faces))


def pictures(pipe: UniF2acePipeline, faces: int) -> list[Image.Image]:
    """Pictures of a batch of faces, drawn in one step."""
    return pipe.generate([PROMPTS[index % len(PROMPTS)] for index in range(faces)], steps=1)


def asked(pipe: UniF2acePipeline, faces: int) -> tuple[list[Image.Image], list[str]]:
    """Pictures and questions: four about each of a batch of faces."""
    images = [image for image in pictures(pipe, faces) for _ in QUESTIONS]
    return images, list(QUESTIONS) * faces


def answering(pipe: UniF2acePipeline, faces: int = 8) -> Workload:
    """Answer four questions about each of a batch of faces."""
    images, questions = asked(pipe, faces)
    return Workload("answers", len(images), lambda: pipe.answer(images, questions, batch_size=len(images)))


def training(
    pipe: UniF2acePipeline, sequences: tuple[int, int] = TRAINED_SIZE.sequences, update: bool = True
) -> Workload:
    """One step on a mixed batch (so many faces drawn, so many asked about): forward, backward and, if asked, update."""
    from unif2ace.training.batches import MixedBatches, TokenizedFaces
    from unif2ace.training.muon import MuonAdamW
    from unif2ace.training.objective import ObjectiveSettings, training_losses

    generation, understanding = sequences
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
        if update:
            optimizer.step()

    return Workload("tokens", batch.packed.layout.num_rows, step)


def on_backend(backend: str, call: Callable[[], T]) -> Callable[[], T]:
    """`call` with every op on `backend`."""

    def run() -> T:
        with use_backend(backend):
            return call()

    return run


def compare_backends(
    pipe: UniF2acePipeline,
    workloads: Sequence[Workload],
    backends: Sequence[str] = BACKENDS_COMPARED,
    *,
    rounds: int = 3,
    on_round: Callable[[int, int], None] | None = None,
) -> list[Speed]:
    """Items per second of every workload on every back end: medians over `rounds`, after one untimed round.

    Drives `pipe`, which must have been loaded with `backend="auto"`. on_round(done, total) follows the rounds. Raises
    `UserError` for a back end that cannot run the model here.
    """
    check_backends(pipe, backends)
    seconds: dict[tuple[str, str], list[float]] = {(b, workload.unit): [] for b in backends for workload in workloads}
    for number in range(rounds + 1):
        for backend in backends:
            for workload in workloads:
                started = time.perf_counter()
                on_backend(backend, workload.call)()
                if pipe.device.type == "cuda":
                    torch.cuda.synchronize()
                if number:
                    seconds[backend, workload.unit].append(time.perf_counter() - started)
        if on_round is not None:
            on_round(number + 1, rounds + 1)
    speeds = []
    for backend in backends:
        rates = {f"{w.unit}/s": w.items / statistics.median(seconds[backend, w.unit]) for w in workloads}
        with use_backend(backend):
            speeds.append(Speed(backend, rates, pipe.backends()))
    return speeds


def trace_backends(pipe: UniF2acePipeline, workloads: Sequence[Workload], backends: Sequence[str], path: str) -> None:
    """Write a Chrome trace with one run of every workload on every back end. Raises as `compare_backends` does."""
    check_backends(pipe, backends)
    events: list[tracing.Event] = []
    for backend in backends:
        for workload in workloads:
            call = on_backend(backend, workload.call)
            call()  # what a first call loads and compiles is not worth looking at
            events += tracing.trace_call(call, f"{workload.unit}: {backend}")
    tracing.write_trace(path, events)


def check_backends(pipe: UniF2acePipeline, backends: Sequence[str]) -> None:
    """`UserError` where a back end is unknown or cannot run the model, or the pipeline is bound to another."""
    if pipe.backend != "auto":
        raise UserError(f"speed: expected a pipeline with backend='auto', got {pipe.backend!r}")
    for backend in backends:
        with use_backend(backend):
            pipe.backends()


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
