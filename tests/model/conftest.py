"""A small model in float64 with every part switched on, and batches for it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from unif2ace.config import SequenceMoEConfig, TokenMoEConfig, UniF2aceConfig, preset
from unif2ace.model.transformer import UniF2ace
from unif2ace.vocabulary import Vocabulary, pack_generation, pack_understanding


def small_config(**overrides: object) -> UniF2aceConfig:
    fields = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_heads": 2,
        "ffn_width": 48,
        "rotary_dim": 8,
        "init_std": 0.3,  # large enough that every part moves the result
        "n_text": 40,
        "end_of_text": 3,
        "codebook_size": 16,
        "num_image_tokens": 9,
        "token_moe": TokenMoEConfig(num_experts=3, top_k=2, expert_width=12, shared_width=20),
        "sequence_moe": SequenceMoEConfig(
            resampler_width=8, clip_rows=4, clip_width=6, face_rows=1, face_width=10, scale_init=0.7
        ),
    }
    return preset("avatars-tiny", **{**fields, **overrides})


def build(config: UniF2aceConfig, seed: int = 0) -> UniF2ace:
    """A model whose biases, norms and scalars are random too, in float64."""
    torch.manual_seed(seed)
    model = UniF2ace(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 or parameter.shape[-1:] == (2,):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="session")
def model() -> UniF2ace:
    return build(small_config())


@pytest.fixture(scope="session")
def build_model() -> Callable[..., UniF2ace]:
    """`build_model(**config_overrides)`."""
    return lambda **overrides: build(small_config(**overrides))


@pytest.fixture
def make() -> Callable[..., SimpleNamespace]:
    """`make(task, lengths, seed)`: texts, codes, features, mask ratios and the packed batch of one task."""

    def build_batch(task: str, lengths: list[int], seed: int = 0) -> SimpleNamespace:
        config = small_config()
        generator = torch.Generator().manual_seed(seed)

        def random_text(length: int) -> list[int]:
            return torch.randint(config.n_text, (length,), generator=generator).tolist()

        texts = [random_text(length) for length in lengths]
        top = config.codebook_size + (task == "generation")
        codes = torch.randint(top, (len(lengths), config.num_image_tokens), generator=generator)
        vocabulary = Vocabulary.of(config)
        made = SimpleNamespace(texts=texts, codes=codes, vocabulary=vocabulary, arguments={})
        if task == "generation":
            made.batch = pack_generation(vocabulary, texts, codes)
            made.arguments["mask_ratio"] = torch.rand(len(lengths), generator=generator, dtype=torch.float64)
        else:
            made.batch = pack_understanding(vocabulary, codes, texts)
            made.arguments["features"] = {
                name: torch.randn(len(lengths), *shape, generator=generator, dtype=torch.float64)
                for name, shape in {"clip": (4, 6), "face": (1, 10)}.items()
            }
        return made

    return build_batch
