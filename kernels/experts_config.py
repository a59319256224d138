"""How the grouped products of `experts` are launched: tile sizes and pipelines, by rules and by measured tables.

`choose` looks a product up in the table of the chip, `tuning/experts-sm_90.json` and so on, and where no table knows it
follows the rules below. Nothing is tuned while a program runs; `unif2ace bench experts --tune` measures `candidates` on
the GPU at hand and writes the table.

The rules (16-bit operands; r = rows per expert on average, which the host knows, as it does not know the offsets):

* r > 64, Hopper: blocks of 128 x 256, the largest whose accumulator two warpgroups hold (128 registers per thread).
  Per step of 64 a block reads 48 KiB from L2 for 1024 cycles of tensor cores, 48 bytes per cycle of the 64 that a
  multiprocessor can get; 128 x 128 would need all 64. Four stages of 48 KiB fill the 227 KiB of shared memory.
* r <= 64: the matrices' bytes decide. Blocks of 64 rows, several programs per multiprocessor, so that one loads while
  another multiplies or stores.
* r <= 32: `swap`, 64 (gated 2 x 64) rows of the matrix times 16 or 32 tokens. In flight per multiprocessor are
  two or three programs times three or four stages of 16 KiB; 4.3 TB/s times 1 us of latency over 132 multiprocessors
  asks for 32 KiB.
* A100 has no wgmma and 163 KiB: 128 x 128, in steps of 32.
* float32 runs on the ordinary arithmetic units: 64 x 64.
* Under the interpreter one small tile for everything: programs are slow there, not rows.

The backward (`gradients`) follows rules of its own, for r >= 128 and below:

* Gradients of rows: the same 128 x 256 blocks. Both kernels share BLOCK_M, because one stores by tile what the other
  reads. The epilogue of the activation works on 32 columns at a time; with 64 the compiler spills registers.
* r < 128: blocks of 64 x 64, so that E experts of few rows make enough programs to stream their matrices.
* Gradients of matrices: 128 x 256 for any load, since their number of blocks does not depend on it. A row is found by
  an index that has to arrive first, and Triton spends two of five stages on it: three buffers of 48 KiB remain.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from unif2ace.kernels._device import INTERPRETED, capability

FOLDER = Path(__file__).parent / "tuning"


class Config(NamedTuple):
    """One way to launch `grouped_product_kernel`. `programs` per multiprocessor; `piece` columns of the epilogue."""

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
    def rows_per_expert(self) -> int:
        """Rounded up to a power of two: close loads share an entry of the table."""
        return triton.next_power_of_2(max(1, -(-self.rows // self.num_experts)))

    @property
    def key(self) -> str:
        """Its name in a table."""
        kind = "gather" if self.gather else "rows"
        bits = 8 * self.dtype.itemsize
        return f"{bits}-bit {kind} {self.rows_per_expert} x {self.parts} x {self.width} x {self.depth}"


def choose(product: Product, device: torch.device) -> Config:
    """The table's configuration, or else that of the rules."""
    chip = capability(device)
    return table(FOLDER / f"experts-sm_{chip}.json").get(product.key) or rules(product, chip)


def rules(product: Product, chip: int) -> Config:
    """See the module docstring."""
    block_n = 1 if product.parts == 1 else 2  # of a gated product, gate and up share the block
    if INTERPRETED:
        return Config(64, 64, 64, warps=4, stages=1)
    if product.dtype == torch.float32:
        return Config(64, 64 // block_n, 16, warps=4, stages=2, programs=2)
    rows = product.rows_per_expert
    if rows <= 32:
        block_m = 16 if rows <= 8 else 32
        return Config(block_m, 64, 128 // block_n, warps=4, stages=4, programs=2, swap=True)
    if chip >= 90:
        if rows <= 64:
            return Config(64, 128 // block_n, 64, warps=4, stages=4, programs=2)
        if product.gather:
            return Config(128, 256 // block_n, 64, warps=8, stages=4)
        return Config(128, 256 // block_n, 64, warps=8, stages=4, piece=64, flatten=True)
    if rows <= 64:
        return Config(64, 128 // block_n, 32, warps=4, stages=4, programs=2)
    return Config(128, 128 // block_n, 32, warps=8, stages=4, programs=2)


def candidates(product: Product, chip: int) -> list[Config]:
    """Configurations worth measuring, that of the rules first."""
    split = product.parts
    found = [rules(product, chip)]
    if product.rows_per_expert <= 64:
        found += [
            Config(block_m, block_n, block_k // split, warps=4, stages=stages, programs=programs, swap=True)
            for block_m in (16, 32, 64)
            for block_n, block_k, programs in ((64, 128, 3), (64, 256, 2), (128, 128, 2))
            for stages in (3, 4)
        ]
    if product.rows_per_expert > 32:
        shapes = [(64, 128, 64, 4, 4, 2), (64, 256, 64, 4, 4, 1), (128, 128, 64, 4, 3, 2), (128, 128, 64, 8, 4, 1)]
        shapes += [(128, 256, 64, 8, 3, 1), (128, 256, 64, 8, 4, 1), (256, 128, 64, 8, 3, 1), (256, 128, 64, 8, 4, 1)]
        found += [
            Config(m, n // split, k, warps, stages, programs, group_m=group, flatten=flatten)
            for m, n, k, warps, stages, programs in shapes
            for group in (4, 8, 16)
            for flatten in ((False,) if product.gather else (False, True))
        ]
    return list(dict.fromkeys(found))


class Gradients(NamedTuple):
    """How the backward is launched: products that give a row for each row, and products over the rows."""

    rows: Config
    weights: Config


def gradients(dtype: torch.dtype, rows: int, num_experts: int, device: torch.device) -> Gradients:
    """The configurations of the backward for `rows` sorted rows; see the module docstring."""
    many = rows >= 128 * num_experts
    if INTERPRETED:
        return Gradients(Config(64, 64, 64, 4, 1, piece=32), Config(64, 64, 64, 4, 1))
    if dtype == torch.float32:
        return Gradients(Config(64, 64, 16, 4, 2, programs=2, piece=32), Config(64, 64, 16, 4, 2))
    if capability(device) >= 90:
        few = Config(64, 64, 64, warps=4, stages=5, programs=2, piece=32)
        return Gradients(Config(128, 256, 64, 8, 4, piece=32) if many else few, Config(128, 256, 64, 8, 5))
    few = Config(64, 64, 32, warps=4, stages=5, programs=2, piece=32)
    return Gradients(Config(128, 128, 32, 8, 4, piece=32) if many else few, Config(128, 128, 32, 8, 7))


@cache
def table(path: Path) -> dict[str, Config]:
    """The configurations of a file by `Product.key`; none where there is no file."""
    if not path.is_file():
        return {}
    return {entry["product"]: Config(**entry["config"]) for entry in json.loads(path.read_text())["entries"]}
