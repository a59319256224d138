"""For each op the calls whose launches cover every shipped launch configuration, on meta tensors.

A call names a registered op and its arguments, as `unif2ace.kernels.<op>` gets them. Sizes are those of the
`unif2ace-1.8b` preset, and whatever else makes a launcher choose a configuration of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple


class Call(NamedTuple):
    """One call: `label` tells a reader of the table what it stands for."""

    label: str
    function: str
    arguments: tuple


CALLS: dict[str, Callable[[], Iterator[Call]]] = {}
