"""Sentences about a drawn face: captions, and questions with exact answers.

A caption mentions each visible attribute with a probability of 0.92 in one of several wordings and a shuffled order,
and says which it mentions, so that a generated face can be held against what was asked.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from unif2ace.data.attributes import ATTRIBUTES, NONE, visible


class Caption(NamedTuple):
    text: str
    attributes: list[str]  # names of the attributes the text states


class Question(NamedTuple):
    question: str
    answer: str
    attribute: str


# Values that are no countable noun take no article.
_PLURAL_ENDINGS = (
    "hair",
    "curls",
    "twists",
    "cornrows",
    "braids",
    "pigtails",
    "dreadlocks",
    "bangs",
    "overalls",
    "glasses",
    "armour",
)
_DESCRIBE = ("Describe the face.", "What does the person look like?", "Write a caption for this face.")


def _with_article(noun: str) -> str:
    if noun.endswith(_PLURAL_ENDINGS) and not noun.startswith("bob"):
        return noun
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _colored(face: dict[str, str], noun: str, color: str, keep_color: bool) -> str:
    return f"{face[color]} {noun}" if keep_color and color in face else noun


def caption(face: dict[str, str], rng: np.random.Generator, mention: float = 0.92) -> Caption:
    """One sentence about `face` (attribute name -> value); `mention` is the chance that each visible one is named."""
    seen = visible(face)
    keep = {name for name in seen if rng.random() < mention}
    for color, owner in (
        ("hair color", "hair"),
        ("headwear color", "headwear"),
        ("facial hair color", "facial hair"),
        ("clothing color", "clothing"),
    ):
        if owner not in keep:
            keep.discard(color)  # a colour is only said of a thing that is named
    said: list[str] = []
    parts: list[str] = []

    def say(text: str, *names: str) -> None:
        parts.append(text)
        said.extend(name for name in names if name in keep)

    if "hair" in keep:
        say(
            "with " + _with_article(_colored(seen, seen["hair"], "hair color", "hair color" in keep)),
            "hair",
            "hair color",
        )
    if "headwear" in keep and seen["headwear"] != NONE:
        verb = ("wearing ", "with ")[rng.integers(2)]
        say(
            verb + _with_article(_colored(seen, seen["headwear"], "headwear color", "headwear color" in keep)),
            "headwear",
            "headwear color",
        )
    elif "headwear" in keep and rng.random() < 0.25:
        say(("wearing nothing on the head", "without headwear")[rng.integers(2)], "headwear")
    if "eyebrows" in keep:
        say(f"with {seen['eyebrows']} eyebrows", "eyebrows")
    if "eyes" in keep:
        say(f"with {seen['eyes']} eyes", "eyes")
    if "mouth" in keep:
        say(seen["mouth"], "mouth")
    if "facial hair" in keep and seen["facial hair"] != NONE:
        noun = _colored(seen, seen["facial hair"], "facial hair color", "facial hair color" in keep)
        say("with " + _with_article(noun), "facial hair", "facial hair color")
    elif "facial hair" in keep and rng.random() < 0.25:
        say(("clean-shaven", "without a beard")[rng.integers(2)], "facial hair")
    if "eyewear" in keep and seen["eyewear"] != NONE:
        say(("wearing ", "with ")[rng.integers(2)] + _with_article(seen["eyewear"]), "eyewear")
    elif "eyewear" in keep and rng.random() < 0.25:
        say(("without glasses", "wearing no glasses")[rng.integers(2)], "eyewear")
    if "clothing" in keep:
        noun = _colored(seen, seen["clothing"], "clothing color", "clothing color" in keep)
        if seen["clothing"] == "bare shoulders":
            say("with bare shoulders", "clothing")
        else:
            say(("in ", "wearing ", "dressed in ")[rng.integers(3)] + _with_article(noun), "clothing", "clothing color")
    rng.shuffle(parts)
    if "skin" in keep:
        subject = ("a {} person", "a person with {} skin", "a face with {} skin", "a {} face")[rng.integers(4)].format(
            seen["skin"]
        )
        said.append("skin")
    else:
        subject = ("a person", "a face", "somebody")[rng.integers(3)]
    text = ", ".join([subject, *parts])
    if "background" in keep:
        text += (" on a {} background", ", {} background", " in front of a {} wall")[rng.integers(3)].format(
            seen["background"]
        )
        said.append("background")
    return Caption(text, [name for name in ATTRIBUTES if name in said])


def _pieces(seen: dict[str, str]) -> list[str]:
    """The noun phrases of `full_caption`, in a fixed order; each states one attribute, or a thing and its colour."""
    pieces = [f"{seen['skin']} skin"]
    if "hair" in seen:
        pieces.append(_colored(seen, seen["hair"], "hair color", True))
    if seen["headwear"] != NONE:
        pieces.append(_colored(seen, seen["headwear"], "headwear color", True))
    pieces += [f"{seen[name]} {name}" for name in ("eyebrows", "eyes") if name in seen]
    pieces.append(seen["mouth"])
    if "facial hair" in seen:
        beard = seen["facial hair"]
        pieces.append("clean-shaven" if beard == NONE else _colored(seen, beard, "facial hair color", True))
    pieces.append("no glasses" if seen["eyewear"] == NONE else seen["eyewear"])
    pieces.append(_colored(seen, seen["clothing"], "clothing color", True))
    return [*pieces, f"{seen['background']} background"]


def full_caption(seen: dict[str, str]) -> str:
    """The complete description that captioning is trained on: all of `seen` (what is visible), in a fixed order."""
    return "a person with " + ", ".join(_pieces(seen))


def _all_pieces() -> dict[str, dict[str, str]]:
    """Every phrase `_pieces` can make -> the attributes it states."""
    table = {"clean-shaven": {"facial hair": NONE}, "no glasses": {"eyewear": NONE}}
    for thing, color in (
        ("hair", "hair color"),
        ("headwear", "headwear color"),
        ("facial hair", "facial hair color"),
        ("clothing", "clothing color"),
    ):
        for noun in ATTRIBUTES[thing].values:
            if noun != NONE:
                table[noun] = {thing: noun}
                table.update({f"{hue} {noun}": {thing: noun, color: hue} for hue in ATTRIBUTES[color].values})
    for name in ("skin", "eyebrows", "eyes", "background"):
        table.update({f"{value} {name}": {name: value} for value in ATTRIBUTES[name].values})
    for name in ("mouth", "eyewear"):
        table.update({value: {name: value} for value in ATTRIBUTES[name].values if value != NONE})
    return table


_STATED_BY = _all_pieces()


def parse_full_caption(text: str) -> dict[str, str]:
    """The attributes a description in the wording of `full_caption` states; phrases it would not use are left out."""
    stated: dict[str, str] = {}
    for piece in text.removeprefix("a person with ").split(","):
        stated.update(_STATED_BY.get(piece.strip(), {}))
    if "hair" in stated:
        stated.setdefault("headwear", NONE)
    return stated


def describe_prompt(rng: np.random.Generator) -> str:
    """A request for a description, in one of a few wordings."""
    return _DESCRIBE[rng.integers(len(_DESCRIBE))]


def questions(face: dict[str, str], rng: np.random.Generator) -> list[Question]:
    """One open question per visible attribute and three or four yes/no questions: at least ten in total."""
    result = []
    for name, value in visible(face).items():
        wordings = ATTRIBUTES[name].question
        result.append(Question(wordings[rng.integers(len(wordings))], value, name))
    seen = visible(face)
    checks = [
        ("Does the person wear a hat or other headwear?", seen["headwear"] != NONE, "headwear"),
        ("Is something worn over the eyes?", seen["eyewear"] != NONE, "eyewear"),
    ]
    if "facial hair" in seen:
        checks.append(("Is there a beard or moustache?", seen["facial hair"] != NONE, "facial hair"))
    result += [Question(text, "yes" if truth else "no", name) for text, truth, name in checks]
    # A yes/no question about a random value: true half of the time.
    name = list(seen)[rng.integers(len(seen))]
    true = rng.random() < 0.5
    others = [value for value in ATTRIBUTES[name].values if value != seen[name]]
    value = seen[name] if true else others[rng.integers(len(others))]
    result.append(Question(f"Is this true? {name}: {value}", "yes" if true else "no", name))
    return result
