"""What a drawn face can look like: the named attributes of the avatar dataset and when each can be seen.

Each field of `python_avatars` that still differs visibly at 64 pixels is one attribute with plain English values.
Left out: the joke parts (vomit, hearts, dizzy eyes), near-twins of a part that is kept (fewer than a handful of
pixels differ), parts that hide half the face (space helmet, cowl), parts below the crop (shirt prints) and the three
noses (at most a dozen faint pixels).

The families follow UniF2aceD-1M: *appearance* (what a person looks like), *emotion* (what the face expresses),
*action* (what the person does or wears for it).
"""

from __future__ import annotations

from dataclasses import dataclass

NONE = "none"


@dataclass(frozen=True)
class Attribute:
    """One labelled property. `parts` maps an English value to the member name of the `python_avatars` enum (or a
    colour).
    """

    name: str
    family: str
    parts: dict[str, str]
    question: tuple[str, ...]

    @property
    def values(self) -> tuple[str, ...]:
        return tuple(self.parts)

    def index(self, value: str) -> int:
        return self.values.index(value)


_HAIR_COLORS = {
    "auburn": "#A55728",
    "black": "#2C1B18",
    "blonde": "#D6B370",
    "brown": "#724133",
    "pink": "#F59797",
    "red": "#C93305",
    "silver": "#E8E1E1",
}

_FABRIC_COLORS = {
    "black": "#262E33",
    "sky blue": "#65C9FF",
    "blue": "#5199E4",
    "navy": "#25557C",
    "grey": "#929598",
    "mint": "#A7FFC4",
    "peach": "#FFDEB5",
    "yellow": "#FFFFB1",
    "pink": "#FF488E",
    "red": "#FF5C5C",
    "white": "#FFFFFF",
}

