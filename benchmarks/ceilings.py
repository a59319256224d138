"""What this machine can do at best, measured in the same session as the ops: the two ceilings of a roofline.

* **Bandwidth**: copying a buffer that no cache holds, bytes read plus bytes written. (A CPU also reads the lines it is
  about to overwrite, which is not counted; so an op that mostly reads may go beyond this ceiling, and so may one whose
  operands a cache holds.)
* **Rate of a dtype**: the best dense matrix product of torch in it. On a CPU two libraries are tried, `torch.mm` (MKL
  or oneDNN, whichever torch prefers) and oneDNN by name, since neither is the fastest everywhere.

An algorithm that moves b bytes and does f floating-point operations cannot end before
`max(b / bandwidth, f / rate)` seconds; that time over the measured one is its "% of roofline".
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch

from benchmarks.timing import cache_bytes

ROUNDS = 7
MAX_COPY_BYTES = 2**30
GPU_COPY_BYTES = 2**30
PRODUCT_SIZE = {"cpu": 1536, "cuda": 8192}  # large enough to reach the plateau, small enough to take 0.1 s in all


class Ceilings:
    """Bandwidth and product rates of `device` with the present number of threads, each measured when first asked."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.bandwidth = cache(self._bandwidth)
        self.rate = cache(self._rate)
        self.rates: dict[str, float] = {}  # what was measured so far, for the record

    def seconds(self, bytes: int | None, flops: int | None, dtype: torch.dtype | None) -> float | None:
        """The least time for that much work, or None where nothing is known about it."""
        bounds = []
        if bytes:
            bounds.append(bytes / self.bandwidth())
        if flops and dtype is not None:
            bounds.append(flops / self.rate(dtype))
        return max(bounds, default=None)

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON: bytes/s, and FLOP/s of each dtype that was asked for."""
        return {"bytes_per_second": self.bandwidth(), "flops_per_second": dict(self.rates)}

    def _bandwidth(self) -> float:
        """Bytes per second of a copy."""
        size = GPU_COPY_BYTES if self.device == "cuda" else min(4 * cache_bytes(), MAX_COPY_BYTES)
        source = torch.ones(size // 4, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / self._best(lambda: target.copy_(source))

    def _rate(self, dtype: torch.dtype) -> float:
        """FLOP per second of the best dense product."""
        n = PRODUCT_SIZE[self.device]
        a, b = (torch.randn(n, n, device=self.device).to(dtype) for _ in range(2))
        products: list[Callable[[], object]] = [lambda: torch.mm(a, b)]
        if self.device == "cpu" and torch.backends.mkldnn.is_available():
            products.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
        found = 2 * n**3 / min(self._best(product) for product in products)
        self.rates[str(dtype).removeprefix("torch.")] = found
        return found

    def _best(self, call: Callable[[], object]) -> float:
        """Least seconds of several runs: a ceiling is what the machine can do when nothing disturbs it."""
        best = float("inf")
        for _ in range(ROUNDS + 1):  # the first one warms up, and can only be slower
            start = time.perf_counter()
            call()
            if self.device == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
        return best
