"""The commands of `unif2ace.cli`, one function each: they take parsed options, print results, raise `UserError`.

They return the exit status, or None for 0.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from unif2ace.errors import UserError
from unif2ace.files import IMAGE_SUFFIXES, check_folder, is_image_path, sha256, write_image
from unif2ace.inputs import open_face, open_mask
from unif2ace.pipeline import CAPTION_REQUEST, UniF2acePipeline

DEFAULT_OUT = "faces.png"
MAX_COLUMNS = 8


def demo(options: argparse.Namespace) -> None:
    """`unif2ace demo`."""
    from unif2ace.demo import run_demo

    run_demo(options.out, options.model)


def generate(options: argparse.Namespace) -> int:
    """`unif2ace generate`; returns the exit status."""
    _check_workers(options, "--prompts", options.prompts)
    if options.prompts is not None:
        from unif2ace.batch import command

        return command.generate(options)
    from unif2ace.imaging import face_grid

    if not options.prompt:
        raise UserError("generate: expected a sentence, or --prompts, got neither")
    pipe = _pipeline(options)
    settings = pipe.defaults.override_drawing(options.steps, options.guidance, options.temperature)
    if (options.image is None) != (options.mask is None):
        raise UserError("in-painting: expected --image and --mask together, got one of them")
    known = {}
    if options.image is not None:
        known["known_image"] = open_face(options.image, pipe.image_size, options.fit)
        known["known_mask"] = open_mask(options.mask, pipe.image_size, options.fit)
    out = Path(options.out or DEFAULT_OUT)
    if out.suffix and not is_image_path(out) and not out.is_dir():
        raise UserError(f"--out: expected a folder or a picture file ({', '.join(IMAGE_SUFFIXES)}), got {out}")
    check_folder(out.parent if is_image_path(out) else out)
    started = time.perf_counter()
    faces = pipe.generate(
        options.prompt,
        num_images_per_prompt=options.num,
        steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        temperature=settings.temperature,
        seed=options.seed,
        batch_size=options.batch_size,
        on_step=_progress("drawing", "step"),
        **known,
    )
    seconds = time.perf_counter() - started
    prompts = [prompt for prompt in options.prompt for _ in range(options.num)]
    if not is_image_path(out):
        files = [write_image(out / f"face-{index:05d}.png", face) for index, face in enumerate(faces)]
    elif len(faces) == 1:
        files = [write_image(out, faces[0])]
    else:
        columns = min(MAX_COLUMNS, math.ceil(math.sqrt(len(faces))))
        texts = prompts if len(options.prompt) > 1 else None
        files = [write_image(out, face_grid(faces, texts, columns=columns))]
    if options.json:
        facts = {
            "prompts": options.prompt,
            "seeds": [(options.seed + index) % 2**64 for index in range(len(faces))],
            "steps": settings.steps,
            "guidance_scale": settings.guidance_scale,
            "temperature": settings.temperature,
            "engine": "fast",
            "faces": len(faces),
            "seconds": round(seconds, 4),
            "faces_per_second": round(len(faces) / seconds, 3),
            **_machine_facts(pipe, options),
            "files": [{"path": str(path), "sha256": sha256(path)} for path in files],
        }
        _print_json(facts)
        return 0
    where = files[0] if len(files) == 1 else f"{out}/ ({len(files)} files)"
    print(f"{where}: {len(faces)} face{'s' * (len(faces) > 1)} in {seconds:.1f} s ({len(faces) / seconds:.2f} faces/s)")
    return 0


def ask(options: argparse.Namespace) -> int:
    """`unif2ace ask`; returns the exit status."""
    _check_workers(options, "--questions", options.questions)
    if options.questions is not None:
        from unif2ace.batch import command

        return command.ask(options)
    if options.image is None:
        raise UserError("ask: expected a picture, or --questions, got neither")
    if not options.question and not options.caption:
        raise UserError("ask: expected at least one question, or --caption, got neither")
    pipe = _pipeline(options)
    face = open_face(options.image, pipe.image_size, options.fit)
    started = time.perf_counter()
    if not options.json and len(options.question) + options.caption == 1:  # one answer is shown while it grows
        for _, text in pipe.stream_answers(face, options.question or CAPTION_REQUEST):
            print(text, end="", flush=True)
        print()
        return 0
    answers = pipe.answer(face, options.question, batch_size=options.batch_size) if options.question else []
    caption = pipe.caption(face)[0] if options.caption else None
    seconds = time.perf_counter() - started
    if options.json:
        pairs = [{"question": q, "answer": a} for q, a in zip(options.question, answers, strict=True)]
        facts = {"image": options.image, "answers": pairs, "caption": caption, "seconds": round(seconds, 4)}
        _print_json({**facts, **_machine_facts(pipe, options)})
        return 0
    for question, answer in zip(options.question, answers, strict=True):
        print(f"{question} {answer}")
    if caption is not None:
        print(caption)
    return 0


def train(options: argparse.Namespace) -> None:
    """`unif2ace train`."""
    from unif2ace.training.recipe import run_recipe

    _set_threads(options.threads)
    print(f"finished: {run_recipe(options.recipe, options.out, stages=options.stage, reuse=options.reuse)}")


def data(options: argparse.Namespace) -> None:
    """`unif2ace data`."""
    from unif2ace.data.avatars import build_dataset

    if options.seed < 0:
        raise UserError(f"seed: expected an integer of at least 0, got {options.seed}")
    drawn = build_dataset(
        Path(options.out), faces=options.faces, seed=options.seed, size=options.size, workers=options.workers
    )
    state = f"{drawn} files drawn" if drawn else "was complete already"
    print(f"{options.out}: {options.faces} faces, {state}")


def evaluate(options: argparse.Namespace) -> None:
    """`unif2ace evaluate`."""
    from unif2ace.data.loader import FaceTable
    from unif2ace.evaluation import metrics
    from unif2ace.evaluation.faces import held_out_faces

    pipe = _pipeline(options)
    judge = pipe.parts.judge
    if judge is None:
        raise UserError(f"evaluate: expected a model with a judge (judge.json), got {options.model} without one")
    settings = pipe.defaults.override_drawing(options.steps, options.guidance, options.temperature)
    if options.data is not None:
        table = FaceTable.open(options.data, "test", options.faces)
    else:
        table = held_out_faces(options.faces, size=pipe.image_size)
    drawn, real = metrics.evaluate_generation(
        pipe,
        judge,
        table,
        seed=options.seed,
        steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        temperature=settings.temperature,
        on_step=_progress("drawing", "step"),
    )
    answers = metrics.evaluate_answers(pipe, table, on_answer=_progress("answering", "answer"))
    captions = metrics.evaluate_captions(pipe, table, on_answer=_progress("describing", "face"))
    scores = {"generation": drawn, "judge_on_real_faces": real, "answers": answers, "captions": captions}
    if options.json:
        facts = {"faces": len(table), "scores": {name: score.to_dict() for name, score in scores.items()}}
        _print_json({**facts, **_machine_facts(pipe, options)})
        return
    print(metrics.score_table(scores))
    print(
        f"\n{len(table)} held-out faces: {drawn.items / drawn.seconds:.2f} faces/s drawn, "
        f"{answers.items / answers.seconds:.1f} answers/s, {captions.items / captions.seconds:.2f} descriptions/s"
    )


def doctor(options: argparse.Namespace) -> int:
    """`unif2ace doctor`; status 1 where a GPU kernel breaks a limit."""
    if options.kernels is not None:
        from unif2ace.resources import format_kernels, kernels

        rows = kernels(options.kernels)
        if options.json:
            _print_json({"kernels": [row.as_json() for row in rows]})
        else:
            print(format_kernels(rows), end="")
        return int(any(row.problems() for row in rows))
    from unif2ace.doctor import format_report, report

    facts = report()
    if options.json:
        _print_json(facts)
    else:
        print(format_report(facts), end="")
    return 0


def bench(options: argparse.Namespace) -> None:
    """`unif2ace bench`."""
    from unif2ace.evaluation import speed
    from unif2ace.evaluation.bench import bench_op, tune_op

    _set_threads(options.threads)
    if options.tune:
        print(f"table: {tune_op(options.what, options.shapes)}")
        return
    if options.trace is not None:
        check_folder(Path(options.trace).parent)
    if options.what not in ("generate", "train"):
        bench_op(
            options.what,
            device=options.device or "cpu",
            shapes=options.shapes,
            backends=options.backends,
            threads=options.threads,
            as_json=options.json,
            trace=options.trace,
        )
        return
    if options.shapes:
        raise UserError(f"bench: expected --shapes with an op only, got it with {options.what}")
    pipe = speed.load(options.model, options.device)
    backends = options.backends or speed.BACKENDS_COMPARED
    speed.check_backends(pipe, backends)
    size = speed.size_of(options.model)
    if options.what == "generate":
        faces = options.faces or size.faces
        work = [speed.drawing(pipe, faces, options.steps), speed.answering(pipe, faces)]
    else:
        work = [speed.training(pipe, size.sequences, size.update)]
    progress = _progress("measuring", "round")
    speeds = speed.compare_backends(pipe, work, backends, rounds=options.rounds, on_round=progress)
    if options.trace is not None:
        speed.trace_backends(pipe, work, backends, options.trace)
    if options.json:
        facts = {"what": options.what, "speeds": [entry.to_dict() for entry in speeds]}
        _print_json({**facts, **_machine_facts(pipe, options)})
    else:
        print(speed.speed_table(speeds))


def _check_workers(options: argparse.Namespace, name: str, table: str | None) -> None:
    """Nothing that is asked for is ignored silently."""
    if options.engine == "ray" and table is None:
        raise UserError(f"--engine ray: expected a table ({name} FILE), got none")
    if options.engine != "ray" and options.workers > 1:
        raise UserError(f"--workers: expected 1 without --engine ray, got {options.workers}")


def _pipeline(options: argparse.Namespace) -> UniF2acePipeline:
    _set_threads(options.threads)
    return UniF2acePipeline.from_pretrained(options.model, device=options.device, backend=options.backend)


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


def _progress(description: str, unit: str) -> Callable[[int, int], None]:
    """on_step(done, total) that moves a bar on stderr, where that is a terminal."""
    bar: tqdm | None = None

    def update(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(total=total, desc=description, unit=unit, leave=False, disable=None)
        bar.update(done - bar.n)
        if done >= total:
            bar.close()

    return update


def _machine_facts(pipe: UniF2acePipeline, options: argparse.Namespace) -> dict[str, object]:
    return {
        "model": options.model,
        "device": str(pipe.device),
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "backends": pipe.backends(),
    }


def _print_json(facts: dict[str, object]) -> None:
    print(json.dumps(facts, indent=2))
