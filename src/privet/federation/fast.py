"""Numba where it is installed: the same numbers as the numpy paths, faster."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

try:
    import numba
except ImportError:
    numba = None

Function = TypeVar("Function", bound=Callable[..., Any])

_state = {"fast": numba is not None and os.environ.get("PRIVET_NUMBA", "1") != "0"}


def fast() -> bool:
    """Say whether compiled loops are used; PRIVET_NUMBA=0 in the environment turns them off."""
    return _state["fast"]


def jit(function: Function) -> Function:
    """Compile a loop with Numba when it is first called; without Numba leave it, to be never called."""
    if numba is None:
        return function
    try:
        compiled: Function = numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # nowhere to keep what was compiled
        compiled = numba.njit(nogil=True)(function)
    return compiled
