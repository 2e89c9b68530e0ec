"""Lets `torch.compile` trace our LSTM, without importing the compiler before it is used.

Dynamo refuses every instance of `torch.nn.LSTM` before it looks at its forward, unless
`torch._dynamo.config.allow_rnn` is set, which would change how the user's own modules compile. So
it is set here alone, while Dynamo takes in a module of ours whose calls become our operators.
"""

from __future__ import annotations

import functools
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

from torch.nn import Module

_BUILDER = "torch._dynamo.variables.builder"


def trace(cls: type[Module]) -> None:
    """Have Dynamo trace instances of `cls`. Where torch's internals differ, nothing changes."""
    if _BUILDER in sys.modules:
        _wrap(sys.modules[_BUILDER], cls)
    else:
        sys.meta_path.insert(0, _AfterImport(cls))


class _AfterImport(MetaPathFinder):
    """Runs `_wrap` once `_BUILDER` has been imported, and leaves."""

    def __init__(self, cls: type[Module]) -> None:
        self.cls = cls

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != _BUILDER:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_wrap(module: Any) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                _wrap(module, self.cls)

            spec.loader.exec_module = execute_and_wrap  # type: ignore[method-assign]
        return spec


def _wrap(builder: Any, cls: type[Module]) -> None:
    """Set the option while the module `builder` takes in an instance of `cls` that is served."""
    try:
        owner, config = builder.VariableBuilder, builder.config
        wrap_module, patch = owner.wrap_module, config.patch
        config.allow_rnn  # noqa: B018 - must be there
    except AttributeError:
        return

    @functools.wraps(wrap_module)
    def wrapped(self: Any, value: Any) -> Any:
        if isinstance(value, cls) and all(p.is_cpu for p in value.parameters()):
            with patch(allow_rnn=True):
                return wrap_module(self, value)
        return wrap_module(self, value)

    owner.wrap_module = wrapped
