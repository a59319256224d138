"""The batch engine: any company, the same bits; bad requests fail alone; memory and queue stay bounded."""

import hashlib
import random
import weakref

import pytest
import torch

from tests.bits import needs_native, run_python
from tests.tiny import TOKENS, build_parts
from unif2ace.errors import UserError
from unif2ace.generation import denoise
from unif2ace.generation import engine as engine_module
from unif2ace.generation.engine import GenerationEngine, Request

KNOWN = torch.arange(TOKENS) % 3 == 0


@pytest.fixture(scope="module")
def parts():
    return build_parts()


def requests() -> list[Request]:
    """Everything that may differ between requests of one batch."""
    codes = torch.arange(TOKENS) % 27
    return [
        Request([5, 6, 7], [1], steps=6, key=0),
        Request([8], [2**64 - 1], steps=6, key=1),
        Request([9, 10, 11, 12, 13, 14, 15], [3], steps=5, guidance=0.0, key=2),
        Request([5, 6, 7], [4], steps=4, guidance=1.5, temperature=0.7, key=3),
        Request([5, 6, 7], [5], steps=6, known_codes=codes, known=KNOWN, key=4),
        Request([8], [6], steps=1, key=5),
        Request([], [7], steps=6, temperature=0.0, guidance=0.0, key=6),
        Request([8], [8], steps=6, known_codes=codes, known=~KNOWN, tau=0.0, key=7),
    ]


def drawn(parts, wanted, max_batch):
    faces = list(GenerationEngine(parts.model, parts.codec, max_batch).stream(wanted))
    assert [face.error for face in faces] == [None] * len(faces)
    return faces


# ---------------------------------------------------------------------------------------------------------------- bits


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_same_bits_alone_and_in_any_batch(parts, dtype, threads):
    before = torch.get_num_threads()
    parts.model.to(dtype)
    try:
        torch.set_num_threads(threads)
        alone = {request.key: drawn(parts, [request], 1)[0] for request in requests()}
        assert len({face.codes.numpy().tobytes() for face in alone.values()}) == len(alone)
        rng = random.Random(threads)
        for max_batch in range(1, 10):
            company = [rng.choice(requests()) for _ in range(rng.randint(2, 12))]
            for face in drawn(parts, company, max_batch):
                assert torch.equal(face.codes, alone[face.request.key].codes)
                assert torch.equal(face.pixels, alone[face.request.key].pixels)
    finally:
        torch.set_num_threads(before)
        parts.model.float()


@needs_native
def test_the_same_bits_after_a_restart(parts):
    program = """
import hashlib, torch
from tests.generation.test_engine import drawn, requests
from tests.tiny import build_parts
found = {face.request.key: face for face in drawn(build_parts(), requests()[::-1], 3)}
print(hashlib.sha256(b"".join(found[key].pixels.numpy().tobytes() for key in sorted(found))).hexdigest())
"""
    done = run_python(program)
    assert done.returncode == 0, done.stderr
    faces = [drawn(parts, [request], 1)[0] for request in requests()]
    digest = hashlib.sha256(b"".join(face.pixels.numpy().tobytes() for face in faces))
    assert done.stdout.split() == [digest.hexdigest()]


def test_variations_are_what_their_seeds_give(parts):
    known = {"known_codes": torch.arange(TOKENS) % 27, "known": KNOWN}
    many = drawn(parts, [Request([5, 6], [7, 8, 9], steps=4, **known)], 2)
    assert [face.index for face in many] == [0, 1, 2]
    for face, seed in zip(many, (7, 8, 9), strict=True):
        assert torch.equal(face.codes, drawn(parts, [Request([5, 6], [seed], steps=4, **known)], 1)[0].codes)
        assert torch.equal(face.codes[KNOWN], known["known_codes"][KNOWN])
    assert len({face.codes.numpy().tobytes() for face in many}) == 3


# ------------------------------------------------------------------------------------------------------- bad requests


BAD = [
    ({"prompt": [10**6]}, "prompt: expected text ids"),
    ({"prompt": [1] * 200}, "prompt: expected at most 128 tokens, got 200"),
    ({"prompt": "a face"}, "prompt: expected a sequence of integers, got str"),
    ({"prompt": ["a"]}, "prompt: expected text ids"),
    ({"seeds": []}, "seeds: expected at least one, got none"),
    ({"seeds": 7}, "seeds: expected a sequence of integers, got int"),
    ({"seeds": [-1]}, "seed: expected integers from 0 to 2^64 - 1, got -1"),
    ({"seeds": [0.5]}, "seed: expected integers"),
    ({"steps": 0}, "steps: expected an integer"),
    ({"guidance": float("nan")}, "guidance: expected a number"),
    ({"temperature": -1.0}, "temperature: expected a number"),
    ({"tau": -1.0}, "tau: expected a number from 0 to 100, got -1.0"),
    ({"known": KNOWN}, "generate: known_codes must be [16], got NoneType"),
    ({"known": KNOWN[1:], "known_codes": torch.zeros(15).long()}, "generate: known_codes must be [16], got [15]"),
    ({"known": KNOWN, "known_codes": torch.full((16,), 27)}, "generate: known codes must lie in 0..26"),
    ({"known": KNOWN.tolist(), "known_codes": torch.zeros(16).long()}, "generate: known must be [16], got list"),
    ({"known": KNOWN.int(), "known_codes": torch.zeros(16).long()}, "generate: known must be bool"),
]


