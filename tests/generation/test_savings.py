"""Each exact saving by itself, all of them, and the engine: the tokens of the plain loop."""

import pytest
import torch

from benchmarks.savings import SAVINGS, draw
from tests.tiny import build_parts
from unif2ace.generation.engine import GenerationEngine, Request
from unif2ace.generation.plain import generate_codes

PROMPTS = [[5, 6, 7], [8], [5, 6, 7], [9, 10, 11, 12, 13]]
SEEDS = [3, 2**63 + 5, 0, 11]


@pytest.fixture(scope="module")
def parts():
    return build_parts()


@pytest.fixture(scope="module")
def plain(parts):
    return generate_codes(parts.model, PROMPTS, SEEDS, steps=6)


@pytest.mark.parametrize("savings", [{name} for name in SAVINGS] + [set(SAVINGS), set()])
def test_a_saving_changes_no_token(parts, plain, savings):
    assert torch.equal(draw(parts.model, PROMPTS, SEEDS, savings, steps=6), plain)


@pytest.mark.parametrize("guidance", [0.0, 1.5])
@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_the_engine_draws_the_tokens_of_the_plain_loop(parts, guidance, temperature):
    settings = {"steps": 6, "guidance": guidance, "temperature": temperature}
    expected = generate_codes(parts.model, PROMPTS, SEEDS, **settings)
    engine = GenerationEngine(parts.model, parts.codec, 3)
    requests = [Request(PROMPTS[i], [SEEDS[i]], key=i, **settings) for i in range(4)]
    faces = list(engine.stream(requests))
    assert [face.error for face in faces] == [None] * 4
    for face in faces:
        assert torch.equal(face.codes, expected[face.request.key])


def test_known_tokens_stay_and_the_rest_is_that_of_the_plain_loop(parts):
    generator = torch.Generator().manual_seed(0)
    size, batch = parts.model.config.num_image_tokens, len(PROMPTS)
    wanted = torch.randint(0, parts.model.config.codebook_size, (batch, size), generator=generator)
    known = torch.rand(batch, size, generator=generator) < torch.tensor([0.2, 0.5, 0.9, 1.0])[:, None]
    expected = generate_codes(parts.model, PROMPTS, SEEDS, steps=4, known_codes=wanted, known=known)
    requests = [
        Request(PROMPTS[i], [SEEDS[i]], steps=4, known_codes=wanted[i], known=known[i], key=i) for i in range(batch)
    ]
    for face in GenerationEngine(parts.model, parts.codec, 4).stream(requests):
        assert torch.equal(face.codes, expected[face.request.key])
        assert torch.equal(face.codes[known[face.request.key]], wanted[face.request.key][known[face.request.key]])


def test_what_images_and_steps_share_is_run_once(parts, monkeypatch):
    """Three variations of one prompt: its text and first step once, guidance's first step once, and then two passes.

    The token-wise part of the first layer runs for the tokens drawn since the last pass. The noise expert runs once for
    all images of a pass, here of one mask ratio.
    """
    model, passes, started, ratios = type(parts.model), [], [], []
    resume, start = model.resume, model.start_image_rows

    def counted_resume(self, first, layout, **options):
        passes.append((layout.num_rows, len(options["rows"])))
        ratios.append(options["mask_ratio"].tolist())
        return resume(self, first, layout, **options)

    def counted_start(self, tokens, *rest):
        started.append(len(tokens))
        return start(self, tokens, *rest)

    monkeypatch.setattr(model, "resume", counted_resume)
    monkeypatch.setattr(model, "start_image_rows", counted_start)
    size, image = parts.model.config.num_image_tokens, parts.model.config.image_rows
    engine = GenerationEngine(parts.model, parts.codec, 3)
    faces = list(engine.stream([Request([5, 6, 7], [1, 2, 3], steps=3)]))
    assert len({face.codes.numpy().tobytes() for face in faces}) == 3
    unknown = [13, 8]  # floor(16 cos(pi k / 6)), k = 1, 2
    assert passes == [(6 + image + 3 + image, 2 * size), *((6 * image, 6 * count) for count in unknown)]
    assert ratios == [[1.0], [13 / 16], [8 / 16]]
    assert started == [6 * (size - 13), 6 * (13 - 8)]
    passes.clear()
    list(engine.stream([Request([5, 6, 7], [4], steps=1)]))
    assert passes == []  # a known prompt and one step: no pass at all
