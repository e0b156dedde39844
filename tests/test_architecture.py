"""The rules of the code base, as tests."""

import ast
import dataclasses
import importlib
import inspect
import pathlib
import pkgutil
import subprocess
import sys

import equinox as eqx
import pytest

import jaxflow

ROOT = pathlib.Path(jaxflow.__file__).parent

# Imports point to a lower layer, or stay within a package.
LAYERS = {
    "_cache": 0,
    "_files": 1,
    "_folder": 0,
    "_functions": 0,
    "_memory": 0,
    "_page": 0,
    "_types": 0,
    "_rules": 0.5,
    "masks": 0.7,
    "measure": 1,
    "geometry": 0.9,
    "kernels": 1,
    "sharding": 1,
    "fields": 2,
    "phase_rows": 2,
    "_dataset": 2,
    "_flow_input": 3,
    "_saving": 3,
    "_meeting": 3.5,
    "_mergers": 3.5,
    "_solution": 4,
    "explicit": 3,
    "observables": 3,
    "solvers": 4,
    "noise": 4.5,
    "reversible": 4.5,
    "_coarsened": 5,
    "flow": 5,
    "hardmax": 5,
    "coarsen": 6,
    "density": 6,
    "events": 6,
    "lyapunov": 6,
    "models": 6,
    "phase": 6,
    "stability": 6,
    "training": 7,
    "view": 8,
    "viz": 8,
    "reproduce": 9,
    "cli": 10,
}


def modules():
    entries = {ROOT / "__init__.py", ROOT / "__main__.py"}
    return sorted(p for p in ROOT.rglob("*.py") if p not in entries)


def top(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: pathlib.Path) -> set[str]:
    """The first-level modules of jaxflow that a file imports."""
    package = ("jaxflow", *path.relative_to(ROOT).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            full = [*base, *(node.module or "").split(".")] if node.module else list(base)
            names = [[*full, a.name] for a in node.names] if len(full) == 1 else [full]
        elif isinstance(node, ast.Import):
            names = [a.name.split(".") for a in node.names]
        else:
            continue
        found |= {n[1] for n in names if n[0] == "jaxflow" and len(n) > 1 and n[1] != "__version__"}
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    for name in imported(path) - {top(path)}:
        assert LAYERS[name] < LAYERS[top(path)], f"{top(path)} may not import {name}"


def test_only_flow_calls_the_solver():
    callers = {top(p) for p in modules() if "diffeqsolve(" in p.read_text()}
    assert callers == {"flow"}


def all_classes():
    for info in pkgutil.walk_packages(jaxflow.__path__, "jaxflow."):
        if info.name == "jaxflow.__main__":
            continue
        module = importlib.import_module(info.name)
        for cls in vars(module).values():
            if inspect.isclass(cls) and cls.__module__ == info.name:
                yield cls


def classes():
    return (cls for cls in all_classes() if issubclass(cls, eqx.Module))


def written_in(cls):
    """The methods and properties that the body of a class defines, but for abstract ones."""
    for name, member in vars(cls).items():
        function = inspect.unwrap(getattr(member, "fget", None) or member)
        own = getattr(function, "__qualname__", "").startswith(f"{cls.__qualname__}.")
        if own and not getattr(member, "__isabstractmethod__", False):
            yield name


# What dataclasses write, and constructors, which each class has of its own.
OWN = {*vars(dataclasses.make_dataclass("_", [], frozen=True)), "__new__", "__check_init__"}
# Of others' classes: typer's commands, JAX's tracers.
FOREIGN = {"super": {"cli/boundary.py"}, "hasattr": {"flow.py"}}


def test_methods_are_abstract_or_final():
    """What a base class of ours implements, no class below it implements again."""
    assert {"seen", "__call__", "split"} <= set(written_in(jaxflow.fields.AbstractWrapper))
    assert {"parts", "__add__"} <= set(written_in(jaxflow.AbstractField))
    for cls in all_classes():
        for base in cls.__mro__[1:]:
            if base.__module__.startswith("jaxflow."):
                again = set(written_in(base)) & set(vars(cls)) - OWN
                assert not again, f"{cls} overrides {sorted(again)} of {base}"


@pytest.mark.parametrize("name", ["super", "hasattr"])
def test_classes_are_wrapped_and_known(name):
    """A method that is not overridden needs no super(), an object of a known class no hasattr."""
    for path in modules():
        if str(path.relative_to(ROOT)) in FOREIGN[name]:
            continue
        calls = (n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call))
        assert not any(isinstance(f, ast.Name) and f.id == name for f in calls), path


def test_classes_are_abstract_or_final():
    """A class that can be instantiated is never subclassed; Abstract* and _Abstract* cannot be."""
    ours = list(classes())
    assert ours
    for cls in ours:
        abstract = cls.__name__.startswith("Abstract")
        assert inspect.isabstract(cls) == abstract, cls
        for base in cls.__mro__[1:]:
            if base.__module__.startswith("jaxflow."):
                assert base.__name__.startswith("Abstract"), f"{cls} subclasses final {base}"


def test_public_names_exist():
    assert sorted(jaxflow.__all__) == jaxflow.__all__
    assert all(hasattr(jaxflow, name) for name in jaxflow.__all__)


def test_import_brings_in_no_extra():
    code = (
        "import sys, jaxflow; extras = {'matplotlib', 'ott', 'orbax', 'tokenizers', "
        "'sklearn', 'torch', 'scipy.optimize'}; print(sorted(extras & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
