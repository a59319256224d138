"""Picture files as people have them: turned by the camera, with transparent pixels, with 16 bits, no files at all."""

import os

import numpy as np
import pytest
from PIL import Image

from unif2ace import inputs
from unif2ace.errors import UserError

ORIENTATION, TURNED_LEFT = 0x0112, 6  # EXIF: to be shown turned right by 90 degrees


@pytest.fixture
def halves():
    """Left half red, right half blue."""
    image = Image.new("RGB", (32, 32), "red")
    image.paste("blue", (16, 0, 32, 32))
    return image


def test_a_picture_is_taken_as_viewers_show_it(halves, tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = TURNED_LEFT
    halves.rotate(90).save(tmp_path / "photo.png", exif=exif)
    assert inputs.open_face(tmp_path / "photo.png", 32, fit=False).tobytes() == halves.tobytes()
    exif[ORIENTATION] = 77
    halves.save(tmp_path / "photo.png", exif=exif)
    assert inputs.open_face(tmp_path / "photo.png", 32, fit=True).tobytes() == halves.tobytes()


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "face.png")
    with pytest.raises(UserError, match=r"face\.png: expected a picture file, found a pipe or device"):
        inputs.open_face(tmp_path / "face.png", 32, fit=True)


def test_channels_of_16_bits_are_not_clipped_silently(tmp_path):
    deep = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    with pytest.raises(UserError, match=r"deep\.png: expected a picture of 8 bits per channel, got I;16"):
        inputs.open_mask(tmp_path / "deep.png", 32, fit=True)
    with pytest.raises(UserError, match="expected a picture of 8 bits per channel"):
        inputs.open_face(tmp_path / "deep.png", 32, fit=True)


def test_a_mask_has_no_transparent_pixels(halves, tmp_path):
    """Opaque alpha channels are fine, of whatever kind; below transparent pixels lies either color."""
    for mode, name in (("RGBA", "mask.png"), ("LA", "grey.png"), ("P", "mask.gif")):
        mask = Image.new("L", (32, 32), "black")
        mask.paste("white", (0, 0, 16, 32))
        mask.convert(mode).save(tmp_path / name)
        keep = np.array(inputs.open_mask(tmp_path / name, 32, fit=False)) >= inputs.KEEP_LEVEL
        assert keep[:, :16].all()
        assert not keep[:, 16:].any()
    clear = halves.convert("RGBA")
    clear.putpixel((3, 3), (255, 255, 255, 0))
    clear.save(tmp_path / "clear.png")
    with pytest.raises(
        UserError, match=r"clear\.png: expected a mask of white \(kept\) and black, got one with transp"
    ):
        inputs.open_mask(tmp_path / "clear.png", 32, fit=False)
