"""What a UniF2ace model looks like: dataclasses, named presets, JSON in and out, and an exact parameter count.

A configuration is frozen; derive a variant with `dataclasses.replace` or `preset(name, hidden_size=256)`. Reading JSON
is strict: an unknown field, a missing preset or a wrong type is a `UserError` that names it, because a misspelt field
that is silently ignored costs a training run.

Parameter budget of one layer with hidden H, E experts of width I and a shared expert of width S per task group:

    attention 4 H^2  |  token-level MoE  2 * (2 E H I + 2 H S) + 2 E H  |  dense FFN instead  2 H * ffn_width

so `unif2ace-1.8b` (H = 2048, E = 8, I = 512, S = 1024, 24 layers) holds 0.40 B in attention, 1.01 B in the token-level
MoE, 0.06 B in resamplers and 0.24 B in the embedding and the (untied) head.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass, field

from unif2ace.errors import UserError

TASKS = ("understanding", "generation")  # the index is the expert group of a token
FEATURE_EXPERTS = ("noise", "clip", "face")
SEQUENCE_EXPERTS = {
    "understanding": ("copy", "zero", "clip", "face"),
    "generation": ("copy", "zero", "noise"),
}


def _positive(config: object, *names: str) -> None:
    for name in names:
        if getattr(config, name) <= 0:
            raise UserError(f"{type(config).__name__}: {name} must be positive, got {getattr(config, name)}")


@dataclass(frozen=True)
class TokenMoEConfig:
    """Grouped token-level MoE; every number is per task group (there are two groups)."""

    num_experts: int = 8
    top_k: int = 4
    expert_width: int = 512
    shared_width: int = 1024

    def __post_init__(self) -> None:
        _positive(self, "num_experts", "top_k", "expert_width", "shared_width")
        if self.top_k > self.num_experts:
            raise UserError(f"TokenMoEConfig: top_k must be at most num_experts = {self.num_experts}, got {self.top_k}")


@dataclass(frozen=True)
class SequenceMoEConfig:
    """Grouped sequence-level MoE over image rows: its experts per task, and the shape of each external feature.

    `clip_rows x clip_width` and `face_rows x face_width` describe the features given to the model; an expert list
    without "clip" and "face" makes a model that needs no features. `scale_init` is the initial layer scale s: 0 makes
    the whole level an exact identity (converted checkpoints), a small value lets a model trained from scratch use it at
    once.
    """

    understanding_experts: tuple[str, ...] = ("copy", "copy", "clip", "face")
    generation_experts: tuple[str, ...] = ("copy", "copy", "zero", "noise")
    top_k: int = 2
    resampler_width: int = 256
    clip_rows: int = 576
    clip_width: int = 1024
    face_rows: int = 1
    face_width: int = 512
    scale_init: float = 0.01

    def __post_init__(self) -> None:
        _positive(self, "top_k", "resampler_width", "clip_rows", "clip_width", "face_rows", "face_width")
        if self.resampler_width % 2:
            raise UserError(f"SequenceMoEConfig: resampler_width must be even, got {self.resampler_width}")
        for task in TASKS:
            experts, allowed = self.experts(task), SEQUENCE_EXPERTS[task]
            for name in experts:
                if name not in allowed:
                    raise UserError(f"SequenceMoEConfig: {task}_experts may hold {', '.join(allowed)}, got {name!r}")
            for name in FEATURE_EXPERTS:
                if experts.count(name) > 1:
                    raise UserError(f"SequenceMoEConfig: {task}_experts may hold {name!r} once, got {list(experts)}")
            if len(experts) < self.top_k:
                raise UserError(
                    f"SequenceMoEConfig: {task}_experts must hold at least top_k = {self.top_k} names, "
                    f"got {list(experts)}"
                )

    def experts(self, task: str) -> tuple[str, ...]:
        """The experts of `task`, in router column order."""
        return self.understanding_experts if task == "understanding" else self.generation_experts

    def feature_names(self, task: str) -> tuple[str, ...]:
        """The feature experts of `task`, in router column order."""
        return tuple(name for name in self.experts(task) if name in FEATURE_EXPERTS)

    def feature_shape(self, name: str) -> tuple[int, int]:
        """(rows, width) of the memory that expert `name` resamples; the mask-ratio embedding is one low-width row."""
        return {
            "noise": (1, self.resampler_width),
            "clip": (self.clip_rows, self.clip_width),
            "face": (self.face_rows, self.face_width),
        }[name]


@dataclass(frozen=True)
class UniF2aceConfig:
    """The whole model. Defaults are the preset `unif2ace-1.8b`; `token_moe=None` means a dense FFN of `ffn_width`."""

    num_layers: int = 24
    hidden_size: int = 2048
    num_heads: int = 32
    ffn_width: int = 8192
    parallel_block: bool = True
    layer_norm_eps: float = 1e-5
    rotary_dim: int = 32
    rotary_theta: float = 10000.0
    init_std: float = 0.02
    n_text: int = 50295
    end_of_text: int = 50256
    codebook_size: int = 8192
    image_size: int = 256
    num_image_tokens: int = 256
    image_positions: bool = False  # a learned vector per image row, added to its embedding
    token_moe: TokenMoEConfig | None = field(default_factory=TokenMoEConfig)
    sequence_moe: SequenceMoEConfig | None = field(default_factory=SequenceMoEConfig)

    def __post_init__(self) -> None:
        _positive(self, "num_layers", "hidden_size", "num_heads", "ffn_width", "layer_norm_eps", "rotary_theta")
        _positive(self, "init_std", "n_text", "codebook_size", "image_size", "num_image_tokens")
        if self.hidden_size % self.num_heads:
            raise UserError(
                f"UniF2aceConfig: hidden_size must be a multiple of num_heads = {self.num_heads}, "
                f"got {self.hidden_size}"
            )
        if self.rotary_dim % 2 or not 0 <= self.rotary_dim <= self.head_dim:
            raise UserError(
                f"UniF2aceConfig: rotary_dim must be even and at most head_dim = {self.head_dim}, got {self.rotary_dim}"
            )
        if not 0 <= self.end_of_text < self.n_text:
            raise UserError(
                f"UniF2aceConfig: end_of_text must be a text id below n_text = {self.n_text}, got {self.end_of_text}"
            )
        if math.isqrt(self.num_image_tokens) ** 2 != self.num_image_tokens:
            raise UserError(
                f"UniF2aceConfig: num_image_tokens must be a square number (a grid), got {self.num_image_tokens}"
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def image_rows(self) -> int:
        """Rows one image takes in a sequence: soi, the codes, eoi."""
        return self.num_image_tokens + 2

    @property
    def vocabulary_size(self) -> int:
        """Text ids, ten control ids, image codes and the mask id."""
        return self.n_text + 10 + self.codebook_size + 1

    def num_parameters(self, active: bool = False) -> int:
        """Exact number of parameters; with `active`, those that one token can meet.

        Active leaves out, per layer, the routed experts a token does not choose, the other task's shared expert, and
        the resamplers of the task with fewer of them. Embedding and head count in full in both numbers.
        """
        hidden, layers = self.hidden_size, self.num_layers

        def mlp(width: int) -> int:  # up and down projection with biases
            return 2 * hidden * width + width + hidden

        norms = 2 * hidden if self.parallel_block else 4 * hidden
        layer = norms + 4 * (hidden * hidden + hidden) + 4 * self.head_dim
        if self.token_moe is None:
            layer += mlp(self.ffn_width)
        else:
            moe = self.token_moe
            layer += 2 * moe.num_experts * hidden  # router
            layer += (moe.top_k if active else 2 * moe.num_experts) * mlp(moe.expert_width)
            layer += (1 if active else 2) * mlp(moe.shared_width)
        total = 2 * self.vocabulary_size * hidden + self.vocabulary_size + 2 * hidden
        if self.image_positions:
            total += self.image_rows * hidden
        if self.sequence_moe is not None:
            layer += self._sequence_moe_parameters(active)
            if "noise" in self.sequence_moe.generation_experts:
                low = self.sequence_moe.resampler_width
                total += 2 * (low * low + low)  # MLP of the mask-ratio embedding
        return total + layers * layer

    def _sequence_moe_parameters(self, active: bool) -> int:
        moe, hidden = self.sequence_moe, self.hidden_size
        low = moe.resampler_width

        def resampler(name: str) -> int:
            rows, width = moe.feature_shape(name)
            projections = (2 if rows > 1 else 1) * (width * low + low)  # values, and keys when there is a choice
            output = low * hidden + hidden + 2  # and the two mix scalars
            return self.image_rows * low + 2 * width + projections + 2 * low + output

        per_task = [sum(resampler(name) for name in moe.feature_names(task)) for task in TASKS]
        router = sum(len(moe.experts(task)) for task in TASKS) * hidden
        return 2 * hidden + 1 + router + (max(per_task) if active else sum(per_task))

    def to_dict(self) -> dict[str, object]:
        """Plain nested dictionary, ready for JSON."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """Indented JSON text; `from_json` gives an equal configuration back."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls, data: object) -> UniF2aceConfig:
        """Build from a nested dictionary; absent fields keep their defaults, unknown ones are refused by name."""
        return _build(cls, data, cls.__name__)

    @classmethod
    def from_json(cls, text: str) -> UniF2aceConfig:
        """Build from JSON text. Raises `UserError` for malformed JSON, unknown fields and wrong types."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"UniF2aceConfig: expected JSON text, got something unreadable ({error})") from error
        return cls.from_dict(data)


def _build(cls: type, data: object, where: str):
    if not isinstance(data, dict):
        raise UserError(f"{where}: expected an object of fields, got {type(data).__name__}")
    hints = typing.get_type_hints(cls)
    for name in data:
        if name not in hints:
            raise UserError(f"{where}: unknown field {name!r}, expected one of {', '.join(hints)}")
    return cls(**{name: _convert(hints[name], value, f"{where}.{name}") for name, value in data.items()})


def _convert(hint: object, value: object, where: str) -> object:
    """`value` as the annotated type `hint`, or a `UserError`; JSON integers are accepted for float fields."""
    if isinstance(hint, types.UnionType):  # the only unions here are "nested dataclass or None"
        if value is None:
            return None
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else _build(hint, value, where)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
            raise UserError(f"{where}: expected a list of strings, got {value!r}")
        return tuple(value)
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise UserError(f"{where}: expected {hint.__name__}, got {value!r}")


PRESETS: dict[str, dict[str, object]] = {
    "unif2ace-1.8b": {},
    "unif2ace-1.8b-512": {"image_size": 512, "num_image_tokens": 1024},
    "show-o-1.3b": {"token_moe": None, "sequence_moe": None},
    "avatars-tiny": {
        "num_layers": 4,
        "hidden_size": 192,
        "num_heads": 6,
        "ffn_width": 768,
        "rotary_dim": 16,
        "n_text": 768,
        "end_of_text": 0,
        "codebook_size": 1024,
        "image_size": 64,
        "num_image_tokens": 64,
        # Rotary positions are relative; a small model trained for minutes need not rediscover where a row stands.
        "image_positions": True,
        "token_moe": TokenMoEConfig(num_experts=4, top_k=2, expert_width=128, shared_width=256),
        "sequence_moe": SequenceMoEConfig(resampler_width=48, clip_rows=16, clip_width=64, face_rows=1, face_width=64),
    },
    # For measuring speed: the pictures and words of avatars-tiny, in a model whose matrix products matter.
    "avatars-100m": {
        "num_layers": 7,
        "hidden_size": 768,
        "num_heads": 12,
        "ffn_width": 3072,
        "n_text": 768,
        "end_of_text": 0,
        "codebook_size": 1024,
        "image_size": 64,
        "num_image_tokens": 64,
        "image_positions": True,
        "token_moe": TokenMoEConfig(num_experts=8, top_k=2, expert_width=384, shared_width=768),
        "sequence_moe": SequenceMoEConfig(resampler_width=64, clip_rows=16, clip_width=64, face_rows=1, face_width=64),
    },
}


def preset(name: str, **overrides: object) -> UniF2aceConfig:
    """A named configuration, with any top-level fields replaced: `preset("avatars-tiny", num_layers=4)`.

    Nested parts are replaced whole: `token_moe=dataclasses.replace(preset(name).token_moe, top_k=1)`, or a dictionary.
    Raises `UserError` for an unknown preset (with the list) or field.
    """
    if name not in PRESETS:
        raise UserError(f"preset: unknown preset {name!r}, expected one of {', '.join(PRESETS)}")
    return UniF2aceConfig.from_dict({**PRESETS[name], **overrides})
