"""Named problem sizes, shared by benchmarks and tests.

For each op two tables: `<OP>` holds the sizes that people run (benchmarks, GPU tests), `<OP>_SMALL` small awkward ones
for correctness on a CPU: primes, one of everything, nothing at all, K = E, groups of unequal size.

Where the sizes come from: `unif2ace-1.8b` has hidden size 2048, two groups of 8 experts of width 512, top-4, 258 image
rows per 256-pixel image (256 codes between soi and eoi); `avatars-tiny` is a few hundred wide. `h100-*` repeat the
sizes of published measurements, so that figures can be laid side by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class RoutingShape:
    """T tokens choose top_k experts; `group_bounds` splits the experts, tokens spread evenly over the groups."""

    tokens: int
    group_bounds: tuple[int, ...]
    top_k: int

    @property
    def experts(self) -> int:
        return self.group_bounds[-1]

    @property
    def groups(self) -> int:
        return len(self.group_bounds) - 1


@dataclass(frozen=True)
class ExpertShape:
    """T tokens of width H through E experts of width I, top_k of them for each token."""

    tokens: int
    hidden: int
    inner: int
    experts: int
    top_k: int
    activation: str = "gelu_tanh"

    @property
    def up_rows(self) -> int:
        return 2 * self.inner if self.activation in ("swiglu", "geglu") else self.inner

    @property
    def flops(self) -> int:
        """Forward; backward takes twice as many."""
        return 2 * self.tokens * self.top_k * self.hidden * (self.up_rows + self.inner)


@dataclass(frozen=True)
class MixShape:
    """Packed sequences of `lengths` rows of width H, mixed with `features` streams."""

    lengths: tuple[int, ...]
    hidden: int
    features: int

    @property
    def rows(self) -> int:
        return sum(self.lengths)


@dataclass(frozen=True)
class SamplingShape:
    """`images` times `rows` masked tokens, each drawn from `columns` codes, with or without guidance.

    `hidden` is the width of the rows that `head_sample` starts from.
    """

    images: int
    rows: int
    columns: int
    guidance: bool = True
    hidden: int = 2048


@dataclass(frozen=True)
class LossShape:
    """R rows of width H against a head of V columns, the last `code_columns` of which are image codes."""

    rows: int
    hidden: int
    columns: int
    code_columns: int


@dataclass(frozen=True)
class AttentionShape:
    """`sequences` packed generation layouts: causal `text` rows, then `image` rows that see everything."""

    sequences: int
    text: int
    image: int
    heads: int
    head_dim: int


@dataclass(frozen=True)
class ModelShape:
    """How much a whole model does in one call: faces drawn in `steps` steps, or asked about (four questions each), and
    (generation, understanding) sequences of a training step, with or without the update of the weights.
    """

    faces: int
    steps: int
    sequences: tuple[int, int]
    update: bool = True


@dataclass(frozen=True)
class BatchShape:
    """So many requests at once to a model of `unif2ace.evaluation.speed`: faces, drawn in `steps`, or answers."""

    model: str
    requests: int
    steps: int = 18


@dataclass(frozen=True)
class LinearShape:
    """M = rows of width K times a matrix of `columns` rows: a projection."""

    rows: int
    width: int
    columns: int


@dataclass(frozen=True)
class RotaryShape:
    """The queries (or keys) of T tokens."""

    tokens: int
    heads: int
    head_dim: int


@dataclass(frozen=True)
class HubModelShape:
    """A small random decoder of transformers, `model_type` as its configuration has it.

    One pass over `sequences` prompts of `length` tokens, or with `new_tokens` greedy generation behind them.
    """

    model_type: str
    sequences: int
    length: int
    new_tokens: int = 0
    layers: int = 2
    hidden: int = 512
    inner: int = 256
    experts: int = 16
    top_k: int = 4


ROUTING = {
    "decode-1": RoutingShape(1, (0, 8, 16), 4),
    "decode-64": RoutingShape(64, (0, 8, 16), 4),
    "generate-32": RoutingShape(2 * 32 * 258, (0, 8, 16), 4),
    "train": RoutingShape(8192, (0, 8, 16), 4),
    "sequences": RoutingShape(256, (0, 4, 8), 2),
    "experts-128": RoutingShape(8192, (0, 128), 8),
}
ROUTING_SMALL = {
    "no-token": RoutingShape(0, (0, 4), 2),
    "one-token": RoutingShape(1, (0, 8, 16), 4),
    "one-expert": RoutingShape(7, (0, 1), 1),
    "all-experts": RoutingShape(13, (0, 5), 5),
    "unequal-groups": RoutingShape(61, (0, 3, 14, 31), 3),
    "primes": RoutingShape(521, (0, 17), 3),
    "chunks": RoutingShape(2053, (0, 8, 16), 4),
    "many-experts": RoutingShape(67, (0, 257), 8),
}

EXPERTS = {
    "decode-1": ExpertShape(1, 2048, 512, 16, 4),
    "decode-64": ExpertShape(64, 2048, 512, 16, 4),
    "generate-32": ExpertShape(2 * 32 * 258, 2048, 512, 16, 4),
    "train": ExpertShape(8192, 2048, 512, 16, 4),
    "h100-fine": ExpertShape(8192, 2048, 1024, 16, 2),
    "h100-sonic": ExpertShape(24576, 1536, 1024, 32, 2, "swiglu"),
    "h100-liger": ExpertShape(8192, 2048, 768, 16, 8, "swiglu"),
    "laptop-1024": ExpertShape(1024, 512, 256, 16, 4),
    "decode-8": ExpertShape(8, 512, 256, 16, 4),
}
# From streaming weights (T = 64, 512) to arithmetic alone (T = 32768).
EXPERTS_GRID = {
    f"T{tokens}-I{inner}-k{top_k}": ExpertShape(tokens, 2048, inner, 16, top_k)
    for tokens in (64, 512, 8192, 32768)
    for inner in (512, 1024)
    for top_k in (2, 4)
}
EXPERTS |= EXPERTS_GRID
EXPERTS_SMALL = {
    "no-token": ExpertShape(0, 8, 16, 4, 2),
    "one-token": ExpertShape(1, 16, 8, 4, 2),
    "one-expert": ExpertShape(7, 8, 8, 1, 1, "silu"),
    "all-experts": ExpertShape(9, 24, 16, 3, 3, "swiglu"),
    "primes": ExpertShape(61, 29, 37, 7, 3, "relu2"),
    "gated": ExpertShape(33, 32, 40, 5, 2, "geglu"),
    "empty-experts": ExpertShape(5, 16, 16, 64, 2, "gelu"),
}

SEQUENCE_MIX = {
    "understand-1": MixShape((258,), 2048, 2),
    "generate-64": MixShape((258,) * 64, 2048, 1),
    "train-512px": MixShape((1026,) * 16, 2048, 2),
    "laptop": MixShape((66,) * 16, 256, 1),
    "laptop-256px": MixShape((258,) * 16, 512, 2),
}
SEQUENCE_MIX_SMALL = {
    "no-row": MixShape((), 8, 1),
    "one-row": MixShape((1,), 5, 2),
    "no-feature": MixShape((3, 4), 7, 0),
    "ragged": MixShape((5, 0, 13, 1, 31), 29, 3),
}

SAMPLING = {
    "one-face": SamplingShape(1, 256, 8192),
    "faces-32": SamplingShape(32, 256, 8192),
    "faces-32-plain": SamplingShape(32, 256, 8192, guidance=False),
    "faces-8-512px": SamplingShape(8, 1024, 8192),
    "laptop-512": SamplingShape(2, 256, 8192, hidden=512),
}
SAMPLING_SMALL = {
    "no-row": SamplingShape(0, 5, 7),
    "one-row": SamplingShape(1, 1, 2),
    "one-code": SamplingShape(3, 2, 1, guidance=False),
    "primes": SamplingShape(3, 13, 521),
}

LOSS = {
    "train-text": LossShape(4096, 2048, 58498, 8193),
    "train-codes": LossShape(8192, 2048, 58498, 8193),
    "laptop-2048": LossShape(2048, 512, 8192, 8192),
}
LOSS_SMALL = {
    "no-row": LossShape(0, 8, 11, 5),
    "one-row": LossShape(1, 8, 11, 5),
    "primes": LossShape(61, 29, 113, 47),
}

ATTENTION = {
    "generate-32": AttentionShape(64, 64, 258, 32, 64),
    "train": AttentionShape(24, 80, 258, 32, 64),
    "laptop": AttentionShape(16, 24, 66, 4, 64),
}
ATTENTION_SMALL = {
    "one-row": AttentionShape(1, 1, 1, 1, 8),
    "text-only": AttentionShape(2, 7, 0, 2, 16),
    "primes": AttentionShape(3, 11, 19, 3, 24),
}

MODELS = {
    "avatars-tiny": ModelShape(8, 6, (24, 10)),  # the batch of recipes/avatars-tiny.toml
    "random-100m": ModelShape(4, 3, (6, 2), update=False),
    "random-1.8b": ModelShape(32, 4, (24, 8), update=False),
}

BATCHES = {
    "avatars-tiny-1": BatchShape("avatars-tiny", 1),
    "avatars-tiny-32": BatchShape("avatars-tiny", 32),
    "random-100m-1": BatchShape("random-100m", 1),
    "random-100m-32": BatchShape("random-100m", 32, 4),  # a step takes seconds on a laptop
    "random-1.8b-1": BatchShape("random-1.8b", 1, 6),
    "random-1.8b-32": BatchShape("random-1.8b", 32, 6),
}

LINEAR = {
    "decode-8": LinearShape(8, 2048, 6144),
    "train": LinearShape(8192, 2048, 6144),
    "laptop": LinearShape(32 * 66, 192, 576),
}
ROTARY = {
    "generate-32": RotaryShape(2 * 32 * 258, 32, 64),
    "laptop": RotaryShape(32 * 66, 6, 32),
}

HUB_MODELS = {
    "qwen3_moe-512": HubModelShape("qwen3_moe", 4, 128),
    "qwen3_moe-decode-4": HubModelShape("qwen3_moe", 4, 8, new_tokens=16),
    "gpt_oss-512": HubModelShape("gpt_oss", 4, 128),
    "gpt_oss-decode-4": HubModelShape("gpt_oss", 4, 8, new_tokens=16),
    "qwen3_moe-30b": HubModelShape(
        "qwen3_moe", 2, 1024, hidden=2048, inner=768, experts=128, top_k=8
    ),  # 2 of 48 layers
}

# What runs unless more is asked for, by device and benchmark file. `make bench`: within three minutes on two cores.
# `make gpu`: within nine minutes, and what matters most first, for there it stops when the time is over.
SHORT = {
    "cpu": {
        "routing": ("decode-64", "train"),
        "experts": ("laptop-1024", "decode-8"),
        "sequence_mix": ("laptop", "laptop-256px"),
        "sampling": ("laptop-512",),
        "diffusion_loss": ("laptop-2048",),
        "omni_attention": ("laptop",),
        "linear": ("laptop",),
        "rotary": ("laptop",),
        "e2e": ("avatars-tiny",),
        "transformers": ("qwen3_moe-512", "qwen3_moe-decode-4"),
        "generation": ("avatars-tiny-1",),
        "answers": ("avatars-tiny-1",),
        "compile": (),  # as below
    },
    "cuda": {
        "experts": ("decode-1", *EXPERTS_GRID, "h100-liger", "h100-sonic"),
        "sampling": ("faces-32", "faces-32-plain"),
        "routing": ("decode-64", "train", "experts-128"),
        "e2e": ("random-1.8b",),
        "diffusion_loss": ("train-codes",),
        "sequence_mix": ("generate-64",),
        "omni_attention": ("generate-32", "train"),
        "rotary": ("generate-32",),
        "linear": ("decode-8", "train"),
        "transformers": ("qwen3_moe-30b",),
        "generation": ("random-1.8b-32",),
        "answers": ("random-1.8b-1",),
        "compile": (),  # compiles for longer than a short run lasts
    },
}


# On a CPU only when named, whatever else is asked for.
GPU_ONLY = {"random-1.8b", "random-1.8b-1", "random-1.8b-32", "qwen3_moe-30b", *EXPERTS_GRID}


def token_groups(shape: RoutingShape) -> list[int] | None:
    """Group of each token: contiguous runs of equal length, as packed batches have them; None for a single group."""
    if shape.groups == 1:
        return None
    edges = [shape.tokens * g // shape.groups for g in range(shape.groups + 1)]
    return [g for g, (low, high) in enumerate(pairwise(edges)) for _ in range(high - low)]
