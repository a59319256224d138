"""Measure launch configurations of the experts' grouped products on the GPU at hand, and write the launchers' table.

`unif2ace bench experts --tune [--shapes train,decode-64]` calls `main`. For each shape it takes the two products of
`expert_mlp`, times every candidate of `kernels/experts_config.py` against the rules' own in one interleaved run, and
keeps the fastest in `kernels/tuning/experts-sm_<chip>.json`, where launchers look first. Entries of other shapes stay.
A candidate that asks for more than the chip has, or whose result differs, is left out. About a minute per shape, most
of it for compiling.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from benchmarks import machine, shapes, timing
from unif2ace.files import write_text
from unif2ace.kernels import experts, experts_config
from unif2ace.kernels._device import multiprocessors
from unif2ace.kernels.experts_config import Config, Product
from unif2ace.ops import route

GAIN = 0.98  # of the rules' time: a candidate within 2 % of it has no claim to be written down


def products_of(shape: shapes.ExpertShape, dtype: torch.dtype) -> list[Product]:
    """The products of `expert_mlp`: up with its gather, and down."""
    rows, parts = shape.tokens * shape.top_k, shape.up_rows // shape.inner
    up = Product(dtype, rows, shape.experts, shape.inner, shape.hidden, parts, gather=True)
    return [up, Product(dtype, rows, shape.experts, shape.hidden, shape.inner, 1, gather=False)]


class Call:
    """A product with random operands and balanced loads; called with a configuration, it runs."""

    def __init__(self, product: Product, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.plan = route(torch.randn(product.rows, product.num_experts, generator=generator), 1, backend="reference")
        self.offsets, self.order = self.plan.offsets.to(device), self.plan.order.to(device)
        self.product, self.activation = product, "swiglu" if product.parts == 2 else "gelu_tanh"

        def gaussian(*size: int) -> Tensor:
            return torch.randn(size, generator=generator).to(device, product.dtype)

        self.a = gaussian(product.rows, product.depth)
        self.b = gaussian(product.num_experts, product.parts * product.width, product.depth) / product.depth**0.5
        self.out = self.a.new_empty(product.rows, product.width)

    def __call__(self, config: Config) -> Tensor:
        index, activation = (self.order, self.activation) if self.product.gather else (None, "none")
        experts.grouped_product(
            self.a, self.b, None, self.offsets, index, self.out, activation=activation, config=config
        )
        return self.out


def fastest(
    product: Product, configs: Sequence[Config], device: torch.device, clock: timing.Clock
) -> dict[str, object]:
    """The table's entry for one product; `configs` begins with that of the rules."""
    call = Call(product, device)
    expected, runs = call(configs[0]).clone(), {}
    for number, config in enumerate(configs):
        call.out.fill_(torch.nan)
        try:
            torch.testing.assert_close(call(config), expected)
        except (OutOfResources, AssertionError) as error:
            print(f"  left out {tuple(config)}: {str(error).strip().splitlines()[0]}", flush=True)
        else:
            runs[str(number)] = lambda config=config: call(config)
    seconds = {name: found.median for name, found in timing.interleave(runs, clock).items()}
    best = min(seconds, key=seconds.get)
    best = best if seconds[best] < GAIN * seconds["0"] else "0"
    return {
        "product": product.key._asdict(),
        "config": configs[int(best)]._asdict(),
        "microseconds": round(1e6 * seconds[best], 2),
        "rules_microseconds": round(1e6 * seconds["0"], 2),
    }


def merge(path: Path, entries: Iterable[dict[str, object]], facts: dict[str, object]) -> None:
    """Write the table: the entries, and those of before about other products."""
    old = json.loads(path.read_text())["entries"] if path.is_file() else []
    both = {
        json.dumps(entry["product"]): entry for entry in [*old, *({**entry, "measured": facts} for entry in entries)]
    }
    path.parent.mkdir(exist_ok=True)
    write_text(path, json.dumps({"entries": list(both.values())}, indent=1))
    experts_config.forget_tables()


def main(names: Sequence[str]) -> Path:
    """Tune for shapes of `benchmarks/shapes.py` in bfloat16; returns the table's path."""
    device = torch.device("cuda", torch.cuda.current_device())
    chip, clock, entries = experts_config.chip_of(device), timing.clock_for("cuda"), []
    wanted = [p for name in names for p in products_of(shapes.EXPERTS[name], torch.bfloat16)]
    for product in {product.key: product for product in wanted}.values():
        print(" ".join(f"{name}={value}" for name, value in product.key._asdict().items()), flush=True)
        entries.append(
            fastest(product, experts_config.candidates(product, chip, multiprocessors(device)), device, clock)
        )
        print(f"  {entries[-1]['rules_microseconds']} -> {entries[-1]['microseconds']} us", flush=True)
    path = experts_config.path_of_table(chip)
    facts = machine.facts("cuda")
    merge(path, entries, {name: facts[name] for name in ("date", "commit", "device", "torch")})
    return path
