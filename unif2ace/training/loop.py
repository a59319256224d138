"""The training loop of the small supporting networks (codec, encoders, judge): minutes on two cores.

The loop knows nothing about what it trains. It is given a module and a function from a batch of row indices to named
losses, and it does the rest the same way for all of them: Muon, linear warm-up then cosine to zero, gradient
clipping, a progress bar, one JSON line per report, an atomic checkpoint to restart from.

A restarted run continues as if it had never stopped. That works without saving any generator: the rows of step k and
the random numbers used in it are functions of (seed, k) alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import pickle
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from tqdm import tqdm

from unif2ace.errors import UserError
from unif2ace.files import replace_file
from unif2ace.training.muon import MuonAdamW

Settings = TypeVar("Settings", bound="FitSettings")


@dataclasses.dataclass
class FitSettings:
    """What every small training has in common.

    threads: CPU threads, 0 leaves torch's choice. log_every, evaluate_every, checkpoint_every: in steps.
    """

    steps: int = 1000
    batch_size: int = 64
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    device: str = "cpu"
    threads: int = 0
    log_every: int = 50
    evaluate_every: int = 500
    checkpoint_every: int = 250

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "evaluate_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise UserError(f"training setting {name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.learning_rate < 1:
            raise UserError(f"training setting learning_rate must lie between 0 and 1, got {self.learning_rate}")

    @classmethod
    def from_mapping(cls: type[Settings], mapping: dict) -> Settings:
        """Settings from one section of a recipe; `UserError` names the fields it does not know."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(mapping) - known):
            raise UserError(f"{cls.__name__} does not know {unknown}; it knows {sorted(known)}")
        return cls(**mapping)


def learning_rate_factor(step: int, steps: int, warmup_steps: int) -> float:
    """Linear from 0 to 1 over the warm-up, then half a cosine down to 0 at the last step."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * progress))


class RowSampler:
    """Row indices of any step, in shuffled passes over the table: a function of (seed, step), so nothing to save."""

    def __init__(self, num_rows: int, batch_size: int, seed: int) -> None:
        if num_rows < batch_size:
            raise UserError(f"training needs at least one batch of {batch_size} rows, got {num_rows}")
        self.num_rows, self.batch_size, self.seed = num_rows, batch_size, seed
        self._pass, self._order = -1, torch.empty(0, dtype=torch.long)

    def __call__(self, step: int) -> torch.Tensor:
        per_pass = self.num_rows // self.batch_size  # the remainder is dropped: a new shuffle brings it back
        which, offset = divmod(step, per_pass)
        if which != self._pass:
            self._pass, self._order = which, torch.randperm(self.num_rows, generator=seeded(self.seed, which))
        return self._order[offset * self.batch_size : (offset + 1) * self.batch_size]


def seeded(seed: int, index: int) -> torch.Generator:
    """A CPU generator for one (seed, index) pair."""
    return torch.Generator().manual_seed(seed * 1_000_003 + index)


def fit(
    name: str,
    module: nn.Module,
    losses: Callable[[torch.Tensor, torch.Generator], dict[str, torch.Tensor]],
    settings: FitSettings,
    num_rows: int,
    folder: Path,
    evaluate: Callable[[], dict[str, float]],
) -> dict[str, float]:
    """Train `module` in place; return the last evaluation.

    losses(rows [batch_size] int64, generator) gives named scalar tensors; "loss" is the one that is minimised.
    evaluate() is called in evaluation mode without gradients and gives named numbers.
    Writes `train.jsonl` (one object per report) and `checkpoint.pt` into `folder`; when that checkpoint is already
    there, continues from it. Raises `UserError` when it belongs to other settings, when the loss stops being finite, or
    when the folder cannot be written: the last checkpoint is then still whole.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    module.to(settings.device)
    optimizer = MuonAdamW(module, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    checkpoint = folder / "checkpoint.pt"
    first = _restore(checkpoint, module, optimizer, settings)
    sampler = RowSampler(num_rows, settings.batch_size, settings.seed)
    running: dict[str, float] = {}
    counted = 0
    results: dict[str, float] = {}
    started = reported = time.monotonic()
    with (
        _writing_into(folder, name),
        open(folder / "train.jsonl", "a") as log,
        tqdm(total=settings.steps, initial=first, desc=name, unit="step", mininterval=2.0, disable=None) as bar,
    ):

        def report(record: dict) -> None:
            log.write(json.dumps({"seconds": round(time.monotonic() - started, 1), **record}) + "\n")
            log.flush()

        for step in range(first, settings.steps):
            module.train()
            factor = learning_rate_factor(step, settings.steps, settings.warmup_steps)
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * factor
            values = losses(sampler(step), seeded(settings.seed + 1, step))
            optimizer.zero_grad(set_to_none=True)
            values["loss"].backward()
            nn.utils.clip_grad_norm_(module.parameters(), settings.max_grad_norm)
            optimizer.step()
            bar.update()
            for key, value in values.items():
                running[key] = running.get(key, 0.0) + float(value.detach())
            counted += 1
            done = step + 1
            if done % settings.log_every == 0 or done == settings.steps:
                means = {key: total / counted for key, total in running.items()}
                if "tokens" in means:  # rows of the batch: reported as a rate
                    means["tokens_per_s"] = means.pop("tokens") * counted / (time.monotonic() - reported)
                    bar.set_description(f"{name} {means['tokens_per_s']:.0f} tokens/s")
                running, counted, reported = {}, 0, time.monotonic()
                if not math.isfinite(means["loss"]):
                    raise UserError(f"{name}: the loss became {means['loss']} at step {done}; lower the learning rate")
                report({"step": done, "learning_rate": settings.learning_rate * factor, **means})
                bar.set_postfix(loss=f"{means['loss']:.4f}", **{k: f"{v:.3g}" for k, v in list(results.items())[:2]})
            if done % settings.evaluate_every == 0 or done == settings.steps:
                module.eval()
                with torch.no_grad():
                    results = evaluate()
                report({"step": done, **results})
            if done % settings.checkpoint_every == 0 or done == settings.steps:
                _save(checkpoint, module, optimizer, settings, done)
    if not results:  # restarted after its last step
        module.eval()
        with torch.no_grad():
            results = evaluate()
    return results


@contextlib.contextmanager
def _writing_into(folder: Path, name: str) -> Iterator[None]:
    """Make `folder`; a full or unwritable disk, now or later, becomes one sentence."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{name}: cannot write into {folder}: {reason}; expected a folder with free space") from error


def _save(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, settings: FitSettings, step: int) -> None:
    state = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    state["settings"] = json.dumps(dataclasses.asdict(settings))
    replace_file(path, lambda partial: torch.save(state, partial))


def _restore(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, settings: FitSettings) -> int:
    if not path.exists():
        return 0
    try:
        state = torch.load(path, map_location=settings.device, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: expected a training checkpoint, got a corrupt file ({reason})") from error
    before, now = json.loads(state["settings"]), json.loads(json.dumps(dataclasses.asdict(settings)))
    harmless = {"threads", "device", "log_every", "evaluate_every", "checkpoint_every"}
    changed = {key for key in now if before.get(key) != now[key]} - harmless
    if changed:
        raise UserError(f"{path} was written with other settings ({', '.join(sorted(changed))}); use a new folder")
    module.load_state_dict(state["module"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])
