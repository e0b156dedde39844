"""What docstrings promise: what goes in and comes out, what is raised, and examples that run."""

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
import textwrap
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import pytest

import jaxflow
from jaxflow import (
    density,
    events,
    fields,
    kernels,
    masks,
    measure,
    models,
    observables,
    reversible,
    solvers,
    stability,
    training,
    viz,
)
from jaxflow.density import closures

OWNERS = (
    jaxflow, measure, masks, fields, kernels, solvers, observables, events, density, closures,
    models, reversible, stability, training, viz,
)  # fmt: skip
UNRUN = ("from_pretrained",)  # reads weights that are not here


def public() -> dict[str, Any]:
    """The public functions and classes: what a module lists, or what it defines."""
    found = {}
    for owner in OWNERS:
        own = [n for n, v in vars(owner).items() if getattr(v, "__module__", "") == owner.__name__]
        for name in getattr(owner, "__all__", [n for n in own if not n.startswith("_")]):
            value = getattr(owner, name)
            if inspect.isfunction(value) or inspect.isclass(value):
                found[f"{value.__module__}.{name}"] = value
    return {name: v for name, v in found.items() if name.startswith("jaxflow.")}


PUBLIC = public()


def raises(value: Any) -> bool:
    """Whether a function, or what makes or calls an instance of a class, raises or asks a rule."""
    module = importlib.import_module(value.__module__)
    of_rules = lambda v: inspect.isfunction(v) and v.__module__ in ("jaxflow._rules",)
    rules = {name for name, v in vars(module).items() if of_rules(v)} - {"known", "is_real"}
    rules |= {"check_fits", "check_measure"}
    [node] = ast.parse(textwrap.dedent(inspect.getsource(value))).body
    makers = ("__init__", "__check_init__", "__post_init__", "__call__")
    if isinstance(node, ast.ClassDef):
        methods = (m for m in node.body if isinstance(m, ast.FunctionDef))
        bodies = [method for method in methods if method.name in makers]
    else:
        bodies = [node]
    asks = lambda x: isinstance(x, ast.Call) and isinstance(x.func, ast.Name) and x.func.id in rules
    lines = (x for body in bodies for x in ast.walk(body))
    return any((isinstance(x, ast.Raise) and x.exc is not None) or asks(x) for x in lines)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_what_raises_says_so(name):
    value = PUBLIC[name]
    error = inspect.isclass(value) and issubclass(value, BaseException)
    if not error and raises(value):
        assert "**Raises:**" in (inspect.getdoc(value) or "")


def test_a_function_that_raises_is_found():
    assert raises(measure.uniform_sphere) and raises(jaxflow.Measure)
    assert not raises(models.layered)


def public_functions() -> dict[str, Any]:
    """The functions that any module of the library lists, but for those of the programs."""
    programs = ("jaxflow.cli", "jaxflow.reproduce")
    found = {}
    for module in pkgutil.walk_packages(jaxflow.__path__, "jaxflow."):
        if not ("._" in module.name or module.name.startswith(programs)):
            owner = importlib.import_module(module.name)
            listed = (getattr(owner, name) for name in getattr(owner, "__all__", ()))
            found |= {f"{v.__module__}.{v.__name__}": v for v in listed if inspect.isfunction(v)}
    return found


def unsaid(function: Any) -> list[str]:
    """What a docstring leaves out: the arguments of a function, what it returns and raises."""
    signature, text = inspect.signature(function), inspect.getdoc(function) or ""
    returns = signature.return_annotation not in (None, inspect.Signature.empty)
    needed = {"**Arguments:**": bool(signature.parameters), "**Returns:**": returns}
    needed["**Raises:**"] = raises(function)
    return [part for part, there in needed.items() if there and part not in text]


def test_functions_say_what_they_take_return_and_raise():
    missing = {name: unsaid(function) for name, function in public_functions().items()}
    assert {name: parts for name, parts in missing.items() if parts} == {}


def test_a_function_that_leaves_out_what_it_takes_is_found():
    def silent(n: int) -> int:
        """A number."""
        if n < 0:
            raise ValueError
        return n

    def nothing() -> None:
        """Takes and returns nothing."""

    assert unsaid(silent) == ["**Arguments:**", "**Returns:**", "**Raises:**"]
    assert unsaid(nothing) == []
    functions = public_functions()
    assert "jaxflow.flow.flow" in functions and "jaxflow.measure.samplers.circle" in functions


def examples(value: Any) -> tuple[list[doctest.Example], list[str]]:
    """The lines behind prompts, and the blocks without any."""
    text = inspect.getdoc(value) or ""
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    return doctest.DocTestParser().get_examples(text), [b for b in blocks if ">>>" not in b]


SHOWN = sorted(name for name, value in PUBLIC.items() if any(examples(value)))


def test_each_public_function_shows_how():
    listed = {name for owner in OWNERS for name in getattr(owner, "__all__", ())}
    functions = {n for n, v in PUBLIC.items() if inspect.isfunction(v) and v.__name__ in listed}
    assert functions - set(SHOWN) == set()


@pytest.mark.parametrize("name", [n for n in SHOWN if n.split(".")[-1] not in UNRUN])
def test_examples_run(name):
    names = {"jax": jax, "jnp": jnp, "diffrax": diffrax, "jaxflow": jaxflow}
    lines, blocks = examples(PUBLIC[name])
    test = doctest.DocTest(lines, dict(names), name, None, 0, None)
    assert doctest.DocTestRunner().run(test).failed == 0
    for block in blocks:
        exec(block, dict(names))
