"""Shows how classes are called whose fields are their arguments: Equinox modules, named tuples.

Griffe, which reads the sources for the reference, knows this of `dataclasses.dataclass` alone.
"""

from collections.abc import Iterator
from typing import Any

from griffe import Attribute, Class, Decorator, ExprCall, ExprKeyword, ExprName, Extension, Module

KINDS = {"equinox.Module", "typing.NamedTuple"}
FIELD = "equinox.field"


class Constructors(Extension):
    """Marks them as dataclasses before Griffe writes the constructors of those."""

    def on_package(self, *, pkg: Module, **kwargs: Any):
        for class_ in _classes(pkg):
            if _is_made_of_fields(class_):
                _mark(class_)


def _classes(module: Module) -> Iterator[Class]:
    for member in module.members.values():
        if isinstance(member, Module):
            yield from _classes(member)
        elif isinstance(member, Class):
            yield member


def _is_made_of_fields(class_: Class) -> bool:
    bases = (base for kind in (class_, *class_.mro()) for base in kind.bases)
    return any(getattr(base, "canonical_path", "") in KINDS for base in bases)


def _mark(class_: Class):
    name = ExprName("dataclasses.dataclass")
    class_.decorators.append(Decorator(name, lineno=None, endlineno=None))
    for member in class_.members.values():
        if isinstance(member, Attribute) and isinstance(member.value, ExprCall):
            if member.value.canonical_path == FIELD:
                member.value = _default(member.value)


def _default(field: ExprCall) -> Any:
    """The default of `eqx.field(static=True, default=...)`, or None."""
    named = (a for a in field.arguments if isinstance(a, ExprKeyword))
    return next((argument.value for argument in named if argument.name == "default"), None)
