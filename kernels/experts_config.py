"""How the grouped products of `experts` are launched: tile sizes and pipelines, by rules and by measured tables.

`choose` looks a product up in the table of the chip, `tuning/experts-sm_90.json` for Hopper, and where that does not
know it follows the rules below. Nothing is tuned while a program runs; `unif2ace bench experts --tune` measures
`candidates` on the GPU at hand and writes the table.

The rules (16-bit operands; r = rows per expert on average, which the host knows, as it does not know the offsets):

* r > 32: of the shapes of `BLOCKS` the one that `_cycles` expects to be done first. Large blocks load less: per step of
  64, a block of 128 x 256 reads 48 KiB from L2 for 1024 cycles of Hopper's tensor cores, one of 64 x 128 reads 24 KiB
  for 256 cycles. But programs work in rounds, one block each, and the last round takes as long as a full one, so that
  few blocks should be small ones; `split` shortens the last round of large ones. 128 x 256 is as large as accumulators
  of two warpgroups can be (128 registers per thread); four stages of it fill the 227 KiB of shared memory.
* r <= 32: reading the matrices is all there is. `swap`, 64 (gated 2 x 64) rows of the matrix times 16 or 32 tokens. In
  flight per multiprocessor are two programs times three stages of 16 KiB; 4.3 TB/s times a latency of 1 us over 132
  multiprocessors asks for 32 KiB. One token has fewer blocks than that (32 in the preset's up projection), so each has
  seven stages in flight, where there is shared memory for them.
* float32 runs on the ordinary arithmetic units: 64 x 64.
* Under the interpreter one small tile for everything: programs are slow there, not rows.

Backward: `row_gradients` chooses by the same count of cycles, for two products that share BLOCK_M because one stores by
tile what the other reads; few rows add blocks of 64 x 64, as many programs as it takes to stream the matrices. The
epilogue works on 32 columns at a time: with 64 the compiler spills registers, and what is stored per piece must not
change with the load. `matrix_gradient` sums over the rows in blocks whose number does not depend on the load: the
largest. A row is found by an index that has to arrive first, for which Triton takes stages of its own: of five there
remain three buffers, of 48 KiB, on A100 of seven three of 16 KiB.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from unif2ace.kernels._device import INTERPRETED, capability, multiprocessors
from unif2ace.kernels.experts_schedule import max_tiles

FOLDER = Path(__file__).parent / "tuning"


class Config(NamedTuple):
    """One way to launch `grouped_product_kernel`, which says what the last four mean; `programs` per multiprocessor."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    programs: int = 1
    piece: int = 32
    group_m: int = 8
    swap: bool = False
    flatten: bool = False
    split: bool = False


class Key(NamedTuple):
    """Under what a table files a configuration; loads are rounded up to powers of two, so that close ones share it."""

    bits: int
    gather: bool
    rows_per_expert: int
    parts: int
    width: int
    depth: int


