"""A recipe: everything that turns nothing into a usable model, in one TOML file and one command.

Stages, in order: draw the dataset, learn the tokenizer, train the codec, the two small frozen encoders and the judge,
turn the faces into codes and features, train the transformer, train it on with another mixture (`refine`, where the
recipe has that section), export one folder that `UniF2acePipeline.from_pretrained` reads. Each stage leaves a file when
it is done and is skipped when that file exists; an interrupted stage continues from its checkpoint.

A recipe may say `extends = "other.toml"` and give only the fields that differ (`refine = false` empties a section).
With `reuse`, stages before `train` that are complete in another run's folder are read from there: an ablation trains
one transformer, not six networks.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from unif2ace.codec import SmallCodec
from unif2ace.codec.pixels import to_float
from unif2ace.config import preset
from unif2ace.data.avatars import build_dataset
from unif2ace.data.language import full_caption
from unif2ace.data.loader import FaceTable
from unif2ace.data.text import QUESTION_TEMPLATE, TextTokenizer
from unif2ace.errors import UserError
from unif2ace.files import replace_file, write_text
from unif2ace.generation.settings import GenerationConfig
from unif2ace.model.features import SmallClipEncoder, SmallFaceEncoder
from unif2ace.model.transformer import UniF2ace
from unif2ace.training.batches import TokenizedFaces
from unif2ace.training.codec import CodecTraining, train_codec
from unif2ace.training.encoders import ClipTraining, FaceTraining, train_clip, train_face
from unif2ace.training.judge import JudgeTraining, train_judge
from unif2ace.training.model import ModelTraining, train_model

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SECTIONS = ("data", "tokenizer", "codec", "clip", "face", "judge", "model", "train", "refine")
STAGES = ("data", "tokenizer", "codec", "clip", "face", "judge", "tokens", "train", "refine", "export")


def read_recipe(path: Path) -> dict[str, dict]:
    """The sections of a recipe over those of the one it `extends`; `UserError` for bad TOML or unknown sections."""
    try:
        content = tomllib.loads(path.read_text())
    except OSError as error:
        raise UserError(f"recipe {path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path}: expected TOML, got something else ({error})") from error
    base = content.pop("extends", None)
    unknown = sorted(set(content) - set(SECTIONS))
    if unknown:
        raise UserError(f"recipe {path}: unknown sections {', '.join(unknown)}; expected some of {', '.join(SECTIONS)}")
    sections = read_recipe(path.parent / base) if base is not None else {}
    for name, fields in content.items():
        sections[name] = {**sections.get(name, {}), **fields} if fields is not False else {}
    return sections


class Recipe:
    """The stages of one recipe file working in one folder."""

    def __init__(self, path: Path, out: Path, reuse: Path | None = None) -> None:
        self.sections = read_recipe(path)
        self.name, self.out, self.reuse = path.stem, out, reuse
        self._tables: dict[str, FaceTable] = {}

    def section(self, name: str) -> dict:
        return dict(self.sections.get(name, {}))

    def folder(self, stage: str) -> Path:
        if (
            self.reuse is not None
            and stage not in ("train", "refine", "export")
            and self._complete(self.reuse / stage, stage)
        ):
            return self.reuse / stage
        return self.out / stage

    def done(self, stage: str) -> bool:
        # Drawing finds out for itself which files are missing, and an export is quick: both always run.
        return stage not in ("data", "export") and self._complete(self.folder(stage), stage)

    @staticmethod
    def _complete(folder: Path, stage: str) -> bool:
        return (folder / _MARK[stage]).exists()

    def table(self, split: str) -> FaceTable:
        if split not in self._tables:
            self._tables[split] = FaceTable.open(self.folder("data"), split)
        return self._tables[split]

    def tokenizer(self) -> TextTokenizer:
        return TextTokenizer.from_pretrained(self.folder("tokenizer"))

    # ---------------------------------------------------------------------------------------------------------- stages

    def run_data(self) -> None:
        build_dataset(self.folder("data"), **self.section("data"))

    def run_tokenizer(self) -> None:
        table = self.table("train")
        texts = [caption.text for captions in table.captions for caption in captions]
        texts += [full_caption(seen) for seen in table.attributes]
        texts += [
            f"{QUESTION_TEMPLATE.format(question=pair.question)} {pair.answer}"
            for pairs in table.questions
            for pair in pairs
        ]
        self.folder("tokenizer").mkdir(parents=True, exist_ok=True)
        TextTokenizer.train(texts, **self.section("tokenizer")).save_pretrained(self.folder("tokenizer"))

    def run_codec(self) -> None:
        settings = CodecTraining.from_mapping(self.section("codec"))
        train_codec(settings, self.table("train").images, self.table("val").images, self.folder("codec"))

    def run_clip(self) -> None:
        settings = ClipTraining.from_mapping(self.section("clip"))
        train_clip(settings, self.table("train"), self.table("val"), self.tokenizer(), self.folder("clip"))

    def run_face(self) -> None:
        settings = FaceTraining.from_mapping(self.section("face"))
        train_face(settings, self.table("train"), self.table("val"), self.folder("face"))

    def run_judge(self) -> None:
        settings = JudgeTraining.from_mapping(self.section("judge"))
        train_judge(settings, self.table("train"), self.table("val"), self.folder("judge"))

    def run_tokens(self) -> None:
        """Codes and features of both splits, so that training never runs the frozen networks."""
        codec = SmallCodec.from_pretrained(self.folder("codec"))
        encoders = [
            SmallClipEncoder.from_pretrained(self.folder("clip")),
            SmallFaceEncoder.from_pretrained(self.folder("face")),
        ]
        for split in ("train", "val"):
            parts: dict[str, list[torch.Tensor]] = {"codes": []} | {encoder.name: [] for encoder in encoders}
            for images in self.table(split).images.split(256):
                pixels = to_float(images)
                with torch.no_grad():
                    parts["codes"].append(codec.encode(pixels))
                    for encoder in encoders:
                        parts[encoder.name].append(encoder.encode(pixels))
            joined = {name: torch.cat(values) for name, values in parts.items()}
            replace_file(
                self.folder("tokens") / f"{split}.pt", lambda partial, joined=joined: torch.save(joined, partial)
            )

    def tokenized(self, split: str) -> TokenizedFaces:
        features = torch.load(self.folder("tokens") / f"{split}.pt", weights_only=True)
        return TokenizedFaces(self.table(split), features.pop("codes"), features)

    def run_train(self) -> None:
        # TOML has no null: `token_moe = false` stands for a model without that level.
        fields = {
            name: None if value is False and name.endswith("_moe") else value
            for name, value in self.section("model").items()
        }
        tokenizer, codec = self.tokenizer(), SmallCodec.from_pretrained(self.folder("codec"))
        derived = {"n_text": tokenizer.size, "end_of_text": tokenizer.end_of_text, "codebook_size": codec.codebook_size}
        config = preset(fields.pop("preset"), **{**derived, **fields})
        torch.manual_seed(self.section("train").get("seed", 0))
        self._train("train", UniF2ace(config))

    def run_refine(self) -> None:
        """Train on from the weights of `train`, with a fresh optimizer; nothing to do without a section `[refine]`."""
        if self.section("refine"):
            self._train("refine", UniF2ace.from_pretrained(self.folder("train"), dtype=torch.float32))

    def _train(self, stage: str, model: UniF2ace) -> None:
        settings = ModelTraining.from_mapping(self.section(stage))
        tokenizer, codec = self.tokenizer(), SmallCodec.from_pretrained(self.folder("codec"))
        train, val, folder = self.tokenized("train"), self.tokenized("val"), self.folder(stage)
        started = time.time()
        scores = train_model(settings, model, tokenizer, codec, train, val, folder)
        model.save_pretrained(folder, dtype=torch.bfloat16)
        facts = {
            "name": self.name,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} thread(s)",
            "torch": torch.__version__,
        }
        facts |= {"seconds": round(time.time() - started), "settings": dataclasses.asdict(settings), "scores": scores}
        write_text(folder / "facts.json", json.dumps(facts, indent=2) + "\n")

    def run_export(self) -> None:
        """One folder with every part; written beside and renamed."""
        partial = self.out / "export.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        trained = ["train", "refine"] if self.section("refine") else ["train"]
        final = trained[-1]
        sources = {
            final: ("model.safetensors", "config.json"),
            "tokenizer": ("tokenizer.json",),
            "codec": ("codec.safetensors", "codec.json"),
            "clip": ("clip.safetensors", "clip.json"),
            "face": ("face.safetensors", "face.json"),
            "judge": ("judge.safetensors", "judge.json"),
        }
        for stage, names in sources.items():
            for name in names:
                shutil.copy(self.folder(stage) / name, partial / name)
        (partial / "generation_config.json").write_text(
            json.dumps(dataclasses.asdict(GenerationConfig()), indent=2) + "\n"
        )
        facts = [json.loads((self.folder(stage) / "facts.json").read_text()) for stage in trained]
        (partial / "README.md").write_text(_card(facts))
        shutil.rmtree(self.folder("export"), ignore_errors=True)
        partial.rename(self.folder("export"))


def _card(stages: list[dict]) -> str:
    """A model card from the facts of each training of the transformer, in order."""
    last = stages[-1]
    minutes = " + ".join(f"{facts['seconds'] / 60:.0f}" for facts in stages)
    scores = "\n".join(f"| {name} | {value:.4g} |" for name, value in last["scores"].items())
    return (
        f"# {last['name']}\n\n"
        f"Trained by the recipe of this name with torch {last['torch']} on {last['machine']}; "
        f"the transformer alone took {minutes} minutes.\n\n"
        f"| held-out | value |\n|---|---|\n{scores}\n"
    )


# What each stage leaves behind when it is complete.
_MARK = {
    "data": "dataset.json",
    "tokenizer": "tokenizer.json",
    "codec": "codec.json",
    "clip": "clip.json",
    "face": "face.json",
    "judge": "judge.json",
    "tokens": "val.pt",
    "train": "facts.json",
    "refine": "facts.json",
    "export": "README.md",
}


def run_recipe(
    path: str | Path,
    out: str | Path,
    stages: Sequence[str] | None = None,
    reuse: str | Path | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Run `stages` (default: all) of the recipe at `path` inside the folder `out`; returns the exported folder.

    Raises `UserError` for an unreadable recipe, an unknown stage or section, and whatever a stage refuses.
    """
    out = Path(out)
    unknown = sorted(set(stages or ()) - set(STAGES))
    if unknown:
        raise UserError(f"stages: expected some of {', '.join(STAGES)}, got {', '.join(unknown)}")
    recipe = Recipe(Path(path), out, None if reuse is None else Path(reuse))
    for stage in stages or STAGES:
        if recipe.done(stage):
            say(f"{stage}: done before ({recipe.folder(stage)})")
            continue
        started = time.time()
        getattr(recipe, f"run_{stage}")()
        say(f"{stage}: done in {time.time() - started:.0f} s")
    return recipe.folder("export")
