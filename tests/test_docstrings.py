"""What docstrings promise: their examples run, and what raises says what it raises."""

import ast
import doctest
import importlib
import inspect
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
# The most used names, each of which shows how.
SHOWN = """
    Measure uniform_sphere Sphere SelfAttention MultiHeadAttention FeedForward divergence
    softmax_expectation select_backend TimeDependent PiecewiseConstant flow FlowSolution coarsen
    until_clustered merges cluster_labels cluster_count InteractionEnergy lyapunov_exponents
    phase_diagram LanguageModel fit Window Blocks Strided Global Random BlockSparse big_bird TopK
    Hierarchical log_density solve evolve NormalisedEuler Rescaled L2 ALiBi Sigmoid MeanShift
    BoundedConfidence AbstractInteraction hardmax_flow GaussianMatrices redrawn Noise compress
    Compressed Box growth_rates fastest_mode wave_rates predict_clusters jacobian_spectrum
    GatedFeedForward TiedAttention
""".split()


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


@pytest.mark.parametrize("name", SHOWN)
def test_examples_run(name):
    owned = (getattr(owner, name, None) for owner in OWNERS)
    value = next(v for v in owned if inspect.isclass(v) or inspect.isfunction(v))
    text = inspect.getdoc(value) or ""
    names = {"jax": jax, "jnp": jnp, "diffrax": diffrax, "jaxflow": jaxflow}
    examples = doctest.DocTestParser().get_doctest(text, names, name, None, 0)
    if examples.examples:
        result = doctest.DocTestRunner().run(examples)
        assert result.failed == 0
        return
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert blocks, f"{name} has no example"
    for block in blocks:
        exec(block, dict(names))