class Product(NamedTuple):
    """What a configuration is chosen for: `rows` by `parts` matrices of `width` x `depth` for each expert."""

    dtype: torch.dtype
    rows: int
    num_experts: int
    width: int
    depth: int
    parts: int
    gather: bool

    @property
    def key(self) -> Key:
        load = triton.next_power_of_2(max(1, -(-self.rows // self.num_experts)))
        return Key(8 * self.dtype.itemsize, self.gather, load, self.parts, self.width, self.depth)


# Block shapes of a chip, largest first; `block_n` counts gate and up.
BLOCKS = {
    80: (Config(128, 128, 32, warps=8, stages=4, programs=2), Config(64, 128, 32, warps=4, stages=4, programs=2)),
    90: (Config(128, 256, 64, warps=8, stages=4, split=True), Config(64, 128, 64, warps=4, stages=4, programs=2)),
}
# Of one multiprocessor: multiply-adds of 16-bit numbers per cycle, by the data sheets, and bytes per cycle from L2,
# three quarters of the 64 that its port is wide.
MULTIPLY_ADDS = {80: 1024, 90: 2048}
L2_BYTES = 48


def choose(product: Product, device: torch.device) -> Config:
    """The table's configuration, or else that of the rules."""
    return _choose(product, chip_of(device), multiprocessors(device))


@lru_cache(maxsize=4096)  # in decoding the choice would take the host as long as a launch
def _choose(product: Product, chip: int, multiprocessors: int) -> Config:
    return table(path_of_table(chip)).get(product.key) or rules(product, chip, multiprocessors)


def chip_of(device: torch.device) -> int:
    """The chip whose rules and table hold, a key of `BLOCKS`: Hopper's for data-centre Blackwell (10.x) too, A100's for
    all others, also for 12.x, which has 99 KiB of shared memory and no wgmma."""
    return 90 if 90 <= capability(device) < 120 else 80


def rules(product: Product, chip: int, multiprocessors: int) -> Config:
    """See the module docstring."""
    rows, split = product.key.rows_per_expert, product.parts
    if INTERPRETED:
        return Config(64, 64, 64, warps=4, stages=1)
    if product.dtype == torch.float32:
        return Config(64, 64 // split, 16, warps=4, stages=2, programs=2)
    if rows <= 32:
        config = Config(16 if rows <= 8 else 32, 64, 128 // split, warps=4, stages=4, programs=2, swap=True)
        tiles = max_tiles(product.rows, product.num_experts, config.block_m)
        few = tiles * triton.cdiv(product.width, config.block_n) <= multiprocessors
        return config._replace(stages=8, programs=1) if few and chip >= 90 else config
    config = min(BLOCKS[chip], key=lambda config: _cycles(config, product, chip, multiprocessors))
    if chip >= 90 and not product.gather:
        config = config._replace(piece=64, flatten=True)
    return config._replace(block_n=config.block_n // split)


def _cycles(config: Config, product: Product, chip: int, multiprocessors: int) -> float:
    """Of all blocks, for each step of 64: on average the last tile of an expert is half full."""
    tiles = product.rows / config.block_m + product.num_experts / 2
    blocks = tiles * triton.cdiv(product.parts * product.width, config.block_n)
    rounds, last = divmod(blocks / multiprocessors, 1)

    def of_one(block_n: int) -> float:
        multiply = 64 * config.block_m * block_n / MULTIPLY_ADDS[chip]
        load = 64 * product.dtype.itemsize * (config.block_m + block_n) / L2_BYTES
        return max(multiply, load)

    last_n = config.block_n // 2 if config.split and last <= 0.5 else config.block_n
    return rounds * of_one(config.block_n) + (of_one(last_n) if last else 0)


def candidates(product: Product, chip: int, multiprocessors: int) -> list[Config]:
    """Configurations worth measuring, that of the rules first; some may want more than the chip has."""
    found, split = [rules(product, chip, multiprocessors)], product.parts
    if product.key.rows_per_expert <= 64:
        for block_m in (16, 32, 64):
            for block_n, block_k, programs in ((64, 128, 3), (64, 256, 2), (128, 128, 2)):
                found.append(Config(block_m, block_n, block_k // split, 4, 4, programs, swap=True))
    if product.key.rows_per_expert > 32:
        more = [(64, 256, 64, 4, 4, 1), (128, 128, 64, 4, 3, 2), (128, 256, 64, 8, 3, 1), (256, 128, 64, 8, 4, 1)]
        plain = [config._replace(split=False) for config in BLOCKS[chip]]
        for config in (*BLOCKS[chip], *plain, *(Config(*sizes) for sizes in more)):
            config = config._replace(block_n=config.block_n // split)
            found += [config] if product.gather else [config, config._replace(piece=64, flatten=True)]
    return list(dict.fromkeys(found))


def path_of_table(chip: int) -> Path:
    """Where the measured configurations of a chip are."""
    return FOLDER / f"experts-sm_{chip}.json"


# Block shapes of the backward's products that give a row for each row.
ROW_BLOCKS = {
    80: (Config(128, 128, 32, 8, 4), Config(64, 128, 32, 4, 4, programs=2), Config(64, 64, 32, 4, 5, programs=2)),
    90: (
        Config(128, 256, 64, warps=8, stages=4),
        Config(128, 128, 64, warps=8, stages=5),
        Config(64, 128, 64, warps=4, stages=4, programs=2),
        Config(64, 64, 64, warps=4, stages=5, programs=2),
    ),
}


def row_gradients(products: Sequence[Product], device: torch.device) -> list[Config]:
    """For products of the backward that give a row for each row: configurations of equal `block_m`."""
    if INTERPRETED:  # column sums add row after row there, not as a tree: more rows would round more than PyTorch does
        return [Config(32, 64, 64, warps=4, stages=1)] * len(products)
    if products[0].dtype == torch.float32:
        return [Config(64, 64, 16, warps=4, stages=2, programs=2)] * len(products)
    chip = chip_of(device)

    def cycles(config: Config, product: Product) -> float:
        return _cycles(config, product, chip, multiprocessors(device)) * product.depth

    def best(height: int) -> list[Config]:
        tall = [config for config in ROW_BLOCKS[chip] if config.block_m == height]
        return [min(tall, key=lambda config: cycles(config, product)) for product in products]

    return min((best(128), best(64)), key=lambda configs: sum(map(cycles, configs, products)))


def matrix_gradient(dtype: torch.dtype, gather: bool, device: torch.device) -> Config:
    """For the products of the backward that sum over rows, `gather`: with rows that are found by an index. Steps of
    `block_k` rows divide the tiles of `row_gradients`: behind the last tile of an expert lie another's, or none.
    """
    if INTERPRETED:
        return Config(64, 64, 32, warps=4, stages=1)
    if dtype == torch.float32:
        return Config(64, 64, 16, warps=4, stages=2)
    if chip_of(device) >= 90:
        return Config(128, 256, 64, warps=8, stages=5 if gather else 3)
    return Config(128, 128, 32, warps=8, stages=7 if gather else 4)


def takes_tma(x: Tensor) -> bool:
    """Can the copy engine read `x`, and does it pay (where the tensor cores read shared memory, which is Hopper's)?"""
    steps = [x.data_ptr(), *(stride * x.element_size() for stride in x.stride()[:-1])]
    able = x.stride(-1) == 1 and all(step % 16 == 0 for step in steps) and min(*x.shape, *x.stride()) > 0
    return able and x.element_size() == 2 and chip_of(x.device) >= 90


@cache
def table(path: Path) -> dict[Key, Config]:
    """The configurations of a file; none where there is no file."""
    if not path.is_file():
        return {}
    return {Key(**entry["product"]): Config(**entry["config"]) for entry in json.loads(path.read_text())["entries"]}


def forget_tables() -> None:
    """Read them again; for who wrote one."""
    table.cache_clear()
    _choose.cache_clear()
