"""Lets `torch.fx.symbolic_trace` take a call of our modules as one node, as it does of torch's.

It looks into every module whose class does not stand in `torch.nn`, and ours cannot be looked into.
"""

from __future__ import annotations

import functools

import torch.fx
from torch.nn import Module


def take_as_one(*classes: type[Module]) -> None:
    """Have torch.fx take modules as one node whose forward is that of one of `classes`."""
    forwards = [cls.forward for cls in classes]
    is_leaf_module = torch.fx.Tracer.is_leaf_module

    @functools.wraps(is_leaf_module)
    def wrapped(self: torch.fx.Tracer, m: Module, module_qualified_name: str) -> bool:
        return type(m).forward in forwards or is_leaf_module(self, m, module_qualified_name)

    torch.fx.Tracer.is_leaf_module = wrapped  # type: ignore[method-assign]
