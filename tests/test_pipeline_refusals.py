"""The pipeline: one sentence for every kind of bad input, before any work is done."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny import SIZE, tiny_pipeline
from unif2ace import inputs
from unif2ace.errors import UserError
from unif2ace.generation.engine import GenerationEngine

RGB = Image.new("RGB", (SIZE, SIZE))
KEEP = torch.ones(SIZE, SIZE, dtype=torch.bool)


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.mark.parametrize(
    ("prompts", "options", "sentence"),
    [
        ("", {}, "prompt: expected some text, got an empty string"),
        ([], {}, "prompt: expected at least one string, got an empty list"),
        (["a face", " \n"], {}, r"prompt\[1\]: expected some text"),
        (7, {}, "prompt: expected a string or a list of strings, got int"),
        (b"face", {}, "prompt: expected a string or a list of strings, got bytes"),
        (["a face", None], {}, r"prompt\[1\]: expected a string, got NoneType"),
        ("a \udce9 face", {}, "prompt: expected Unicode text, got bytes that are none at 2"),
        ("a <|endoftext|> face", {}, "prompt: expected plain text, got the control token"),
        ("hair " * 200, {}, r"prompt: expected at most 120 tokens, got \d+ in 'hair hair"),
        ("a face", {"steps": 0}, "steps: expected an integer from 1 to 1024, got 0"),
        ("a face", {"steps": 2.5}, "steps: expected an integer"),
        ("a face", {"guidance_scale": -1}, "guidance_scale: expected a number from 0 to 100, got -1"),
        ("a face", {"temperature": float("nan")}, "temperature: expected a number"),
        ("a face", {"seed": True}, "seed: expected an integer from 0 to 2.64 - 1, got True"),
        ("a face", {"seed": 1.0}, "seed: expected an integer"),
        ("a face", {"seed": -1}, "seed: expected an integer"),
        ("a face", {"seed": "7"}, "seed: expected an integer"),
        ("a face", {"seed": [1, 2]}, "seed: expected one integer or a list of 1, got a list of 2"),
        ("a face", {"seed": [None]}, "seed: expected an integer"),
        ("a face", {"num_images_per_prompt": 0}, "num_images_per_prompt: expected an integer of at least 1, got 0"),
        ("a face", {"batch_size": 0}, "batch_size: expected"),
        ("a face", {"engine": "warp"}, "engine: expected one of fast, plain, got 'warp'"),
        ("a face", {"known_image": RGB}, "in-painting: expected known_image and known_mask together"),
        ("a face", {"known_mask": KEEP}, "in-painting: .* got known_mask alone"),
        ("a face", {"known_image": RGB.resize((9, 8)), "known_mask": KEEP}, "known_image: .* got RGB of 9 x 8"),
        ("a face", {"known_image": RGB, "known_mask": KEEP[1:]}, "known_mask: .* got 32 x 31"),
        ("a face", {"known_image": RGB, "known_mask": KEEP.int()}, "known_mask: .* got an array of int32"),
        ("a face", {"known_image": RGB, "known_mask": RGB}, "known_mask: .* PIL image of mode RGB"),
        ("a face", {"known_image": RGB, "known_mask": "mask.png"}, "known_mask: .* got str"),
    ],
)
def test_bad_requests_are_refused_before_any_work(pipe, monkeypatch, prompts, options, sentence):
    monkeypatch.setattr(GenerationEngine, "submit", lambda *a: pytest.fail("work was done"))
    with pytest.raises(UserError, match=sentence):
        pipe.generate(prompts, **options)


@pytest.mark.parametrize(
    ("images", "questions", "options", "sentence"),
    [
        ("face.png", "Why?", {}, "image: expected a PIL image, got str; open files with PIL.Image.open"),
        (np.zeros((SIZE, SIZE, 3)), "Why?", {}, "image: expected a PIL image, got ndarray"),
        ([], "Why?", {}, "image: expected at least one image"),
        ([RGB, RGB.convert("L")], "Why?", {}, r"image\[1\]: .* got L of 32 x 32; convert it with image.convert"),
        (RGB.convert("RGBA"), "Why?", {}, "image: expected an RGB image of 32 x 32 pixels, got RGBA"),
        (RGB, "", {}, "question: expected some text"),
        (RGB, "why " * 100, {}, "question: expected at most 120 tokens"),
        ([RGB, RGB], ["a", "b", "c"], {}, "question: expected one question per image .* got 2 images and 3 questions"),
        (RGB, "Why?", {"max_new_tokens": 0}, "max_new_tokens: expected"),
        (RGB, "Why?", {"temperature": -1}, "temperature: expected"),
        (RGB, "Why?", {"top_k": 0}, "top_k: expected"),
        (RGB, "Why?", {"top_p": 0}, "top_p: expected"),
        (RGB, "Why?", {"stop": ["a", ""]}, r"stop\[1\]: expected some text, got an empty string"),
        (RGB, "Why?", {"seed": [1, 2]}, "seed: expected"),
    ],
)
def test_bad_questions_are_refused_before_any_work(pipe, monkeypatch, images, questions, options, sentence):
    monkeypatch.setattr("unif2ace.pipeline.stream_answers", lambda *a, **k: pytest.fail("work was done"))
    with pytest.raises(UserError, match=sentence):
        pipe.answer(images, questions, **options)


def test_a_truncated_picture_is_refused(pipe, tmp_path):
    path = tmp_path / "face.png"
    Image.effect_noise((SIZE, SIZE), 50).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match="image: expected a complete image"):
        pipe.answer(Image.open(path), "Why?")
    with pytest.raises(UserError, match="expected a readable picture"):
        inputs.open_image(path)
