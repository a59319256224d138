"""The compiled module `unif2ace._C`, which may be absent.

Loading it registers the C++ ops in torch's namespace `unif2ace_native`. Nothing happens at import: the first question
(`load`, `why_not`, `build_info`) loads it, at most once, and remembers the outcome.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from types import ModuleType

NAME = "unif2ace._C"


@lru_cache(maxsize=1)
def _attempt() -> tuple[ModuleType | None, str | None]:
    """(module, None) or (None, reason)."""
    import torch  # noqa: F401 - the module's symbols live in libtorch, which has to be in the process first

    try:
        return importlib.import_module(NAME), None
    except ModuleNotFoundError:
        return None, (
            "the compiled module is not built; build it with `make venv` in a checkout (needs a C++ compiler), "
            "or reinstall with `pip install --no-build-isolation .`"
        )
    except (ImportError, OSError) as error:  # built for another torch, Python or machine
        return (
            None,
            f"the compiled module does not load ({str(error).splitlines()[0]}); build it again with `make venv`",
        )


def load() -> ModuleType | None:
    """The compiled module, loaded, with its ops registered; None where it is missing or does not load (`why_not`)."""
    return _attempt()[0]


def why_not() -> str | None:
    """Why the compiled module cannot be used, in one sentence that says what would help; None when it can."""
    return _attempt()[1]


def build_info() -> dict[str, object] | None:
    """Compiler, flags, torch and CUDA versions of the build, with the processor's features; None without the module."""
    module = load()
    return None if module is None else {**module.build_info(), "cpu": module.cpu_features()}
