"""The UniF2ace transformer: embedding, L blocks (block.py), final LayerNorm, untied head.

The model maps packed rows to hidden rows [T, H]. The head is *not* applied here: losses and samplers take the hidden
rows they need with `model.head.weight` and `model.head.bias` and read only the columns they need, so logits over the
whole vocabulary are never stored. Forward cost: about 2 * active parameters (without embedding) FLOPs per row.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from unif2ace.config import UniF2aceConfig
from unif2ace.errors import UserError
from unif2ace.layout import Layout, SequenceLayout, rotary_angles
from unif2ace.model import weights
from unif2ace.model.attention import KVCache
from unif2ace.model.block import Block, Features, Memory, Tokenwise
from unif2ace.model.sequence_moe import MaskRatioEmbedding
from unif2ace.ops import RoutingPlan
from unif2ace.vocabulary import PackedBatch, Vocabulary


class ModelOutput(NamedTuple):
    """Hidden rows [T, H] after the final LayerNorm, and the routing plans of each layer (empty lists without MoE).

    `plans` are over tokens, `sequence_plans` over images (understanding first; empty when the batch has no image rows).
    """

    hidden: Tensor
    plans: list[RoutingPlan]
    sequence_plans: list[RoutingPlan]


class UniF2ace(nn.Module):
    """One transformer that understands and generates faces. `vocabulary` tells its ids, `head` is `nn.Linear(H, V)`."""

    def __init__(self, config: UniF2aceConfig) -> None:
        super().__init__()
        self.config = config
        self.vocabulary = Vocabulary.of(config)
        self.embedding = nn.Embedding(self.vocabulary.size, config.hidden_size)
        rows = (config.image_rows, config.hidden_size)
        self.image_positions = nn.Parameter(torch.empty(rows)) if config.image_positions else None
        moe = config.sequence_moe
        noisy = moe is not None and "noise" in moe.generation_experts
        self.mask_ratio_embedding = MaskRatioEmbedding(moe.resampler_width) if noisy else None
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.head = nn.Linear(config.hidden_size, self.vocabulary.size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise for training from scratch, from torch's global generator.

        Matrices normal(0, init_std); those that write into the residual stream are divided by sqrt(2 L), so that its
        variance does not grow with depth (GPT-2). LayerNorms are the identity, biases and mix scalars zero.
        """
        std = self.config.init_std
        residual = (".attention.out.weight", ".down.weight", ".down_proj")
        for name, parameter in self.named_parameters():
            if name.endswith(".sequence_moe.scale"):
                nn.init.constant_(parameter, self.config.sequence_moe.scale_init)
            elif name.endswith((".bias", "_bias", ".mix")):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 1:
                nn.init.ones_(parameter)
            elif name.startswith("layers.") and name.endswith(residual):
                nn.init.normal_(parameter, std=std / (2 * self.config.num_layers) ** 0.5)
            else:
                nn.init.normal_(parameter, std=std)

    def new_cache(self, batch: int, max_length: int) -> KVCache:
        """An empty cache for `batch` sequences of up to `max_length` rows, in the model's dtype and on its device."""
        config, weight = self.config, self.head.weight
        return KVCache(
            config.num_layers, batch, max_length, config.num_heads, config.head_dim, weight.dtype, weight.device
        )

    def _checked_features(self, features: Features | None, images: int) -> Features:
        """The features that understanding this many images needs."""
        checked = {}
        for name in self.config.sequence_moe.feature_names("understanding"):
            rows, width = self.config.sequence_moe.feature_shape(name)
            if features is None or name not in features:
                raise UserError(
                    f"UniF2ace: understanding an image needs the feature {name!r} [{images}, {rows}, {width}], got "
                    f"{sorted(features) if features else 'none'}"
                )
            feature = features[name]
            if feature.shape != (images, rows, width):
                raise UserError(
                    f"UniF2ace: feature {name!r} must be [{images}, {rows}, {width}], got {list(feature.shape)}"
                )
            checked[name] = feature.to(self.head.weight.dtype)
        return checked

    def _memories(
        self, layout: Layout, mask_ratio: Tensor | None, ratio_of_image: Tensor | None, features: Features | None
    ) -> list[Memory]:
        """Per layer: S(F) of every feature that the images of this batch need."""
        if self.config.sequence_moe is None:
            return [Memory({}) for _ in self.layers]
        understood, generated = layout.num_images
        memory = self._checked_features(features, understood) if understood else {}
        noise_starts = None
        if generated and self.mask_ratio_embedding is not None:
            _check_ratios(generated, mask_ratio, ratio_of_image)
            memory["noise"] = self.mask_ratio_embedding(mask_ratio)
            if ratio_of_image is not None:
                noise_starts = (ratio_of_image * layout.image_length).int()
        return [Memory(layer.sequence_moe.resample(memory), noise_starts) for layer in self.layers]

    def forward(
        self,
        batch: PackedBatch,
        *,
        mask_ratio: Tensor | None = None,
        ratio_of_image: Tensor | None = None,
        features: Features | None = None,
        cache: KVCache | None = None,
        rows: Tensor | None = None,
    ) -> ModelOutput:
        """Hidden rows of a packed batch.

        Args:
            batch: T rows of any mixture of sequences of both tasks.
            mask_ratio: [images of generation] float, n / N masked, in sequence order; with `ratio_of_image` [D].
            ratio_of_image: [images of generation] integer in 0 .. D - 1, which of the D mask ratios an image has. What
                follows from the ratio alone is then computed D times.
            features: name ("clip", "face") -> [images of understanding, rows, width], in sequence order.
            cache: keys and values of earlier rows; read and extended in place (inference only).
            rows: [R] int64, the rows of the batch whose hidden state is wanted, in any order; None is all.

        Raises:
            UserError: wrong number of image tokens; missing or misshapen features or mask ratios; cached sequences
                without a cache; a cache that does not fit, or used while gradients are recorded.
        """
        self._check(batch.layout, cache)
        memories = self._memories(batch.layout, mask_ratio, ratio_of_image, features)
        return self._run_layers(self.start(batch), batch.layout, memories, cache, rows)

    def start(self, batch: PackedBatch) -> Tokenwise:
        """The token-wise part of the first layer: `resume` from it gives what `forward` gives.

        It depends on each row's token, place in its image and position alone, so whoever keeps it computes it again
        only where a token has changed (`start_image_rows`).
        """
        x, layout, config = self.embedding(batch.token_ids), batch.layout, self.config
        if self.image_positions is not None and layout.image_length:
            x = x.index_add(0, layout.image_rows, self.image_positions.repeat(sum(layout.num_images), 1))
        rotary = layout.rotary(config.rotary_dim, config.rotary_theta, x.dtype)
        return self.layers[0].tokenwise(x, layout, rotary)

    def start_image_rows(self, token_ids: Tensor, image_rows: Tensor, positions: Tensor) -> Tokenwise:
        """`start` for a few rows of any images being generated.

        Args: all [R] int64; `image_rows` in 0 .. N + 1, soi to eoi, `positions` as `Layout.positions` counts them.
        """
        config = self.config
        x = self.embedding(token_ids)
        if self.image_positions is not None:
            x = x + self.image_positions.index_select(0, image_rows)
        rotary = rotary_angles(positions, config.rotary_dim, config.rotary_theta, x.dtype)
        # As text that goes on, the kind of rows that come in small numbers: which way experts multiply depends on it.
        layout = Layout([SequenceLayout("generation", len(x), 0, cached=1)], x.device)
        return self.layers[0].tokenwise(x, layout, rotary)

    def resume(
        self,
        first: Tokenwise,
        layout: Layout,
        *,
        cache: KVCache,
        mask_ratio: Tensor | None = None,
        ratio_of_image: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> ModelOutput:
        """`forward` of generated images from `start` on; arguments and errors as there."""
        self._check(layout, cache)
        memories = self._memories(layout, mask_ratio, ratio_of_image, None)
        return self._run_layers(first, layout, memories, cache, rows)

    def _check(self, layout: Layout, cache: KVCache | None) -> None:
        if layout.image_length not in (0, self.config.image_rows):
            raise UserError(
                f"UniF2ace: images must have {self.config.num_image_tokens} tokens, got {layout.image_length - 2}"
            )
        if cache is None and any(sequence.cached for sequence in layout.sequences):
            raise UserError("UniF2ace: the batch continues cached sequences, expected a cache, got none")
        if cache is not None:
            if torch.is_grad_enabled():
                raise UserError("UniF2ace: a cache is filled in place, expected torch.no_grad(), got gradients enabled")
            cache.check(layout)

    def _run_layers(
        self, first: Tokenwise, layout: Layout, memories: list[Memory], cache: KVCache | None, rows: Tensor | None
    ) -> ModelOutput:
        x, plans, sequence_plans = first.x, [], []
        rotary = layout.rotary(self.config.rotary_dim, self.config.rotary_theta, x.dtype)
        for index, (layer, memory) in enumerate(zip(self.layers, memories, strict=True)):
            own = layer.tokenwise(x, layout, rotary) if index else first
            x, plan, sequence_plan = layer.mix(own, layout, cache, index, memory)
            plans.extend([] if plan is None else [plan])
            sequence_plans.extend([] if sequence_plan is None else [sequence_plan])
        if cache is not None:
            cache.advance(layout)
        return ModelOutput(self.final_norm(x if rows is None else x.index_select(0, rows)), plans, sequence_plans)

    def compile_layers(self) -> None:
        """Let `torch.compile` fuse what lies between the ops of each layer; the ops themselves stay as they are.

        Optional, for a model about to run: it takes some seconds per shape of a batch, results differ by roundings, and
        copies of the model would run the layers of this one. `benchmarks/bench_compile.py` tells whether it pays.
        """
        for layer in self.layers:
            layer.tokenwise, layer.mix = torch.compile(layer.tokenwise), torch.compile(layer.mix)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write `config.json` and `model.safetensors` (optionally stored as `dtype`), each complete or not at all."""
        weights.save(Path(folder), self.config, self.state_dict(), dtype)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> UniF2ace:
        """Read what `save_pretrained` wrote, in evaluation mode; `dtype` None keeps the stored one.

        Raises `UserError` for a missing, truncated or mismatching file.
        """
        config, state = weights.load(Path(folder), device)
        with torch.device("meta"):
            model = cls(config)
        weights.check(Path(folder), {name: tensor.shape for name, tensor in model.state_dict().items()}, state)
        model.load_state_dict(state, assign=True)
        return model.to(dtype=dtype or state["head.weight"].dtype).eval()


def _check_ratios(images: int, mask_ratio: Tensor | None, ratio_of_image: Tensor | None) -> None:
    name, per_image = "mask_ratio", mask_ratio
    if ratio_of_image is not None and mask_ratio is not None and mask_ratio.dim() == 1:
        name, per_image = "ratio_of_image", ratio_of_image
    if per_image is None or per_image.shape != (images,):
        got = "none" if per_image is None else list(per_image.shape)
        raise UserError(f"UniF2ace: {name} must be [{images}], one per generated image, got {got}")
