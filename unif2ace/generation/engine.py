"""The batch engine: requests in, faces out, any number of them in bounded memory.

    engine = GenerationEngine(model, codec, max_batch=32)
    for face in engine.stream(Request(ids, seeds=[seed]) for ids, seed in jobs):     # text ids, one seed per image
        save(face.request.key, face.pixels)

Up to `max_batch` images are drawn at a time, each in a slot of its own. A step runs all of them in one pass, whatever
request they belong to and however far they are (denoise.py); an image that is done leaves, and the next one takes its
slot. What the images of a prompt share is computed once and kept for the prompts used last (prefix.py).

* **An image depends on its own request and seed alone**: the same bits alone, in any batch, after a restart. On CPUs by
  the back end `native`, tested over tokens and pixels. It rests on noise that is a function of (seed, position, step),
  on products that treat a row the same in any company (`ops/linear.py`, `few` of `ops.expert_mlp`), and on a codec
  that does so with images (`codec/small.py`). cuBLAS picks kernels by the number of rows, MKL's and the reference's
  expert products depend on it: there the last bit of a logit may differ between batches, and rarely a token.
* **A bad request fails alone.** What can be checked is checked when it is submitted. A step that fails is taken again
  request by request, pictures that cannot be decoded together are decoded one by one; what fails again ends with its
  reason, the others go on.
* **Memory is bounded** by `max_batch`: weights, the slots' cache, one pass. `submit` draws until there is room in the
  queue before it takes more.

One thread: `submit`, `step` and `stream` do the work in the caller's.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from unif2ace.codec import SmallCodec
from unif2ace.codec.pixels import to_uint8
from unif2ace.errors import UserError
from unif2ace.generation.denoise import run_step
from unif2ace.generation.plan import plan_step
from unif2ace.generation.prefix import Prefix, run_prefixes
from unif2ace.generation.request import Face, Job, Key, Request, accept
from unif2ace.generation.settings import check_count
from unif2ace.generation.slots import Drawing, Slots
from unif2ace.model.transformer import UniF2ace

FAILURES = (UserError, torch.OutOfMemoryError)


class GenerationEngine:
    """Draws the images of many requests, `max_batch` at a time. See the module's docstring."""

    def __init__(
        self,
        model: UniF2ace,
        codec: SmallCodec,
        max_batch: int = 32,
        *,
        max_prompt_tokens: int = 128,
        on_step: Callable[[], None] | None = None,
    ) -> None:
        """Weights must not change while the engine lives. `on_step()` is called after every step."""
        self.model, self.codec = model, codec
        self.max_batch = check_count("max_batch", max_batch)
        self.max_prompt_tokens = check_count("max_prompt_tokens", max_prompt_tokens)
        self.on_step = on_step
        self.slots = Slots(model, max_batch, max_prompt_tokens)
        self._free = list(range(max_batch))[::-1]
        self._queue: deque[Job] = deque()
        self._drawing: list[tuple[Job, int, Drawing]] = []
        self._finished: deque[Face] = deque()
        self._prefixes: OrderedDict[Key, Prefix] = OrderedDict()

    # -------------------------------------------------------------------------------------------------------- requests

    def submit(self, request: Request) -> None:
        """Take a request. A bad one becomes finished faces that hold its error; this raises nothing.

        While `max_batch` images or more wait, it draws first: a fast producer is slowed to the speed of drawing.
        """
        try:
            job = accept(request, self.model, self.max_prompt_tokens)
        except UserError as error:
            number = len(request.seeds) if isinstance(request.seeds, Sequence) else 0
            self._fail(request, range(number or 1), str(error))
            return
        if not job.steps:  # everything is known
            for index in range(job.waiting):
                self._finish([(job, index, job.codes.to(self.slots.tokens.device))])
            return
        while sum(waiting.waiting for waiting in self._queue) >= self.max_batch:
            self.step()
        self._queue.append(job)

    def finished(self) -> Iterator[Face]:
        """Faces done since the last call, in the order they were done."""
        while self._finished:
            yield self._finished.popleft()

    def stream(
        self, requests: Iterable[Request], *, progress: bool = False, total: int | None = None
    ) -> Iterator[Face]:
        """Draw all images of all requests, and yield each as soon as it is done.

        Requests are taken from the iterable as there is room, so it may be endless. `progress` shows a bar with
        images/s, out of `total` images if given.
        """
        with tqdm(total=total, unit="image", disable=not progress) as bar:
            for request in requests:
                self.submit(request)
                for face in self.finished():
                    bar.update()
                    yield face
            while self.busy:
                self.step()
                for face in self.finished():
                    bar.update()
                    yield face

    @property
    def busy(self) -> bool:
        """Is anything waiting, being drawn, or not yet picked up?"""
        return bool(self._queue or self._drawing or self._finished)

    def _fail(self, request: Request, images: Iterable[int], reason: str) -> None:
        self._finished.extend(Face(request, index, error=reason.partition("\n")[0]) for index in images)

    # --------------------------------------------------------------------------------------------------------- drawing

    @torch.no_grad()
    def step(self) -> None:
        """Fill free slots from the queue and run one denoising step for every image in a slot."""
        self._admit()
        if not self._drawing:
            return
        failed = False
        try:
            self._run_step(self._drawing)
        except FAILURES:
            failed = True
        if failed:  # not in the handler: what was raised holds the memory of the failed pass
            self._step_apart()
        going, done = [], []
        for job, index, drawing in self._drawing:
            moved = replace(drawing, done=drawing.done + 1)
            if moved.done < len(moved.steps):
                going.append((job, index, moved))
            else:
                done.append((job, index, self.slots.codes(drawing.slot)))
                self._free.append(drawing.slot)
        self._drawing = going
        self._finish(done)
        if self.on_step is not None:
            self.on_step()

    def _run_step(self, entries: Sequence[tuple[Job, int, Drawing]]) -> None:
        run_step(self.model, self.slots, plan_step(self.slots, [drawing for *_, drawing in entries]))

    def _step_apart(self) -> None:
        """Run the step for each request by itself, and drop those that fail."""
        for job in {id(job): job for job, *_ in self._drawing}.values():
            try:
                self._run_step([entry for entry in self._drawing if entry[0] is job])
            except FAILURES as error:
                self._drop(job, str(error))

    def _drop(self, job: Job, reason: str) -> None:
        """End all images of a job that are not done."""
        drawing = [index for owner, index, _ in self._drawing if owner is job]
        self._free.extend(d.slot for owner, _, d in self._drawing if owner is job)
        self._drawing = [entry for entry in self._drawing if entry[0] is not job]
        self._fail(job.request, [*drawing, *range(job.taken, len(job.request.seeds))], reason)
        job.taken = len(job.request.seeds)
        self._queue = deque(waiting for waiting in self._queue if waiting is not job)

    def _finish(self, done: list[tuple[Job, int, Tensor]]) -> None:
        """Decode the codes of finished images, all together; one by one where that fails."""
        if not done:
            return
        codes, reason = torch.stack([codes for *_, codes in done]), None
        try:
            pixels = to_uint8(self.codec.decode(codes)).cpu()
        except FAILURES as error:
            reason = str(error)
        if reason is None:
            for (job, index, _), own, face in zip(done, codes.cpu(), pixels, strict=True):
                self._finished.append(Face(job.request, index, own, face))
        elif len(done) > 1:
            for one in done:
                self._finish([one])
        else:
            ((job, index, _),) = done
            self._fail(job.request, [index], reason)

    def _admit(self) -> None:
        """Give free slots to waiting images, in order."""
        picked: list[Job] = []  # one entry per image
        for job in self._queue:
            picked += [job] * min(len(self._free) - len(picked), job.waiting)
        self._prepare(list({id(job): job for job in picked}.values()))
        for job in picked:
            if not job.waiting:  # its prompt failed
                continue
            drawing = Drawing(
                slot=self._free.pop(),
                steps=job.steps,
                cond=self._prefixes[job.cond],
                uncond=None if job.uncond is None else self._prefixes[job.uncond],
                guidance=float(job.request.guidance),
                temperature=float(job.request.temperature),
            )
            self.slots.start(drawing, job.request.seeds[job.taken], job.codes)
            self._drawing.append((job, job.taken, drawing))
            job.taken += 1
        while self._queue and not self._queue[0].waiting:
            self._queue.popleft()
        while len(self._prefixes) > 2 * self.max_batch:  # as many as images in slots can need
            self._prefixes.popitem(last=False)

    def _prepare(self, jobs: Sequence[Job]) -> None:
        """Compute the prefixes of these jobs that are not at hand, and drop the jobs for which that fails."""
        missing: dict[Key, Tensor] = {}
        for job in jobs:
            for key in job.keys:
                if key in self._prefixes:
                    self._prefixes.move_to_end(key)
                else:
                    missing[key] = job.codes
        if not missing:
            return
        try:
            self._prefixes.update(self._run_prefixes(missing))
            return
        except FAILURES:
            reasons: dict[Key, str] = {}
        for key, codes in missing.items():
            try:
                self._prefixes.update(self._run_prefixes({key: codes}))
            except FAILURES as error:
                reasons[key] = str(error)
        for job in jobs:
            for key in job.keys:
                if key in reasons and job.waiting:
                    self._drop(job, reasons[key])

    def _run_prefixes(self, missing: dict[Key, Tensor]) -> dict[Key, Prefix]:
        found = run_prefixes(self.model, [prompt for prompt, _ in missing], list(missing.values()))
        return dict(zip(missing, found, strict=True))
