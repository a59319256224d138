"""The attribute table: every value can be drawn, and what cannot be seen carries no label."""

import numpy as np
import pytest
import python_avatars

from unif2ace.data.attributes import ATTRIBUTES, NONE, labels, visible
from unif2ace.data.avatars import sample_face

ENUMS = {
    "hair": "HairType",
    "headwear": "HatType",
    "eyebrows": "EyebrowType",
    "eyes": "EyeType",
    "mouth": "MouthType",
    "facial hair": "FacialHairType",
    "eyewear": "AccessoryType",
    "clothing": "ClothingType",
}


@pytest.fixture(scope="module")
def faces():
    rng = np.random.default_rng(0)
    return [sample_face(rng) for _ in range(300)]


@pytest.mark.parametrize(("name", "enum"), ENUMS.items())
def test_every_value_names_a_part_of_the_library(name, enum):
    members = getattr(python_avatars, enum).__members__
    assert set(ATTRIBUTES[name].parts.values()) - {""} <= set(members)


def test_values_and_parts_are_distinct():
    for attribute in ATTRIBUTES.values():
        assert len(set(attribute.parts.values())) == len(attribute.parts), attribute.name
        assert attribute.family in ("appearance", "emotion", "action")
        assert all(question.endswith("?") for question in attribute.question)


def test_labels_are_the_visible_values(faces):
    for face in faces:
        seen = visible(face)
        for (name, attribute), label in zip(ATTRIBUTES.items(), labels(face), strict=True):
            assert label == (attribute.index(face[name]) if name in seen else -1)


def test_headwear_hides_hair_and_shades_hide_eyes(faces):
    face = faces[0] | {"headwear": "beanie", "eyewear": "dark sunglasses", "clothing": "tuxedo", "facial hair": NONE}
    assert not {"hair", "hair color", "eyes", "clothing color", "facial hair color"} & set(visible(face))
    bare = face | {"headwear": NONE, "hair": "bald head", "eyewear": NONE}
    assert {"hair", "eyes"} <= set(visible(bare))
    assert not {"hair color", "headwear color"} & set(visible(bare))


def test_visible_keeps_the_order_of_the_table(faces):
    order = list(ATTRIBUTES)
    for face in faces:
        assert list(visible(face)) == sorted(visible(face), key=order.index)
