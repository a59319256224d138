"""The small codec: shapes, round trips, storage, refusals, and a training run that stops and goes on."""

import dataclasses
import json

import pytest
import torch

from tests.bits import assert_same_in_any_company
from unif2ace.codec import SmallCodec, SmallCodecConfig
from unif2ace.codec.invariant import in_parts
from unif2ace.codec.pixels import psnr, to_float, to_uint8
from unif2ace.errors import UserError
from unif2ace.training.codec import CodecTraining, face_window, train_codec

TINY = SmallCodecConfig(
    image_size=32, levels=(4, 3), widths=(8, 8, 16), encoder_blocks=(1, 1, 0), decoder_blocks=(1, 1, 1)
)


@pytest.fixture
def codec() -> SmallCodec:
    torch.manual_seed(0)
    return SmallCodec(TINY).eval()


def blobs(count: int, size: int = 32) -> torch.Tensor:
    """Smooth random pictures, uint8 [count, size, size, 3]."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return to_uint8(torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear"))


def test_pixels_round_trip_and_psnr():
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    assert torch.equal(to_uint8(to_float(images)), images)
    assert to_float(images).aminmax() == (-1, 1)
    zeros = torch.zeros(1, 3, 8, 8)
    assert psnr(zeros + 0.2, zeros) == pytest.approx(20.0, abs=1e-4)  # peak 2, error 0.2
    with pytest.raises(UserError, match="uint8"):
        to_float(zeros)
    with pytest.raises(UserError, match="floating point"):
        to_uint8(images)


def test_shapes_and_code_range(codec):
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    codes = codec.encode(images)
    assert (codes.shape, codes.dtype) == ((3, 16), torch.int64)
    assert set(codes.unique().tolist()) <= set(range(12))
    assert codec.codebook_size == 12
    assert (codec.grid, codec.num_tokens, codec.image_size) == (4, 16, 32)
    assert codec.decode(codec.encode(images[:0])).shape == (0, 3, 32, 32)
    rebuilt = codec.decode(codes)
    assert rebuilt.shape == images.shape
    assert rebuilt.abs().max() <= 1


def test_decode_of_codes_equals_the_training_path(codec):
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    rebuilt, codes = codec(images)
    assert torch.equal(codes, codec.encode(images))
    torch.testing.assert_close(codec.decode(codes), rebuilt.clamp(-1, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [32, 64, 128])  # at 64 and 128 GroupNorm meets maps of 1024 pixels and more
def test_an_image_read_and_drawn_in_any_company_has_the_same_bits(size):
    torch.manual_seed(size)
    blocks = {"encoder_blocks": (1, 1, 1), "decoder_blocks": (1, 1, 1)}
    codec = SmallCodec(dataclasses.replace(TINY, image_size=size, **blocks)).eval()
    for name, weight in codec.named_parameters():
        if name.endswith("mix.weight"):  # zeros at first: blocks that do nothing
            torch.nn.init.normal_(weight, std=0.1)
    pictures = torch.randint(0, 256, (9, size, size, 3), dtype=torch.uint8)
    with torch.no_grad():  # before rounding already
        assert_same_in_any_company(lambda some: in_parts(codec.encoder, to_float(some)), pictures)
    alone = [codec.encode(to_float(picture[None])) for picture in pictures]
    assert torch.equal(codec.encode(to_float(pictures)), torch.cat(alone))
    assert_same_in_any_company(codec.decode, torch.randint(0, 12, (9, codec.num_tokens)))


def test_gradient_passes_the_rounding(codec):
    rebuilt, _ = codec(torch.rand(2, 3, 32, 32))
    rebuilt.square().mean().backward()
    assert codec.encoder.stem.weight.grad.abs().max() > 0


def test_every_level_is_in_use_before_training():
    torch.manual_seed(0)
    codec = SmallCodec(TINY).train()
    _, codes = codec(to_float(blobs(64)))
    assert len(codes.unique()) == codec.codebook_size


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_save_and_load(codec, tmp_path, dtype):
    codec.save_pretrained(tmp_path, dtype)
    again = SmallCodec.from_pretrained(tmp_path)
    assert (again.config, again.training) == (codec.config, False)
    codes = torch.randint(0, 12, (2, 16))
    tolerance = 1e-6 if dtype is None else 0.05
    torch.testing.assert_close(again.decode(codes), codec.decode(codes), rtol=0, atol=tolerance)


def test_refuses_bad_input(codec):
    with pytest.raises(UserError, match=r"\[B, 3, 32, 32\]"):
        codec.encode(torch.zeros(1, 3, 64, 64))
    with pytest.raises(UserError, match="integers"):
        codec.decode(torch.zeros(1, 16))
    with pytest.raises(UserError, match=r"0\.\.11"):
        codec.decode(torch.full((1, 16), 12))
    for fields in ({"image_size": 60}, {"levels": (2, 4)}, {"widths": (8, 8, 9)}, {"decoder_blocks": (1, 1)}):
        with pytest.raises(UserError):
            SmallCodecConfig(**fields)


def test_refuses_bad_files(codec, tmp_path):
    with pytest.raises(UserError, match="found none"):
        SmallCodec.from_pretrained(tmp_path)
    codec.save_pretrained(tmp_path)
    weights, config = tmp_path / "codec.safetensors", tmp_path / "codec.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="corrupt"):
        SmallCodec.from_pretrained(tmp_path)
    weights.write_bytes(whole)
    config.write_text(json.dumps({**json.loads(config.read_text()), "widths": [8, 16, 16]}))
    with pytest.raises(UserError, match="got others"):
        SmallCodec.from_pretrained(tmp_path)
    for value in ("5", "[8, null, 8]", '["a", "b", "c"]'):
        config.write_text(f'{{"widths": {value}}}')
        with pytest.raises(UserError, match="expected the values of a SmallCodecConfig"):
            SmallCodec.from_pretrained(tmp_path)
    config.write_text('{"colour": 1}')
    with pytest.raises(UserError, match="fields"):
        SmallCodec.from_pretrained(tmp_path)
    config.write_text("{")
    with pytest.raises(UserError, match="JSON"):
        SmallCodec.from_pretrained(tmp_path)


def test_face_window_has_mean_one_and_its_top_in_the_middle():
    window = face_window(64, 2.0)
    assert window.mean() == pytest.approx(1.0)
    assert window.argmax() // 64 in (32, 33)


def test_training_improves_and_resumes_exactly(tmp_path):
    settings = CodecTraining(
        image_size=32,
        levels=(4, 4, 4),
        widths=(8, 16, 32),
        encoder_blocks=(0, 0, 1),
        decoder_blocks=(0, 1, 1),
        steps=40,
        batch_size=16,
        warmup_steps=5,
        log_every=10,
        evaluate_every=20,
        checkpoint_every=20,
    )
    images = blobs(160)
    train, val = images[:128], images[128:]
    codec, scores = train_codec(settings, train, val, tmp_path / "whole")
    assert scores["codebook_use"] > 0.5
    records = [json.loads(line) for line in (tmp_path / "whole/train.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses[-1] < 0.9 * losses[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SmallCodec, "forward", failing_after(30, SmallCodec.forward))
        with pytest.raises(KeyboardInterrupt):
            train_codec(settings, train, val, tmp_path / "halves")
    resumed, _ = train_codec(settings, train, val, tmp_path / "halves")
    for name, value in codec.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name

    changed = dataclasses.replace(settings, learning_rate=1e-3)
    with pytest.raises(UserError, match="other settings"):
        train_codec(changed, train, val, tmp_path / "halves")
    (tmp_path / "halves/checkpoint.pt").write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match="corrupt"):
        train_codec(settings, train, val, tmp_path / "halves")


def failing_after(calls: int, function):
    """`function`, interrupted as by Ctrl-C once it has run `calls` times."""
    count = 0

    def wrapped(*arguments):
        nonlocal count
        count += 1
        if count > calls:
            raise KeyboardInterrupt
        return function(*arguments)

    return wrapped


def test_training_settings_refuse_unknown_fields():
    with pytest.raises(UserError, match="colour"):
        CodecTraining.from_mapping({"colour": 1})
    with pytest.raises(UserError, match="steps"):
        CodecTraining(steps=0)
