"""Functions compared by what they do, so that the same lambda written twice is one program.

A compiled solve is kept for the functions that it was made with. A lambda in a loop is a new
function each time, equal to none before, and would cost a compilation of seconds. Two functions
do the same where their code, defaults, closures and the globals that they read are the same.
"""

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.core
import numpy as np

# Values that cannot change, and compare by what they are.
PLAIN = (int, float, complex, str, bytes, bool, type(None))
# Values that keep their meaning as long as they are the same object.
FIXED = (types.ModuleType, type, types.BuiltinFunctionType, jax.Array)


class SameCode:
    """A function that equals every other one with the same code, closure and globals."""

    def __init__(self, fn: types.FunctionType, key: tuple):
        functools.update_wrapper(self, fn)
        self.fn = fn
        self.key = key

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.fn(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SameCode) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        return repr(self.fn)


def by_code(fn: Any) -> Any:
    """The function, compared by its code where that is sound; anything else as it is.

    It is not sound where the function reads something that may change under it: a list, a
    dictionary, an array of NumPy, an object of a class of the user's own. Such a function equals
    itself alone.
    """
    if not isinstance(fn, types.FunctionType):
        return fn
    key = _function_key(fn, ())
    return fn if key is None else SameCode(fn, key)


class _Same:
    """Equality of objects by identity; it keeps the object, so that no other takes its place."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _function_key(fn: types.FunctionType, above: tuple) -> tuple | None:
    """All that the function's results depend on; None where that is not known."""
    if fn in above:  # a function that calls itself
        return (fn.__code__,)
    cells = [cell.cell_contents for cell in fn.__closure__ or () if _is_filled(cell)]
    names = [name for name in sorted(set(_names(fn.__code__))) if name in fn.__globals__]
    read = [fn.__globals__[name] for name in names]
    values = [*(fn.__defaults__ or ()), *(fn.__kwdefaults__ or {}).values(), *cells, *read]
    keys = [_value_key(value, (*above, fn)) for value in values]
    if any(key is None for key in keys) or len(cells) < len(fn.__closure__ or ()):
        return None
    return fn.__code__, tuple(names), tuple(fn.__kwdefaults__ or ()), *keys


def _value_key(value: Any, above: tuple) -> Any:
    if isinstance(value, PLAIN):
        return type(value), value
    if isinstance(value, jax.core.Tracer):
        return None
    if isinstance(value, FIXED):
        return _Same(value)
    if isinstance(value, eqx.Module):
        mutable = np.ndarray | jax.core.Tracer
        return None if any(isinstance(a, mutable) for a in jax.tree.leaves(value)) else _Same(value)
    if isinstance(value, types.FunctionType):
        # Functions of modules stay as they are; those of a script may be compared like this one.
        return _function_key(value, above) if value.__closure__ else _Same(value)
    if isinstance(value, tuple):
        keys = tuple(_value_key(item, above) for item in value)
        return None if None in keys else keys
    return None


def _is_filled(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _names(code: types.CodeType) -> Iterator[str]:
    """Names that the code may read from its globals, and those of functions inside of it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def compared_by_code(tree: Any, keep: tuple[Callable, ...] = ()) -> Any:
    """The tree with each function in it compared by its code, but for those to `keep`."""
    is_function = lambda x: isinstance(x, types.FunctionType)
    return jax.tree.map(
        lambda x: by_code(x) if is_function(x) and x not in keep else x, tree, is_leaf=is_function
    )
