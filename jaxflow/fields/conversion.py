"""From one curve to another: a model changes its depth so without being trained again."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array

from .._rules import count, instance
from .._types import ArrayLike
from .curves import AbstractCurve, AbstractLinearCurve, PiecewiseConstant, increasing


def sample(curve: AbstractCurve, ts: ArrayLike) -> PiecewiseConstant:
    """The layers of a curve: its parameters in the middle of each piece between the edges `ts`.

    **Arguments:** `curve`, any curve; `ts`, the increasing edges of the L layers, shape `(L + 1,)`.

    **Returns:** a `jaxflow.PiecewiseConstant` of L fields.

    **Raises:** `ValueError` for fewer than two edges, or edges that do not increase; `TypeError`
    for what is no curve, and for traced edges.
    """
    _check_curve("curve", curve)
    edges = increasing(ts)
    if len(edges) < 2:
        raise ValueError(f"a layer lies between two edges, got {len(edges)} in ts.")
    middles = [(a + b) / 2 for a, b in zip(edges, edges[1:], strict=False)]
    return PiecewiseConstant([curve.at(t) for t in middles], edges)


def fit(
    curve: AbstractCurve,
    like: AbstractLinearCurve,
    *,
    t0: float = 0.0,
    t1: float,
    samples: int = 1024,
    at: ArrayLike | None = None,
) -> Any:
    """The curve of the kind of `like` that is nearest to another one on [t0, t1], by least squares.

        minimise  sum_i |sum_k w_k(t_i) theta_k - curve(t_i)|^2   over theta_k

    **Arguments:**

    - `curve`: what to approximate.
    - `like`: a linear curve over fields of the same structure; its coefficients are replaced.
    - `t0`, `t1`: the interval, t0 < t1; `samples`: the number of its midpoints that are compared.
    - `at`: the times t_i that are compared in their place, such as those at which a method reads
      the parameters.

    **Returns:** a curve like `like`.

    **Raises:** `ValueError` for fields of another structure, an empty interval, or times that do
    not increase; `TypeError` for a `like` that is not linear in its coefficients.
    """
    _check_curve("curve", curve)
    instance("like", like, AbstractLinearCurve, "jaxflow.Legendre(fields, t0, t1)")
    times = _midpoints(t0, t1, samples) if at is None else jnp.asarray(increasing(at), float)
    solve = jnp.linalg.pinv(jax.vmap(like.weights)(times))

    def add(total, sample):
        t, column = sample
        outer = lambda a: jnp.tensordot(column.astype(a.dtype), a, 0, precision="highest")
        return jax.tree.map(lambda s, v: s + outer(v), total, _arrays(curve, t)), None

    shapes = eqx.filter_eval_shape(lambda: _arrays(curve, times[0]))
    old, rest = eqx.partition(like.coefficients, eqx.is_inexact_array)
    zero = jax.tree.map(lambda a: jnp.zeros((len(solve), *a.shape), a.dtype), shapes)
    if jax.tree.map(jnp.shape, zero) != jax.tree.map(jnp.shape, old):
        raise ValueError("`like` must be a curve over fields of the structure of `curve`'s.")
    new, _ = jax.lax.scan(add, zero, (times, solve.T))
    return eqx.tree_at(lambda c: c.coefficients, like, eqx.combine(new, rest))


def relative_distance(
    a: AbstractCurve, b: AbstractCurve, *, t0: float = 0.0, t1: float, samples: int = 256
) -> Array:
    """(int |a(t) - b(t)|^2 dt / int |a(t)|^2 dt)^{1/2} on [t0, t1]: what a conversion lost.

    **Arguments:** `a`, `b`, curves over fields of one structure; `t0`, `t1`, the interval, t0 < t1;
    `samples`, the number of its midpoints that are compared.

    **Returns:** a scalar.

    **Raises:** `ValueError` for fields of another structure, or an empty interval; `TypeError` for
    what is no curve.
    """
    _check_curve("a", a)
    _check_curve("b", b)
    times = _midpoints(t0, t1, samples)

    def squares(t):
        one, other = (jtu.tree_leaves(_arrays(c, t)) for c in (a, b))
        if [x.shape for x in one] != [y.shape for y in other]:
            raise ValueError("the two curves must be over fields of one structure.")
        pairs = list(zip(one, other, strict=True))
        return sum(jnp.sum((x - y) ** 2) for x, y in pairs), sum(jnp.sum(x**2) for x, _ in pairs)

    gap, size = jax.lax.map(squares, times)
    return jnp.sqrt(gap.sum() / size.sum())


def _arrays(curve: AbstractCurve, t: Any):
    return eqx.filter(curve.at(t), eqx.is_inexact_array)


def _check_curve(name: str, curve: Any):
    instance(name, curve, AbstractCurve, "jaxflow.PiecewiseConstant(fields, ts)")


def _midpoints(t0: float, t1: float, samples: int) -> Array:
    start, end = increasing([t0, t1])
    edges = jnp.linspace(start, end, count("samples", samples) + 1)
    return (edges[1:] + edges[:-1]) / 2
