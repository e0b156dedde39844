"""The spectrum of the particle system at a configuration of its tokens.

    x_i' = X[mu](x_i),    J v = P D_v X    for tangent vectors v = (v_1, ..., v_n)

D_v X is the derivative when all tokens move along v, so of how mu moves with them too; P projects
it on the tangent space. At an equilibrium the eigenvalues of J are the rates of the linear flow,
and elsewhere those of its symmetric part bound the growth of |v| at that moment.
"""

from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float

from .._rules import count, flag
from .._types import ScalarLike
from ..fields import AbstractField, token_velocities
from ..fields.base import is_field
from ..geometry import AbstractGeometry
from ..measure import Measure, check_measure


def jacobian_spectrum(
    field: AbstractField,
    mu: Measure,
    *,
    t: ScalarLike = 0.0,
    symmetric: bool = False,
    leading: int | None = None,
) -> Complex[Array, " k"] | Float[Array, " k"]:
    """The eigenvalues of the Jacobian of all tokens together, by descending real part.

        J v = P D_v X,    v a tangent vector of n tokens

    At an equilibrium they are its rates, and the Lyapunov exponents from there are their real
    parts; along a flow see `jaxflow.lyapunov_exponents`.

    **Arguments:**

    - `field`, `t`: X and the time at which it is asked.
    - `mu`: one system of points `(n, d)` on the field's geometry.
    - `symmetric`: of the symmetric part (J + J^T)/2 in the inner product of the geometry instead:
      they are real, and |v| grows at most at the rate of the first.
    - `leading`: only that many, by Arnoldi's method (ARPACK), which needs products J v alone:
      O(n) memory. It runs on the host, so neither under `jit` nor `grad`. `None` is all n times
      the dimension of the geometry, from a matrix of that size.

    **Returns:** complex numbers, or real ones of the symmetric part, shape `(k,)`.

    **Raises:** `ValueError` for several systems and more eigenvalues than there are, `TypeError`
    for what is no field or no measure.

    ```python
    >>> poles = jaxflow.Measure(jnp.array([[0.0, 1.0], [0.0, -1.0]]))  # at rest, but not for long
    >>> rates = jaxflow.jacobian_spectrum(jaxflow.SelfAttention(beta=1.0), poles)
    >>> round(float(rates[0].real), 4)  # 2 / (1 + e^2)
    0.2384

    ```
    """
    is_field(field)
    check_measure("mu", mu)
    if mu.points.ndim != 2:
        raise ValueError(
            "jacobian_spectrum takes one system of points (n, d), got shape "
            f"{mu.points.shape}: jax.vmap it over several."
        )
    symmetric = flag("symmetric", symmetric)
    time = jnp.asarray(t, mu.points.dtype)
    if leading is None:
        return _all(field, mu, time, symmetric)
    # What Arnoldi's method can tell apart.
    most = mu.n * (mu.d - len(field.geometry.normals(mu.points))) - 2
    if count("leading", leading) > most:
        raise ValueError(
            f"Arnoldi's method finds up to {most} eigenvalues of {mu.n} tokens in R^{mu.d}, got "
            f"leading={leading}: pass leading=None for all."
        )
    return _leading(field, mu, time, symmetric, leading)


@eqx.filter_jit
def _all(field, mu, t, symmetric):
    push, start = _pushed(field, mu, t)
    columns = jax.vmap(push)(jnp.eye(start.size, dtype=start.dtype).reshape(-1, *start.shape))
    J = columns.reshape(start.size, start.size).T
    if symmetric:
        return jnp.linalg.eigvalsh((J + J.T) / 2)[::-1]
    values = jnp.linalg.eigvals(J)
    return values[jnp.argsort(-values.real)]


def _leading(field, mu, t, symmetric, k):
    from scipy.sparse.linalg import LinearOperator, eigs, eigsh  # not where a module loads

    shape = eqx.filter_eval_shape(_pushed, field, mu, t)[1].shape
    size = int(np.prod(shape))
    product = _symmetric_product if symmetric else _product
    apply = lambda c: np.asarray(product(field, mu, t, jnp.asarray(c.reshape(shape)))).ravel()
    operator = cast(Any, LinearOperator)((size, size), apply, dtype=mu.points.dtype)
    start = np.cos(np.arange(1.0, size + 1)).astype(mu.points.dtype)  # the same each time
    solve: Any = eigsh if symmetric else eigs
    which = "LA" if symmetric else "LR"
    values = solve(operator, k, which=which, v0=start, return_eigenvectors=False)
    return jnp.asarray(values[np.argsort(-values.real, kind="stable")])


@eqx.filter_jit
def _product(field, mu, t, c):
    return _pushed(field, mu, t)[0](c)


@eqx.filter_jit
def _symmetric_product(field, mu, t, c):
    push, start = _pushed(field, mu, t)
    (pulled,) = jax.linear_transpose(push, start)(c)
    return (push(c) + pulled) / 2


def _pushed(field, mu, t):
    """J in orthonormal coordinates of the tangent spaces, `(n, dim)`, and zero coordinates."""
    geometry, x = field.geometry, mu.points

    def move(y):
        return token_velocities(
            field, t, eqx.tree_at(lambda mu: mu.points, mu, geometry.retract(y))
        )

    basis = jax.vmap(lambda x: _tangent_basis(geometry, x))(x)
    _, push = jax.linearize(move, x)

    def product(c):
        moved = geometry.project(x, push((c[:, :, None] * basis).sum(axis=1)))
        return geometry.inner(basis, jnp.broadcast_to(moved[:, None], basis.shape))

    return product, jnp.zeros(basis.shape[:2], x.dtype)


def _tangent_basis(geometry: AbstractGeometry, x: Float[Array, " d"]) -> Float[Array, "dim d"]:
    """Vectors of the tangent space at x, orthonormal in the inner product of the geometry."""
    normals = geometry.normals(x)
    if not normals:
        return jnp.eye(len(x), dtype=x.dtype)
    # <normal, v> = 0 is orthogonality in R^d to these.
    covectors = jnp.stack([jax.grad(lambda v, u=u: geometry.inner(u, v))(x) for u in normals])
    basis = jnp.linalg.qr(covectors.T, mode="complete")[0].T[len(normals) :]
    gram = jax.vmap(lambda u: jax.vmap(lambda v: geometry.inner(u, v))(basis))(basis)
    return jax.scipy.linalg.solve_triangular(jnp.linalg.cholesky(gram), basis, lower=True)
