"""The demonstration: its files exist, hold what they say, and are replaced by the next run."""

import pytest
from PIL import Image

from tests.tiny import SIZE, tiny_pipeline
from unif2ace import demo
from unif2ace.bundle import resolve_folder
from unif2ace.evaluation.faces import held_out_faces
from unif2ace.evaluation.metrics import evaluate_answers, evaluate_captions, evaluate_generation
from unif2ace.pipeline import UniF2acePipeline


@pytest.fixture(scope="module")
def bundled():
    return UniF2acePipeline.from_pretrained("avatars-tiny")


def test_the_demonstration_leaves_its_files(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "SPEED_FACES", 1)
    model = tiny_pipeline().save_pretrained(tmp_path / "model")
    out, said = tmp_path / "out", []
    files = demo.run_demo(out, str(model), said.append)
    names = sorted(path.name for path in out.iterdir())
    assert names == ["answers.md", *(f"face-{i}.png" for i in range(1, 5)), "faces.png", "in-painting.png"]
    assert sorted(path.name for path in files) == names
    assert Image.open(out / "faces.png").width > 4 * SIZE
    page = (out / "answers.md").read_text()
    assert page.count("## Face ") == demo.ASKED_FACES
    assert page.count("✓") + page.count("✗") == demo.ASKED_FACES * (demo.QUESTIONS_PER_FACE + 1)
    text = "\n".join(said)
    assert all(str(out / name) in text for name in ("faces.png", "answers.md", "in-painting.png"))
    assert "reference" in text
    assert "answers/s" in text
    before = (out / "faces.png").read_bytes()
    demo.run_demo(out, str(model), said.append)
    assert (out / "faces.png").read_bytes() == before  # the same seeds draw the same faces
    assert sorted(path.name for path in out.iterdir()) == names


def test_the_bundled_model_draws_what_it_is_asked(bundled):
    """Red hair is redder than black hair: a smoke test of the shipped weights, not a measurement."""

    def redness(prompt):
        faces = bundled.generate(prompt, num_images_per_prompt=2, steps=8)
        top = [face.crop((16, 0, 48, 24)).resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)) for face in faces]
        return sum(red - blue for red, _, blue in top)

    background = "on a white background"
    red, black = (redness(f"a person with a big {color} afro {background}") for color in ("red", "black"))
    assert red > black + 50


def test_the_bundled_model_answers(bundled):
    face = bundled.generate("a person with a red afro, wearing round glasses, on a yellow background", seed=1)[0]
    assert bundled.answer(face, "What color is the background?") == ["yellow"]
    assert len(bundled.caption(face)[0].split(",")) > 4


def test_the_bundled_model_is_small():
    """All parts together stay small enough to live in the repository."""
    assert sum(path.stat().st_size for path in resolve_folder("avatars-tiny").iterdir()) <= 15e6


@pytest.mark.slow
def test_the_bundled_model_reaches_its_goals(bundled):
    """The README's numbers, re-measured on fewer faces: drawn 85 %, answered 90 %, described 80 %."""
    table = held_out_faces(128, size=bundled.image_size)
    drawn, judge = evaluate_generation(bundled, bundled.parts.judge, table)
    assert judge.macro >= 0.95
    assert drawn.macro >= 0.85
    assert evaluate_answers(bundled, table).overall >= 0.90
    assert evaluate_captions(bundled, table).overall >= 0.80
