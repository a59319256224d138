"""Sentences to faces, faces to answers: all parts of a saved model behind three calls.

    from unif2ace.pipeline import UniF2acePipeline
    pipe = UniF2acePipeline.from_pretrained("avatars-tiny")
    faces = pipe.generate("a smiling person with red hair", num_images_per_prompt=8, seed=7)
    pipe.answer(faces[0], ["What color is the hair?", "Does the person wear glasses?"])
    pipe.caption(faces)

    text --tokenizer--> ids --transformer, T steps--> codes --codec--> picture
    picture --codec, frozen encoders--> codes, features --transformer--> ids --tokenizer--> text

Everything a caller passes is checked before the first matrix product (`unif2ace.inputs`); how a model is found and
stored is in `unif2ace.bundle`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor

from unif2ace import inputs
from unif2ace.bundle import Parts, load_parts, resolve_folder, save_parts
from unif2ace.codec.pixels import to_float
from unif2ace.errors import UserError
from unif2ace.generation.answer_text import AnswerText, has_stop
from unif2ace.generation.decoding import stream_answers
from unif2ace.generation.draw import ENGINES, DrawingTask
from unif2ace.generation.settings import GenerationConfig, check_answering, check_count, to_signed
from unif2ace.ops import BACKENDS, _registry, use_backend

# What generating and answering run.
OPS = ("linear", "rotary", "routing", "experts", "sequence_mix", "omni_attention", "sampling")
CAPTION_REQUEST = "Describe the face."
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

Images = Image.Image | Sequence[Image.Image]
Item = TypeVar("Item")


class UniF2acePipeline:
    """A loaded model. `defaults` is its `GenerationConfig`, `image_size` the side of its pictures in pixels."""

    def __init__(self, parts: Parts, backend: str = "auto") -> None:
        """Use `from_pretrained`; `parts` are the loaded pieces, `backend` as there."""
        self.parts, self.backend = parts, backend
        self.model, self.codec, self.tokenizer = parts.model, parts.codec, parts.tokenizer
        self.defaults: GenerationConfig = parts.defaults
        self.backends()  # refuses now what would fail in the first step

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> UniF2acePipeline:
        """Load a bundled model ("avatars-tiny"), a folder written by `save_pretrained`, or a hub id "owner/name".

        Args:
            device: None takes CUDA where there is one, else the CPU.
            dtype: of the transformer; None is float32 on a CPU, bfloat16 on a GPU. Codec and encoders run in float32.
            backend: "reference", "native" or "triton" as `unif2ace.ops.use_backend` takes them, or "auto": the fastest
                one that can run each call (or whatever that has set).

        Raises:
            UserError: unknown name, missing or corrupt files, parts that do not fit together, an unusable device, dtype
                or back end.
        """
        if backend != "auto" and backend not in BACKENDS:
            raise UserError(f"backend: expected one of auto, {', '.join(BACKENDS)}, got {backend!r}")
        device = inputs.as_device(device)
        if dtype is None:
            dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        if dtype not in DTYPES:
            raise UserError(f"dtype: expected torch.float32, bfloat16, float16 or float64, got {dtype!r}")
        return cls(load_parts(resolve_folder(name), device, dtype), backend)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write every part into `folder`, which appears complete or not at all; returns it.

        Raises `UserError` where the folder holds anything but a saved pipeline, or cannot be written.
        """
        return save_parts(self.parts, Path(folder))

    @property
    def device(self) -> torch.device:
        """Where the transformer lies."""
        return self.model.head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the transformer computes in."""
        return self.model.head.weight.dtype

    @property
    def image_size(self) -> int:
        """Side of a picture in pixels."""
        return self.codec.image_size

    def backends(self) -> dict[str, str]:
        """Op -> the back end that runs it in this pipeline."""
        with self._on_backend():
            return {op: _registry.choose(op, None, self.device, self.dtype) for op in OPS}

    def _on_backend(self) -> AbstractContextManager:
        return nullcontext() if self.backend == "auto" else use_backend(self.backend)

    def each_on_backend(self, items: Iterator[Item]) -> Iterator[Item]:
        """The items, each made on this pipeline's back end; what the caller does between two of them is his own."""
        while True:
            with self._on_backend():
                item = next(items, None)
            if item is None:
                return
            yield item

    # ----------------------------------------------------------------------------------------------------- text to face

    @torch.no_grad()
    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        num_images_per_prompt: int = 1,
        steps: int | None = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        seed: int | Sequence[int] = 0,
        engine: str = "fast",
        known_image: Image.Image | None = None,
        known_mask: Image.Image | Tensor | None = None,
        batch_size: int = 32,
        on_step: Callable[[int, int], None] | None = None,
    ) -> list[Image.Image]:
        """Draw faces: `num_images_per_prompt` for the first prompt, then as many for the second, and so on.

        Args:
            prompts: one sentence or several.
            steps, guidance_scale, temperature: None takes the model's defaults (`GenerationConfig`).
            seed: an integer s gives image i the seed s + i (modulo 2^64); a list gives each image its own. An image
                depends on its prompt, its seed and these settings, not on the images drawn with it: to the last bit on
                CPUs with the native back end, else up to rounding (`unif2ace.generation.engine`).
            engine: "fast" (`GenerationEngine`), or "plain", the loop of the paper, which needs more work for the same
                codes.
            known_image, known_mask: in-painting. An RGB picture of `image_size` and which of its pixels to keep: a PIL
                mask (white = keep) or a bool array (True = keep). A token cell is kept when all its pixels are; the
                others are drawn anew. Kept pixels come back unchanged.
            batch_size: images per batch; bounds the memory.
            on_step: called as on_step(done, total) after every step of a batch.

        Returns RGB images of `image_size`, in order. Raises `UserError` for anything that does not fit.

        Cost: (steps - 1) * (1 or, with guidance, 2) passes of `num_image_tokens` + 2 rows per image, and one per
        prompt.
        """
        texts = inputs.as_texts("prompt", prompts)
        count = len(texts) * check_count("num_images_per_prompt", num_images_per_prompt)
        settings = self.defaults.override(steps=steps, guidance_scale=guidance_scale, temperature=temperature)
        seeds = inputs.as_seeds(seed, count)
        if engine not in ENGINES:
            raise UserError(f"engine: expected one of {', '.join(ENGINES)}, got {engine!r}")
        check_count("batch_size", batch_size)
        encoded = inputs.encode_texts("prompt", texts, self.tokenizer, settings.max_prompt_tokens, question=False)
        keep, known_pixels, known = self._known(known_image, known_mask)
        task = DrawingTask(encoded, seeds, settings, known, batch_size, on_step)
        with self._on_backend():
            pixels = ENGINES[engine](self.model, self.codec, task)
        if keep is not None:
            pixels = torch.where(keep[..., None], known_pixels, pixels)
        return [Image.fromarray(face.numpy()) for face in pixels]

    def _known(
        self, image: Image.Image | None, mask: Image.Image | Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, tuple[Tensor, Tensor] | None]:
        """(kept pixels [S, S] bool, pixels [S, S, 3], (codes [N], kept cells [N] bool)), or three times None."""
        if image is None and mask is None:
            return None, None, None
        if image is None or mask is None:
            given = "known_mask" if image is None else "known_image"
            raise UserError(f"in-painting: expected known_image and known_mask together, got {given} alone")
        pixels, _ = inputs.as_pixels("known_image", image, self.image_size)
        keep = inputs.as_keep_mask(mask, self.image_size)
        codes = self.codec.encode(to_float(pixels).to(self.device))
        return keep, pixels[0], (codes[0], inputs.kept_cells(keep, self.codec.grid).to(self.device))

    # ----------------------------------------------------------------------------------------------------- face to text

    def answer(
        self,
        images: Images,
        questions: str | Sequence[str],
        *,
        on_answer: Callable[[int, int], None] | None = None,
        **options: object,
    ) -> list[str]:
        """Answer questions about faces: question i about image i, or one image with many questions, or the reverse.

        Args:
            images: RGB PIL images of `image_size`. questions: English; each at most `max_prompt_tokens` tokens.
            on_answer: called as on_answer(done, total) whenever an answer is complete.
            options: those of `stream_answers`.

        An answer depends on its picture, question and seed, not on what else is asked: to the last bit of its logits on
        CPUs with the native back end in float32, else up to rounding.

        Returns one string per question. Raises `UserError` for anything that does not fit.
        """
        number, pieces = self._ask(images, questions, **options)
        answers, done = [""] * number, 0
        for index, text, ended in pieces:
            answers[index] += text
            done += ended
            if ended and on_answer is not None:
                on_answer(done, number)
        return answers

    def stream_answers(
        self, images: Images, questions: str | Sequence[str], **options: object
    ) -> Iterator[tuple[int, str]]:
        """The same answers while they grow: (index of the question, further text), those of a batch interleaved.

        Options:
            max_new_tokens: None takes the model's default. temperature: 0 takes the likeliest token; above, `top_k` and
                `top_p` narrow the choice, and answer i uses the `seed` as image i of `generate` does.
            stop: a string or several; an answer ends before the first of them.
            batch_size: questions in one batch.

        Raises `UserError` as `answer` does.
        """
        _, pieces = self._ask(images, questions, **options)
        return ((index, text) for index, text, _ in pieces if text)

    def _ask(
        self,
        images: Images,
        questions: str | Sequence[str],
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | Sequence[int] = 0,
        stop: str | Sequence[str] = (),
        batch_size: int = 64,
    ) -> tuple[int, Iterator[tuple[int, str, bool]]]:
        """Check everything; the number of answers, and their pieces: (index, further text, is that the end)."""
        pixels, which = inputs.as_pixels("image", images, self.image_size)
        texts = inputs.as_texts("question", questions)
        if len(which) != len(texts) and 1 not in (len(which), len(texts)):
            raise UserError(
                f"question: expected one question per image (or a single image or question), got {len(which)} images "
                f"and {len(texts)} questions"
            )
        number = max(len(which), len(texts))
        which = which * number if len(which) == 1 else which
        settings = self.defaults.override(max_new_tokens=max_new_tokens)
        check_answering(settings.max_new_tokens, temperature, top_k, top_p)
        seeds = [to_signed(value) for value in inputs.as_seeds(seed, number)]
        check_count("batch_size", batch_size)
        encoded = inputs.encode_texts("question", texts, self.tokenizer, settings.max_prompt_tokens, question=True)
        encoded = encoded * number if len(encoded) == 1 else encoded
        stops = inputs.as_texts("stop", stop, blank=True) if stop else []
        decoding = {
            "max_new_tokens": settings.max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "stop": (lambda ids: has_stop(self.tokenizer.decode(ids), stops)) if stops else None,
        }

        def pieces() -> Iterator[tuple[int, str, bool]]:
            codes, features = self.read_images(pixels, batch_size)
            for start in range(0, number, batch_size):
                part = slice(start, start + batch_size)
                growing = [AnswerText(self.tokenizer, stops) for _ in encoded[part]]
                batch = stream_answers(
                    self.model, codes, encoded[part], features, images=which[part], seeds=seeds[part], **decoding
                )
                for piece in self.each_on_backend(batch):
                    text = growing[piece.index].add(piece.tokens)
                    text += growing[piece.index].finish() if piece.ended else ""
                    yield start + piece.index, text, piece.ended

        return number, pieces()

    def caption(self, images: Images, **options: object) -> list[str]:
        """One sentence describing each image. `options` are those of `answer`; the defaults are greedy."""
        return self.answer(images, CAPTION_REQUEST, **options)

    @torch.no_grad()
    def read_images(self, pixels: Tensor, batch_size: int = 64) -> tuple[Tensor, dict[str, Tensor]]:
        """What the transformer sees: uint8 [n, S, S, 3] -> codes [n, N], {name: features [n, rows, width]}."""
        codes: list[Tensor] = []
        features: dict[str, list[Tensor]] = {name: [] for name in self.parts.encoders}
        with self._on_backend():
            for part in pixels.split(batch_size):
                images = to_float(part).to(self.device)
                codes.append(self.codec.encode(images))
                for name, encoder in self.parts.encoders.items():
                    features[name].append(encoder.encode(images))
        return torch.cat(codes), {name: torch.cat(rows) for name, rows in features.items()}
