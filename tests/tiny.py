"""A whole pipeline small enough for tests: random weights, real tokenizer, all parts, made in about a second."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from unif2ace.bundle import Parts
from unif2ace.codec import SmallCodec, SmallCodecConfig
from unif2ace.config import SequenceMoEConfig, TokenMoEConfig, preset
from unif2ace.data.attributes import visible
from unif2ace.data.avatars import sample_face
from unif2ace.data.language import caption, full_caption, questions
from unif2ace.data.text import TextTokenizer
from unif2ace.evaluation.judge import Judge, JudgeConfig
from unif2ace.generation.settings import GenerationConfig
from unif2ace.model.features import SmallClipEncoder, SmallFaceEncoder, TowerConfig
from unif2ace.model.transformer import UniF2ace
from unif2ace.pipeline import UniF2acePipeline

SIZE = 32
TOKENS = (SIZE // 8) ** 2


@lru_cache(maxsize=1)
def tokenizer() -> TextTokenizer:
    rng = np.random.default_rng(0)
    texts = []
    for _ in range(40):
        face = sample_face(rng)
        texts += [caption(face, rng).text, full_caption(visible(face))]
        texts += [f"USER: \n{item.question} ASSISTANT: {item.answer}" for item in questions(face, rng)]
    return TextTokenizer.train(texts, 400)


def build_parts(seed: int = 0, features: bool = True) -> Parts:
    """Random float32 weights, spread so widely that other prompts, seeds and pictures give other results."""
    torch.manual_seed(seed)
    text = tokenizer()
    tower = TowerConfig(image_size=SIZE, widths=(8, 8, 8, 8), width=8)
    encoders = {"clip": SmallClipEncoder(tower), "face": SmallFaceEncoder(tower)} if features else {}
    experts = ("copy", "copy", "clip", "face") if features else ("copy", "copy")
    config = preset(
        "avatars-tiny",
        num_layers=2,
        hidden_size=32,
        num_heads=2,
        ffn_width=48,
        rotary_dim=8,
        init_std=0.3,
        n_text=text.size,
        end_of_text=text.end_of_text,
        codebook_size=27,
        image_size=SIZE,
        num_image_tokens=TOKENS,
        token_moe=TokenMoEConfig(num_experts=4, top_k=2, expert_width=16, shared_width=16),
        sequence_moe=SequenceMoEConfig(
            understanding_experts=experts, resampler_width=8, clip_rows=4, clip_width=8, face_rows=1, face_width=8
        ),
    )
    codec = SmallCodec(SmallCodecConfig(image_size=SIZE, levels=(3, 3, 3), widths=(8, 8, 8)))
    judge = Judge(JudgeConfig(image_size=SIZE, widths=(8, 8, 8, 8), cell_width=8))
    return Parts(
        model=UniF2ace(config).eval(),
        codec=codec.eval(),
        tokenizer=text,
        encoders={name: encoder.eval() for name, encoder in encoders.items()},
        defaults=GenerationConfig(steps=4, max_prompt_tokens=120, max_new_tokens=6),
        judge=judge.eval(),
    )


@lru_cache(maxsize=1)
def tiny_pipeline() -> UniF2acePipeline:
    return UniF2acePipeline(build_parts())
