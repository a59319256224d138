"""One row of the table of kernel resources, and the limits it has to keep."""

from __future__ import annotations

from typing import NamedTuple

from unif2ace.resources.cubin import Facts

# Shared memory one block may ask for, in bytes (CUDA programming guide, compute capabilities 8.0 and 9.0).
SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024}
REGISTERS = 65536  # of one multiprocessor, hence of one block


class Kernel(NamedTuple):
    """One compiled launch configuration of one kernel on one chip.

    `source` is `triton` or `cuda`. `call` is the entry of calls.py that asked for it, `configuration` the constants
    that the launcher chose and `threads` those of a block; for CUDA the template's name says the first two, and the
    launch decides the third ("", {} and 0).
    """

    op: str
    name: str
    source: str
    capability: int
    dtype: str
    call: str
    configuration: dict[str, object]
    threads: int
    facts: Facts

    @property
    def arch(self) -> str:
        """The chip as compilers call it: Hopper's own instructions need the `a`."""
        return architecture(self.capability)

    def problems(self) -> list[str]:
        """What forbids shipping it, in words: spills, more shared memory or registers than a block can have."""
        facts, limit, found = self.facts, SHARED_LIMITS[self.capability], []
        if facts.spill_bytes:
            found.append(f"spills {facts.spill_bytes} bytes per thread")
        if facts.shared_bytes > limit:
            found.append(f"wants {facts.shared_bytes} bytes of shared memory, {self.arch} has {limit}")
        if facts.registers * self.threads > REGISTERS:
            found.append(f"wants {facts.registers} registers for {self.threads} threads, a block has {REGISTERS}")
        return found

    def as_json(self) -> dict[str, object]:
        """Plain values under flat names."""
        facts = self.facts
        return {
            "op": self.op,
            "name": self.name,
            "source": self.source,
            "arch": self.arch,
            "dtype": self.dtype,
            "call": self.call,
            "configuration": self.configuration,
            "threads": self.threads,
            "registers": facts.registers,
            "shared_bytes": facts.shared_bytes,
            "spills": facts.spill_bytes,
            "wgmma": facts.matrix == "wgmma",
            "matrix": facts.matrix,
            "loads": facts.loads,
            "wide_loads": facts.wide_loads,
            "problems": self.problems(),
        }


def architecture(capability: int) -> str:
    """90 as `sm_90a`, 80 as `sm_80`."""
    return f"sm_{capability}a" if capability == 90 else f"sm_{capability}"