def test_bad_requests_fail_with_their_reason_and_the_others_finish(parts):
    good = requests()[:3]
    bad = [Request(**{"prompt": [5], "key": 100 + i, **change}) for i, (change, _) in enumerate(BAD)]
    mixed = [request for pair in zip(bad, good * 6, strict=False) for request in pair]
    faces = list(GenerationEngine(parts.model, parts.codec, 3).stream(mixed))
    reasons = {face.request.key: face.error for face in faces if face.error is not None}
    assert sorted(reasons) == [100 + i for i in range(len(BAD))]
    for i, (_, sentence) in enumerate(BAD):
        assert reasons[100 + i].startswith(sentence)
    expected = {face.request.key: face.codes for face in drawn(parts, good, 3)}
    finished = [face for face in faces if face.error is None]
    assert len(finished) == len(BAD)
    assert all(torch.equal(face.codes, expected[face.request.key]) for face in finished)


def test_a_prompt_that_breaks_the_model_fails_alone(parts):
    """An id whose embedding is NaN: refused by the router in the prefix pass, which the others share."""
    good = requests()
    expected = {face.request.key: face.codes for face in drawn(parts, good, 3)}
    broken = build_parts()
    with torch.no_grad():
        broken.model.embedding.weight[20] = torch.nan
    bad = Request([5, 20], [1, 2, 3, 4], steps=3, key="bad")
    faces = list(GenerationEngine(broken.model, broken.codec, 3).stream([good[0], bad, *good[1:]]))
    reasons = [(face.index, face.error) for face in faces if face.request.key == "bad"]
    assert [index for index, _ in reasons] == [0, 1, 2, 3]
    assert all("NaN" in error or "finite" in error for _, error in reasons), reasons
    finished = {face.request.key: face.codes for face in faces if face.request.key != "bad"}
    assert finished.keys() == expected.keys()
    assert all(torch.equal(finished[key], expected[key]) for key in expected)


def test_a_step_that_fails_for_one_request_is_taken_again_without_it(parts, monkeypatch):
    good = requests()
    expected = {face.request.key: face.codes for face in drawn(parts, good, 4)}
    sample, passes = denoise.head_sample, []

    def fragile(*arguments, temperature, **options):
        pass_memory = torch.zeros(3)
        passes.append(weakref.ref(pass_memory))
        if temperature == 9.0 and bool((arguments[5] == 2).any()):
            raise UserError("head_sample: too hot")
        assert [held() for held in passes[:-1]] == [None] * len(passes[:-1]), "the memory of an earlier pass is held"
        return sample(*arguments, temperature=temperature, **options)

    monkeypatch.setattr(denoise, "head_sample", fragile)
    bad = Request([5], [1, 2], steps=5, temperature=9.0, key="bad")
    faces = list(GenerationEngine(parts.model, parts.codec, 4).stream([bad, *good]))
    assert [face.error for face in faces if face.request.key == "bad"] == ["head_sample: too hot"] * 2
    finished = {face.request.key: face.codes for face in faces if face.error is None}
    assert finished.keys() == expected.keys()
    assert all(torch.equal(finished[key], expected[key]) for key in expected)


def test_who_needs_no_guidance_does_not_fail_with_it(parts, monkeypatch):
    run = engine_module.run_prefixes

    def fragile(model, prompts, codes):
        if () in prompts:
            raise torch.OutOfMemoryError("too much")
        return run(model, prompts, codes)

    monkeypatch.setattr(engine_module, "run_prefixes", fragile)
    jobs = [Request([5], [1], steps=2, key=1), Request([5], [1], steps=2, guidance=0.0, key=2)]
    faces = list(GenerationEngine(parts.model, parts.codec, 2).stream(jobs))
    assert {face.request.key: face.error for face in faces} == {1: "too much", 2: None}


def test_pictures_that_cannot_be_decoded_together_are_decoded_one_by_one(parts, monkeypatch):
    jobs = [Request([5], [1, 2, 3], steps=2)]
    expected = {face.index: face for face in drawn(parts, jobs, 3)}
    decode, broken = parts.codec.decode, expected[1].codes

    def fragile(codes):
        if len(codes) > 1 or torch.equal(codes[0], broken):
            raise torch.OutOfMemoryError("too much\nin all")
        return decode(codes)

    monkeypatch.setattr(parts.codec, "decode", fragile)
    faces = {face.index: face for face in GenerationEngine(parts.model, parts.codec, 3).stream(jobs)}
    assert [faces[index].error for index in range(3)] == [None, "too much", None]
    assert all(torch.equal(faces[index].pixels, expected[index].pixels) for index in (0, 2))


# --------------------------------------------------------------------------------------------------------------- queue


def test_submit_draws_while_too_many_wait(parts):
    engine = GenerationEngine(parts.model, parts.codec, 2)
    taken = []

    def jobs():
        for seed in range(12):
            taken.append(seed)
            yield Request([5], [seed], steps=2, key=seed)

    done = 0
    for face in engine.stream(jobs()):
        done += 1
        assert len(taken) - done <= 6  # two in slots, two waiting, two done and not yet picked up
        assert face.error is None
    assert done == 12
    assert not engine.busy


def test_faces_are_handed_out_while_others_are_drawn(parts):
    engine = GenerationEngine(parts.model, parts.codec, 2)
    engine.submit(Request([5], [0], steps=2, key="short"))
    engine.submit(Request([5], [0, 1], steps=6, key="long"))
    order = []
    while engine.busy:
        engine.step()
        order += [face.request.key for face in engine.finished()]
    assert order == ["short", "long", "long"]


def test_progress_counts_images(parts, capsys):
    engine = GenerationEngine(parts.model, parts.codec, 2)
    list(engine.stream([Request([5], [0, 1, 2], steps=1)], progress=True, total=3))
    assert "3/3" in capsys.readouterr().err


def test_prefixes_kept_are_bounded(parts):
    engine = GenerationEngine(parts.model, parts.codec, 2)
    list(engine.stream(Request([token], [0], steps=2) for token in range(1, 20)))
    assert len(engine._prefixes) <= 4