_ALL = (
    Attribute(
        "skin",
        "appearance",
        {
            "pale": "#FFDBB4",
            "fair": "#EDB98A",
            "golden": "#F8D25C",
            "orange": "#FD9841",
            "tan": "#D08B5B",
            "brown": "#AE5D29",
            "dark": "#614335",
        },
        ("What is the skin tone?", "What skin does the person have?"),
    ),
    Attribute(
        "hair",
        "appearance",
        {
            "bald head": "NONE",
            "receding hair": "SIDES",
            "buzz cut": "BUZZCUT",
            "short hair": "SHORT_FLAT",
            "short curls": "SHORT_CURLY",
            "short twists": "SHORT_DREADS_1",
            "pixie cut": "PIXIE",
            "pompadour": "POMPADOUR",
            "quiff": "QUIFF",
            "mohawk": "MOHAWK",
            "faux hawk": "FRIZZLE",
            "spiky hair": "EVIL_SPIKE",
            "bun": "BUN",
            "bob": "BOB",
            "bob with bangs": "MIA_WALLACE",
            "shoulder-length hair": "LONG_NOT_TOO_LONG",
            "long straight hair": "STRAIGHT_1",
            "straight hair with bangs": "STRAIGHT_STRAND",
            "long wavy hair": "CURVY",
            "big hair": "BIG_HAIR",
            "big curls": "CURLY",
            "afro": "FRO",
            "afro with a headband": "FRO_BAND",
            "dreadlocks": "DREADS",
            "frizzy hair": "SHORT_DREADS_2",
            "shaggy hair": "SHAGGY",
            "mullet": "SHAGGY_MULLET",
            "cornrows": "CORNROWS",
            "braids": "BRAIDS",
            "pigtails": "DREADLOCKS",
            "wild hair": "EINSTEIN_HAIR",
            "tousled hair": "WILD",
            "flower crown": "FRIDA",
        },
        ("What is the hairstyle?", "How is the hair styled?"),
    ),
    Attribute("hair color", "appearance", dict(_HAIR_COLORS), ("What color is the hair?", "Which hair color is it?")),
    Attribute(
        "headwear",
        "action",
        {
            NONE: "",
            "wide-brimmed hat": "HAT",
            "hijab": "HIJAB",
            "turban": "TURBAN",
            "fur hat": "WINTER_HAT_1",
            "bobble hat": "WINTER_HAT_2",
            "beanie": "WINTER_HAT_3",
            "cat-ear beanie": "WINTER_HAT_4",
            "chef hat": "CHEF_CAP",
            "helmet": "GLADIATOR_HELMET",
        },
        ("What is on the head?", "Which headwear does the person wear?"),
    ),
    Attribute(
        "headwear color",
        "appearance",
        dict(_FABRIC_COLORS),
        ("What color is the headwear?", "Which color is worn on the head?"),
    ),
    Attribute(
        "eyebrows",
        "emotion",
        {
            "no": "NONE",
            "neutral": "DEFAULT_NATURAL",
            "angry": "ANGRY_NATURAL",
            "flat": "FLAT_NATURAL",
            "frowning": "FROWN_NATURAL",
            "raised": "RAISED_EXCITED_NATURAL",
            "sad": "SAD_CONCERNED_NATURAL",
            "joined": "UNIBROW_NATURAL",
            "uneven": "UP_DOWN_NATURAL",
        },
        ("How are the eyebrows?", "What eyebrows are these?"),
    ),
    Attribute(
        "eyes",
        "action",
        {
            "open": "DEFAULT",
            "closed": "CLOSED",
            "crying": "CRY",
            "rolling": "EYE_ROLL",
            "happy": "HAPPY",
            "sideways": "SIDE",
            "squinting": "SQUINT",
            "surprised": "SURPRISED",
            "winking": "WINK",
            "wildly winking": "WINK_WACKY",
        },
        ("How are the eyes?", "What are the eyes doing?"),
    ),
    Attribute(
        "mouth",
        "emotion",
        {
            "talking": "DEFAULT",
            "worried": "CONCERNED",
            "gasping": "DISBELIEF",
            "chewing": "EATING",
            "gritting the teeth": "GRIMACE",
            "sad": "SAD",
            "screaming": "SCREAM_OPEN",
            "serious": "SERIOUS",
            "smiling": "SMILE",
            "sticking out the tongue": "TONGUE",
            "smirking": "TWINKLE",
            "grinning": "BIG_SMILE",
        },
        ("What is the mouth doing?", "What does the mouth express?"),
    ),
    Attribute(
        "facial hair",
        "appearance",
        {
            NONE: "NONE",
            "light beard": "BEARD_LIGHT",
            "long beard": "BEARD_MAGESTIC",
            "full beard": "BEARD_MEDIUM",
            "handlebar moustache": "MOUSTACHE_FANCY",
            "thick moustache": "MOUSTACHE_MAGNUM",
            "walrus moustache": "EINSTEIN_MOUSTACHE",
            "thin beard": "WICK_BEARD",
        },
        ("What facial hair is there?", "Which beard or moustache is it?"),
    ),
    Attribute(
        "facial hair color",
        "appearance",
        dict(_HAIR_COLORS),
        ("What color is the facial hair?", "Which color is the beard or moustache?"),
    ),
    Attribute(
        "eyewear",
        "action",
        {
            NONE: "NONE",
            "eyepatch": "EYEPATCH",
            "white sunglasses": "KURT",
            "clear glasses": "PRESCRIPTION_1",
            "square glasses": "PRESCRIPTION_2",
            "round glasses": "ROUND",
            "dark sunglasses": "WAYFARERS",
            "purple sunglasses": "WAYFARERS_2",
        },
        ("What is worn over the eyes?", "Which eyewear is it?"),
    ),
    Attribute(
        "clothing",
        "action",
        {
            "bare shoulders": "NONE",
            "blazer": "BLAZER_SHIRT",
            "collared sweater": "COLLAR_SWEATER",
            "hoodie": "HOODIE",
            "overalls": "OVERALL",
            "crew-neck shirt": "SHIRT_CREW_NECK",
            "scoop-neck shirt": "SHIRT_SCOOP_NECK",
            "v-neck shirt": "SHIRT_V_NECK",
            "space suit": "ASTRONAUT_SUIT",
            "tuxedo": "BOND_SUIT",
            "chef jacket": "CHEF",
            "armour": "GLADIATOR",
            "robe": "JEDI_ROBE",
            "suit and tie": "SHIRT_WICK",
        },
        ("What clothing is worn?", "What is the person wearing?"),
    ),
    Attribute(
        "clothing color",
        "appearance",
        dict(_FABRIC_COLORS),
        ("What color is the clothing?", "Which color are the clothes?"),
    ),
    Attribute(
        "background",
        "appearance",
        {"white": "#FFFFFF", "blue": "#9AD4F5", "yellow": "#F7E29A", "black": "#262E33"},
        ("What color is the background?", "Which background is it?"),
    ),
)

ATTRIBUTES: dict[str, Attribute] = {attribute.name: attribute for attribute in _ALL}

# Parts whose colour cannot be chosen, or shows on too few pixels to be told.
_FIXED_COLOR_CLOTHING = frozenset({"bare shoulders", "space suit", "tuxedo", "robe", "suit and tie"})
_EYES_HIDDEN_BY = frozenset({"eyepatch", "white sunglasses", "dark sunglasses", "purple sunglasses"})


def visible(face: dict[str, str]) -> dict[str, str]:
    """The attributes of `face` that a viewer of the picture can tell, in the order of `ATTRIBUTES`."""
    hidden = set()
    if face["headwear"] != NONE:
        hidden |= {"hair", "hair color"}
    if face["headwear"] in (NONE, "chef hat"):
        hidden.add("headwear color")
    if face["headwear"] == "hijab":
        hidden |= {"facial hair", "facial hair color"}
    if face["hair"] == "bald head":
        hidden.add("hair color")
    if face["facial hair"] == NONE:
        hidden.add("facial hair color")
    if face["eyewear"] in _EYES_HIDDEN_BY:
        hidden.add("eyes")
    if face["eyewear"] == "white sunglasses":
        hidden.add("eyebrows")
    if face["clothing"] in _FIXED_COLOR_CLOTHING:
        hidden.add("clothing color")
    return {name: face[name] for name in ATTRIBUTES if name not in hidden}


def labels(face: dict[str, str]) -> list[int]:
    """Class index per attribute in the order of `ATTRIBUTES`; -1 where `visible` says the picture cannot tell."""
    seen = visible(face)
    return [ATTRIBUTES[name].index(seen[name]) if name in seen else -1 for name in ATTRIBUTES]
