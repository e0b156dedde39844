"""What users rely on, a line each: public names, their signatures, and the flags of commands.

    python tests/public_api.py      writes public_api.txt beside this file

Annotations are left out, and defaults that are objects are "...": those are written differently by
different versions of Python and JAX.
"""

import functools
import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import typer

from jaxflow.cli import app

FILE = Path(__file__).with_name("public_api.txt")
# Documented modules that their package does not list, as a star import would shadow others.
UNLISTED = ("jaxflow.fields.time",)


def modules() -> list[ModuleType]:
    """jaxflow, and the public modules below it."""
    found: dict[str, ModuleType] = {}

    def visit(module: ModuleType):
        found[module.__name__] = module
        for name in module.__all__:
            if inspect.ismodule(value := getattr(module, name)):
                visit(value)

    for name in ("jaxflow", *UNLISTED):
        visit(importlib.import_module(name))
    return [found[name] for name in sorted(found)]


def lines() -> Iterator[str]:
    first: dict[Any, str] = {}
    for module in modules():
        for name in sorted(module.__all__):
            path, value = f"{module.__name__}.{name}", getattr(module, name)
            known = inspect.isclass(value) or inspect.isfunction(value)
            if known and first.setdefault(value, path) != path:
                yield f"{path} is {first[value]}"
            else:
                yield from described(path, value)
    yield from flags("jaxflow", typer.main.get_command(app))


def described(name: str, value: Any) -> Iterator[str]:
    if inspect.isclass(value):
        yield f"class {name}{constructor(value)}"
        for member, found in sorted(members(value).items()):
            yield f"    {name}.{member}{found}"
    elif inspect.isfunction(value):
        yield f"{name}{signature(value)}"
    else:
        yield f"{name}: {'module' if inspect.ismodule(value) else type(value).__name__}"


def constructor(kind: type) -> str:
    """Nothing for a class that users do not call: one that is abstract, a protocol or an error."""
    if inspect.isabstract(kind) or getattr(kind, "_is_protocol", False):
        return ""
    if issubclass(kind, Exception):
        return ""
    return signature(kind)


def members(kind: type) -> dict[str, str]:
    """The public methods, with their signatures, and properties that our classes define."""
    found = {}
    ours = (base for base in reversed(kind.__mro__) if base.__module__.startswith("jaxflow."))
    for name, value in (item for base in ours for item in vars(base).items()):
        if isinstance(value, property | functools.cached_property):
            found[name] = ""
        elif isinstance(function := getattr(value, "__func__", value), FunctionType) or callable(
            getattr(value, "method", None)
        ):
            found[name] = signature(inspect.unwrap(getattr(function, "method", function)))
    public = lambda name: name == "__call__" or not name.startswith("_")
    return {name: text for name, text in found.items() if public(name)}


def signature(value: Any) -> str:
    blank = inspect.Parameter.empty
    parameters = [
        p.replace(annotation=blank, default=p.default if p.default is blank else _Shown(p.default))
        for p in inspect.signature(value).parameters.values()
    ]
    return str(inspect.Signature(parameters))


class _Shown:
    """A default as it is written."""

    def __init__(self, value: Any):
        plain = value is None or type(value) in (bool, int, float, str, tuple)
        self.text = repr(value) if plain else "..."

    def __repr__(self):
        return self.text


def flags(path: str, command: Any) -> Iterator[str]:
    """A line for each flag of a command and those below it."""
    for option in command.params:
        names = "/".join([*option.opts, *option.secondary_opts])
        plain = option.default is None or isinstance(option.default, bool | int | float | str)
        yield f"$ {path} {names}" + (f" = {option.default}" if plain else "")
    for name, below in sorted(getattr(command, "commands", {}).items()):
        yield from flags(f"{path} {name}", below)


def text() -> str:
    return "".join(f"{line}\n" for line in lines())


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
    print(f"{FILE}: {len(text().splitlines())} lines", file=sys.stderr)
