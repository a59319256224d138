"""The pipeline: seeds, in-painting, answers, saving and loading.

What it refuses from its callers is in test_pipeline_refusals.py.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.bits import needs_native
from tests.tiny import SIZE, build_parts, tiny_pipeline
from unif2ace import bundle, inputs, pipeline
from unif2ace.errors import UserError
from unif2ace.generation.engine import GenerationEngine
from unif2ace.ops import default_backend, use_backend
from unif2ace.pipeline import UniF2acePipeline

PROMPT = "a smiling person with red hair"


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory):
    return pipe.save_pretrained(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def faces(pipe):
    return pipe.generate(PROMPT, num_images_per_prompt=3, seed=5)


def data(images):
    return [image.tobytes() for image in images]


# ------------------------------------------------------------------------------------------------------------- drawing


def test_faces_come_in_the_order_of_the_prompts(pipe, faces):
    assert [(face.mode, face.size) for face in faces] == [("RGB", (SIZE, SIZE))] * 3
    both = pipe.generate(["a person", PROMPT], num_images_per_prompt=3, seed=[0, 1, 2, 5, 6, 7])
    assert data(both[3:]) == data(faces)


def test_a_face_depends_on_its_own_seed_alone(pipe, faces):
    assert len(set(data(faces))) == 3
    assert data(pipe.generate(PROMPT, num_images_per_prompt=3, seed=5, batch_size=2)) == data(faces)
    assert data(pipe.generate(PROMPT, seed=7)) == data(faces[2:])
    assert data(pipe.generate(PROMPT, num_images_per_prompt=2, seed=np.array([7, 5]))) == data([faces[2], faces[0]])


def test_integer_seeds_wrap_at_64_bits(pipe):
    last, first = pipe.generate(PROMPT, num_images_per_prompt=2, seed=2**64 - 1)
    assert data([first]) == data(pipe.generate(PROMPT, seed=0))
    assert data([last]) == data(pipe.generate(PROMPT, seed=2**64 - 1))


def test_settings_reach_the_loop(pipe, faces):
    for options in ({"steps": 1}, {"guidance_scale": 0.0}, {"temperature": 0.0}):
        assert data(pipe.generate(PROMPT, seed=5, **options)) != data(faces[:1])


def test_progress_covers_all_batches(pipe):
    calls = []
    pipe.generate(PROMPT, num_images_per_prompt=3, steps=2, batch_size=2, on_step=lambda *call: calls.append(call))
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_in_painting_keeps_pixels_and_whole_cells(pipe, faces, monkeypatch):
    keep = np.ones((SIZE, SIZE), dtype=bool)
    keep[8:17, 8:16] = False  # all of one cell of 8 x 8 pixels and one row of the cell below it
    seen = []
    submit = GenerationEngine.submit
    monkeypatch.setattr(GenerationEngine, "submit", lambda self, request: seen.append(request) or submit(self, request))
    options = {"num_images_per_prompt": 2, "seed": 1, "known_image": faces[0]}
    drawn = pipe.generate("a sad face", known_mask=keep, **options)
    original = np.asarray(faces[0])
    for face in drawn:
        assert np.array_equal(np.asarray(face)[keep], original[keep])
    assert data(drawn)[0] != data(faces[:1])[0]
    assert (~seen[0].known).nonzero()[:, 0].tolist() == [5, 9]
    for same in (Image.fromarray(keep), torch.from_numpy(keep), Image.fromarray(keep).convert("L")):
        assert data(pipe.generate("a sad face", known_mask=same, **options)) == data(drawn)


def test_a_mask_that_keeps_everything_gives_the_picture_back(pipe, faces):
    everything = torch.ones(SIZE, SIZE, dtype=torch.bool)
    assert data(pipe.generate(PROMPT, known_image=faces[1], known_mask=everything)) == data(faces[1:2])


def test_kept_cells_are_kept_as_a_whole():
    keep = torch.ones(4, 4, dtype=torch.bool)
    keep[0, 3] = False
    assert inputs.kept_cells(keep, 2).tolist() == [True, False, True, True]


# ----------------------------------------------------------------------------------------------------------- answering


def test_questions_and_images_pair_up(pipe, faces):
    questions = ["What color is the hair?", "How are the eyes?"]
    one_by_one = [pipe.answer(face, question)[0] for face in faces[:2] for question in questions]
    assert pipe.answer(faces[0], questions) == one_by_one[:2]
    assert pipe.answer(faces[:2], questions[0]) == one_by_one[::2]
    paired = [face for face in faces[:2] for _ in questions]
    assert pipe.answer(paired, questions * 2, batch_size=3) == one_by_one


def test_captions_are_one_per_image(pipe, faces):
    captions = pipe.caption(faces, max_new_tokens=3)
    assert len(captions) == 3
    assert all(isinstance(caption, str) for caption in captions)
    assert captions[:1] == pipe.caption(faces[0], max_new_tokens=3)


@needs_native
def test_an_answer_does_not_depend_on_the_pictures_and_questions_beside_it(pipe, faces, monkeypatch):
    questions = ["What color is the hair?", "How are the eyes?", "Is there a beard or moustache?"]
    asked = [(face, question) for face in faces for question in questions]
    options, read, stream = {"temperature": 0.9, "top_p": 0.95}, [], pipeline.stream_answers

    def record(model, codes, encoded, features, *, images, **rest):
        read.extend([codes[i], *(features[name][i] for name in sorted(features))] for i in images)
        return stream(model, codes, encoded, features, images=images, **rest)

    monkeypatch.setattr(pipeline, "stream_answers", record)
    together = pipe.answer(*zip(*asked, strict=True), seed=range(9), **options)
    alone = [pipe.answer(face, question, seed=seed, **options)[0] for seed, (face, question) in enumerate(asked)]
    assert together == alone
    assert len(set(alone)) > 3
    for many, one in zip(read[:9], read[9:], strict=True):
        assert all(map(torch.equal, many, one))


def test_sampled_answers_repeat_with_their_seed(pipe, faces):
    options = {"temperature": 2.0, "top_k": 50, "top_p": 0.9}
    first = pipe.answer(faces, "How are the eyes?", seed=3, **options)
    assert pipe.answer(faces, "How are the eyes?", seed=[3, 4, 5], **options) == first
    assert pipe.answer(faces[1], "How are the eyes?", seed=4, **options) == first[1:2]


def test_an_answer_ends_before_a_stop_text(pipe, faces):
    whole = pipe.answer(faces[0], "How are the eyes?", temperature=2.0)[0]
    for stop in (whole[3:5], ["never in it", whole[3:5]]):
        assert pipe.answer(faces[0], "How are the eyes?", temperature=2.0, stop=stop) == [
            whole[: whole.find(whole[3:5])]
        ]
    assert pipe.answer(faces[0], "How are the eyes?", temperature=2.0, stop="\n") == [whole.split("\n")[0]]


def test_a_model_without_feature_encoders_answers(faces):
    plain = UniF2acePipeline(build_parts(features=False))
    assert len(plain.caption(faces[0])) == 1


# --------------------------------------------------------------------------------------------------- saving and loading


def test_a_saved_pipeline_draws_and_answers_the_same(pipe, saved, faces):
    loaded = UniF2acePipeline.from_pretrained(saved)
    assert data(loaded.generate(PROMPT, num_images_per_prompt=3, seed=5)) == data(faces)
    assert loaded.caption(faces) == pipe.caption(faces)
    assert loaded.defaults == pipe.defaults
    assert all(parameter.data_ptr() % 64 == 0 for parameter in loaded.model.parameters() if parameter.numel() > 16)


def test_an_interrupted_save_leaves_the_old_model(pipe, saved, monkeypatch):
    before, rename = sorted(path.name for path in saved.iterdir()), Path.rename

    def interrupted(self, target):
        if self.name.endswith(".new"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pipe.save_pretrained(saved)
    assert sorted(path.name for path in saved.iterdir()) == before
    assert [path.name for path in saved.parent.iterdir()] == ["tiny"]


def test_saving_replaces_a_model_and_nothing_else(pipe, saved, tmp_path):
    before = sorted(path.name for path in saved.iterdir())
    assert pipe.save_pretrained(saved) == saved
    assert sorted(path.name for path in saved.iterdir()) == before
    assert [path.name for path in saved.parent.iterdir()] == ["tiny"]  # no partial folder stays
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"expected a new folder or one that holds a saved model, got one with 'thesis"):
        pipe.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="got a file"):
        pipe.save_pretrained(tmp_path / "thesis.txt")
    with pytest.raises(UserError, match="cannot write the model"):
        pipe.save_pretrained(tmp_path / "thesis.txt" / "model")


@pytest.mark.parametrize("name", ["model.safetensors", "codec.safetensors", "clip.safetensors", "config.json"])
def test_truncated_and_missing_parts_are_refused_by_name(pipe, tmp_path, name):
    folder = pipe.save_pretrained(tmp_path / "model")
    (folder / name).write_bytes((folder / name).read_bytes()[:100])
    with pytest.raises(UserError):
        UniF2acePipeline.from_pretrained(folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        UniF2acePipeline.from_pretrained(folder)


def test_broken_defaults_are_refused(pipe, tmp_path):
    folder = pipe.save_pretrained(tmp_path / "model")
    cases = {"{": "generation_config.json", '{"stepz": 3}': "stepz", '{"steps": 0}': "steps: expected"}
    for text, reason in cases.items():
        (folder / "generation_config.json").write_text(text)
        with pytest.raises(UserError, match=reason):
            UniF2acePipeline.from_pretrained(folder)


def test_parts_that_do_not_fit_together_are_refused():
    parts = build_parts()
    with pytest.raises(UserError, match="needs the encoder 'clip'"):
        bundle.Parts(parts.model, parts.codec, parts.tokenizer, {}, parts.defaults)
    codec = SimpleNamespace(image_size=64, num_tokens=64, codebook_size=27)
    with pytest.raises(UserError, match="expects the image size 32, but its codec has 64"):
        bundle.Parts(parts.model, codec, parts.tokenizer, parts.encoders, parts.defaults)


def test_names_resolve_to_bundled_models_then_folders_then_the_hub(saved, monkeypatch, tmp_path):
    monkeypatch.setattr(bundle, "BUNDLED", saved.parent)
    assert bundle.resolve_folder("tiny") == saved
    assert bundle.resolve_folder(tmp_path) == tmp_path
    fake = SimpleNamespace(snapshot_download=lambda name: str(saved) if name == "someone/faces" else 1 / 0)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    assert bundle.resolve_folder("someone/faces") == saved
    with pytest.raises(UserError, match=r"bundled name \(tiny\), a folder or a hub id owner/name, got 'nope'"):
        bundle.resolve_folder("nope")


def test_hub_problems_are_one_sentence(monkeypatch):
    def offline(name):
        raise OSError("no network\nlong explanation")

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=offline))
    with pytest.raises(UserError, match=r"could not be read from the hub: no network$"):
        UniF2acePipeline.from_pretrained("someone/faces")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"needs huggingface_hub: pip install 'unif2ace\[hub\]'"):
        UniF2acePipeline.from_pretrained("someone/faces")


def test_dtype_device_and_backend_are_checked_before_loading(saved):
    assert UniF2acePipeline.from_pretrained(saved, device="cpu", dtype=torch.bfloat16).dtype == torch.bfloat16
    for options, reason in (
        ({"dtype": torch.int8}, "dtype: expected torch.float32"),
        ({"dtype": "float32"}, "dtype: expected torch.float32"),
        ({"device": "toaster"}, "device: expected"),
        ({"device": "meta"}, "device: expected cpu or cuda"),
        ({"device": "cuda:99"}, "device: expected cpu"),
        ({"backend": "magic"}, "backend: expected one of auto, reference, native, triton, got 'magic'"),
        ({"backend": "triton", "dtype": torch.float64}, "'triton' cannot run this call"),
    ):
        with pytest.raises(UserError, match=reason):
            UniF2acePipeline.from_pretrained(saved, **options)


def test_back_ends_can_be_chosen(pipe, saved, faces):
    reference = UniF2acePipeline.from_pretrained(saved, backend="reference")
    assert set(reference.backends().values()) == {"reference"}
    with use_backend("reference"):
        assert set(pipe.backends().values()) == {"reference"}
        expected = data(pipe.generate(PROMPT, num_images_per_prompt=3, seed=5))
    assert data(reference.generate(PROMPT, num_images_per_prompt=3, seed=5)) == expected


def test_pictures_are_read_on_the_chosen_back_end(saved, faces, monkeypatch):
    reference, seen = UniF2acePipeline.from_pretrained(saved, backend="reference"), []
    encoder = reference.parts.encoders["face"]
    encode = encoder.encode
    monkeypatch.setattr(encoder, "encode", lambda images: seen.append(default_backend()) or encode(images))
    reference.caption(faces[0])
    assert seen == ["reference"]
