"""Everything the bundled model does, in under a minute: faces from sentences, answers about faces, a face half redrawn.

Writes `faces.png`, `answers.md` with the faces it is about, and `in-painting.png`, and prints how fast each back end of
this machine is. Nothing is trained or downloaded.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from unif2ace.data.language import full_caption
from unif2ace.data.loader import FaceTable
from unif2ace.evaluation.faces import held_out_faces
from unif2ace.evaluation.metrics import to_images
from unif2ace.evaluation.speed import answering, compare_backends, drawing, speed_table
from unif2ace.files import check_folder, write_image, write_text
from unif2ace.imaging import face_grid
from unif2ace.pipeline import UniF2acePipeline

# The first four are in the words of the training captions, the others are written freely.
PROMPTS = (
    "a person with fair skin, with long wavy red hair, smiling, clean-shaven, in a white blazer on a blue background",
    "a brown face, with a black afro, with raised eyebrows, grinning, wearing round glasses, in a yellow hoodie",
    "a pale person, with silver short hair, with a silver long beard, serious, wearing dark sunglasses, in a tuxedo",
    "a tan face, wearing a red beanie, with closed eyes, grinning, in a pink crew-neck shirt, yellow background",
    "a smiling person with red hair",
    "an angry man with a mohawk and a long beard",
    "a crying face with pigtails",
    "somebody in a space suit who screams",
    "a cook with a chef hat and a moustache",
    "a dark person wearing a turban and clear glasses on a white background",
    "a surprised woman with blonde hair and purple sunglasses",
    "a sad bald head with an eyepatch in armour",
)
ASKED_FACES = 4
QUESTIONS_PER_FACE = 6
REDRAWN_PROMPTS = (
    "a person with {skin} skin, wearing dark sunglasses, grinning, with a black full beard",
    "a person with {skin} skin, with crying eyes, sad, clean-shaven, without glasses",
    "a person with {skin} skin, with surprised eyes, smiling, clean-shaven, wearing round glasses",
)
SEED = 3
SPEED_FACES, SPEED_ROUNDS = 8, 3


def run_demo(out: str | Path = "demo", model: str = "avatars-tiny", say: Callable[[str], None] = print) -> list[Path]:
    """Run the demonstration, put its files into the folder `out`, and return them.

    Raises `UserError` where the model is not there or the folder cannot be written.
    """
    out, started = Path(out), time.perf_counter()
    check_folder(out)
    pipe = UniF2acePipeline.from_pretrained(model)
    faces = pipe.generate(list(PROMPTS), seed=SEED)
    files = [write_image(out / "faces.png", face_grid(faces, PROMPTS, columns=4))]
    say(f"{files[-1]}: {len(faces)} faces drawn from sentences")

    table = held_out_faces(ASKED_FACES, size=pipe.image_size)
    pictures = to_images(table, ASKED_FACES)
    for number, picture in enumerate(pictures, start=1):
        files.append(write_image(out / f"face-{number}.png", picture))
    text, right, asked = answers_page(pipe, table, pictures)
    files.append(write_text(out / "answers.md", text))
    say(f"{files[-1]}: {asked} questions about {ASKED_FACES} faces it has never seen, {right} answered exactly")

    skin = table.attributes[0]["skin"]
    files.append(write_image(out / "in-painting.png", in_painting_picture(pipe, pictures[0], skin)))
    say(f"{files[-1]}: a face, what is kept of it, and the rest redrawn from three sentences")

    say("\nfaces and answers per second on this machine (medians of interleaved rounds):\n")
    work = [drawing(pipe, SPEED_FACES), answering(pipe, SPEED_FACES)]
    say(speed_table(compare_backends(pipe, work, rounds=SPEED_ROUNDS)))
    say(f'\n{time.perf_counter() - started:.0f} s in all; now try: unif2ace generate "{PROMPTS[4]}" --num 16')
    return files


def answers_page(pipe: UniF2acePipeline, table: FaceTable, pictures: list[Image.Image]) -> tuple[str, int, int]:
    """(Markdown, exact answers, questions): each face with its questions, the answers, the truth, and a description."""
    asked = []
    for face in range(len(pictures)):
        pairs = table.questions[face]  # open questions first, a true-or-false one last
        asked += [(face, question) for question in [*pairs[:QUESTIONS_PER_FACE], pairs[-1]]]
    replies = pipe.answer([pictures[face] for face, _ in asked], [question.question for _, question in asked])
    captions = pipe.caption(pictures)
    right = sum(reply == question.answer for (_, question), reply in zip(asked, replies, strict=True))
    lines = ["# Questions about faces the model has never seen", ""]
    lines += [f"{right} of {len(asked)} answers are exactly the truth.", ""]
    for face in range(len(pictures)):
        lines += [f"## Face {face + 1}", "", f"![face {face + 1}](face-{face + 1}.png)", ""]
        lines += ["| question | answer | truth | |", "|---|---|---|---|"]
        for (which, question), reply in zip(asked, replies, strict=True):
            if which == face:
                mark = "✓" if reply == question.answer else "✗"
                lines.append(f"| {question.question} | {reply} | {question.answer} | {mark} |")
        lines += ["", f"*Described as:* {captions[face]}", "", f"*Truth:* {full_caption(table.attributes[face])}", ""]
    return "\n".join(lines), right, len(asked)


def in_painting_picture(pipe: UniF2acePipeline, picture: Image.Image, skin: str) -> Image.Image:
    """Original, what is kept of it, and the middle of the face redrawn from three sentences that keep the skin tone."""
    prompts = [prompt.format(skin=skin) for prompt in REDRAWN_PROMPTS]
    size = pipe.image_size
    keep = torch.ones(size, size, dtype=torch.bool)
    keep[size // 4 : size * 7 // 8, size // 4 : size * 3 // 4] = False
    redrawn = pipe.generate(prompts, seed=SEED, known_image=picture, known_mask=keep)
    shown = Image.composite(picture, Image.new("RGB", picture.size, "grey"), Image.fromarray(keep.numpy()))
    return face_grid([picture, shown, *redrawn], ["original", "what is kept", *prompts], columns=5)
