"""How fast a law departs from the uniform one, mode by mode.

    d_t rho + div(rho X[rho]) = (1/kappa) Laplace rho,    rho = 1 + epsilon h,    h' = lambda h

About the uniform law, where X moves nothing, h' = -div X'[h] with X'[h] the derivative of
X[(1 + epsilon h) sigma] at epsilon = 0. A field that knows no place and no direction maps modes to
their gradients, X'[h] = a grad h with one number a for an eigenspace of the Laplacian, and

    lambda = a l,    l = k (k+d-2) on the unit sphere, |xi|^2 on R^d    (-Laplace h = l h)

The measure is a quadrature rule, h a tangent of its log-weights, and X'[h] one Jacobian-vector
product, asked at a few points x. The mode is P_k(<e, y>), with P_k the Gegenbauer polynomial, so
that of y only its coordinates in the plane of e and x count: a Gauss rule in each, 2 nodes^2
points in any dimension, is exact for polynomials of degree below 2 nodes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .._rules import array, count, positive, real
from .._types import ArrayLike, Scalar, ScalarLike, error_where, is_concrete
from ..fields import AbstractField, Sinkhorn
from ..fields.base import all_fields, is_field, tells_apart
from ..geometry import Euclidean, Sphere
from ..measure import Measure


class Mode(NamedTuple):
    """The fastest mode off the uniform law: its `degree`, and the `rate` at which it grows."""

    degree: Int[Array, ""]
    rate: Scalar


def growth_rates(
    field: AbstractField,
    degrees: int | Sequence[int],
    d: int,
    *,
    kappa: ScalarLike | None = None,
    t: ScalarLike = 0.0,
    nodes: int | None = None,
) -> Float[Array, "*degrees"]:
    """The rates at which modes grow off the uniform law of the sphere, by linear response.

        rho = 1 + epsilon h,    h' = lambda_k h    for a spherical harmonic h of degree k

    For V = Q = K = I (arXiv 2312.10794, 2410.23228), with the modified Bessel functions I,

        softmax       lambda_k = k (k+d-2) / beta  I_{k+d/2-1}(beta) / I_{d/2-1}(beta)
        unnormalised  the same times  Gamma(d/2) (2/beta)^{d/2-1} I_{d/2-1}(beta)
        noise         lambda_k - k (k+d-2) / (kappa R^2) on the sphere of radius R

    and here any field on the sphere that knows no direction, whatever its interaction. On the
    circle k = 1, 2, ... are the Fourier modes.

    **Arguments:**

    - `field`: X, on a sphere; parameters may be traced, and rates differentiated in them.
    - `degrees`: k >= 1, one or a sequence.
    - `d`: the dimension of a token, at least 2.
    - `kappa`: the inverse strength of the noise dW sqrt(2/kappa); `None` is none.
    - `t`: the time at which a field in time is asked.
    - `nodes`: of the Gauss rule in each coordinate, which must resolve k and beta: rates are then
      exact to rounding. Default 256 for d = 2, else 64. A `Sinkhorn` interaction compares all
      tokens with all others and has a rule of the whole sphere, 2 nodes^{d-1} points, with the
      default 64 for d = 2, else 16.

    **Returns:** rates per unit of time, of the shape of `degrees`.

    **Raises:** `ValueError` where the field is no field on a sphere, asks for an order of tokens,
    moves the uniform law, or prefers a direction (under `jit` the run-time error of
    `equinox.error_if`), and for other bad input; `TypeError` for what is of another kind.

    ```python
    >>> rates = jaxflow.growth_rates(jaxflow.SelfAttention(beta=5.0), [1, 2, 3, 4], 2)
    >>> (1000 * rates).round().tolist()  # the third is the fastest: three clusters
    [179.0, 514.0, 683.0, 600.0]

    ```
    """
    geometry = _checked(field).geometry
    if not isinstance(geometry, Sphere):
        raise ValueError(
            f"growth_rates takes a field on a sphere, got one on {geometry}: pass "
            "geometry=jaxflow.Sphere(), or call jaxflow.stability.wave_rates for R^d."
        )
    d = count("d", d, 2)
    k = np.asarray(degrees)
    for degree in k.ravel().tolist():
        count("a degree", degree)
    whole = any(isinstance(getattr(f, "interaction", None), Sinkhorn) for f in all_fields(field))
    default = (64 if whole else 256) if d == 2 else (16 if whole else 64)
    nodes = count("nodes", default if nodes is None else nodes, 2)
    points, weights = sphere_rule(d, nodes, d - 1 if whole else 2)
    # The first two degrees too: few interactions move neither, and they set a scale.
    every = [1, 2, *k.ravel().tolist()]
    modes = [gegenbauer(j, d, points[:, 0]) for j in every]
    slopes = [_slope(j, d, ANGLES) for j in every]
    time = jnp.asarray(t, float)
    parts = map(_f, (points, weights, modes, slopes))
    a = _refused(*_sphere_response(field, time, *parts))[2:]
    square = jnp.asarray(geometry.radius, a.dtype) ** 2
    eigenvalues = _f(np.asarray(k * (k + d - 2.0))) / square
    rates = eigenvalues * a.reshape(k.shape)
    return rates if kappa is None else rates - eigenvalues / _strength(kappa)


def fastest_mode(
    field: AbstractField,
    d: int,
    *,
    most: int = 32,
    kappa: ScalarLike | None = None,
    t: ScalarLike = 0.0,
    nodes: int | None = None,
) -> Mode:
    """The mode of the sphere that grows fastest off the uniform law, of degree up to `most`.

    On the circle its degree is the number of clusters into which the uniform law breaks, near
    sqrt(2 beta) for softmax attention (arXiv 2410.23228); `jaxflow.predict_clusters` says
    where. If its rate is negative the uniform law is stable.

    **Arguments:** `field`, `d`, `kappa`, `t`, `nodes`: as in `jaxflow.growth_rates`.

    **Returns:** a `jaxflow.stability.Mode`: `degree` and `rate`.

    **Raises:** as `jaxflow.growth_rates`; `ValueError` where the fastest is the last, `most`.

    ```python
    >>> mode = jaxflow.fastest_mode(jaxflow.SelfAttention(beta=7.0), 2)
    >>> int(mode.degree), round(float(mode.rate), 3)
    (4, 0.691)

    ```
    """
    most = count("most", most, 2)
    rates = growth_rates(field, range(1, most + 1), d, kappa=kappa, t=t, nodes=nodes)
    best = rates.argmax()
    late = (
        f"of the modes up to most={most} the last grows fastest, so that a higher one may be "
        f"faster still: pass most={2 * most}."
    )
    rates = _refuse(best == most - 1, rates, late)
    return Mode(best + 1, rates[best])


def wave_rates(
    field: AbstractField,
    wavenumbers: ArrayLike | ScalarLike,
    d: int = 1,
    *,
    reach: float,
    kappa: ScalarLike | None = None,
    t: ScalarLike = 0.0,
    nodes: int = 128,
) -> Float[Array, "*wavenumbers"]:
    """The rates at which plane waves grow off the uniform density of R^d.

        rho = 1 + epsilon cos <xi, x>,    lambda = -div X'[cos <xi, .>](0) - |xi|^2 / kappa

    It makes sense for fields that know neither a place nor a direction: `jaxflow.MeanShift`,
    for which it is |xi|^2 / beta e^{-|xi|^2 / 2 beta}, fastest at |xi| = sqrt(2 beta), and
    `jaxflow.BoundedConfidence`. A torus has the wavenumbers 2 pi k / L.

    **Arguments:**

    - `field`, `kappa`, `t`: as in `jaxflow.growth_rates`, the field on R^d.
    - `wavenumbers`: |xi|, of any shape; may be traced.
    - `d`: the dimension.
    - `reach`: the half side of the cube around a token that holds all the tokens that move it,
      such as 9 / sqrt(beta) for a Gaussian kernel, or the radius of confidence.
    - `nodes`: of the midpoint rule along each side of the cube, nodes^d in all. It converges
      faster than any power for smooth kernels, and as 1/nodes^2 for one that ends at the cube.

    **Returns:** rates per unit of time, of the shape of `wavenumbers`.

    **Raises:** `ValueError` or `TypeError` as `jaxflow.growth_rates` does.

    ```python
    >>> rate = jaxflow.stability.wave_rates(jaxflow.MeanShift(2.0), 2.0, reach=6.0)
    >>> round(float(rate), 4)  # 2 / e
    0.7358

    ```
    """
    if not isinstance(_checked(field).geometry, Euclidean):
        raise ValueError(
            f"wave_rates takes a field on R^d, got one on {field.geometry}: call "
            "jaxflow.growth_rates for the sphere."
        )
    d, nodes = count("d", d), count("nodes", nodes, 2)
    side = real("reach", reach, "positive and finite", positive).astype(float)
    xi = jnp.asarray(array("wavenumbers", wavenumbers), float)
    axis = (2 * np.arange(nodes) + 1) / nodes - 1
    cube = np.stack([a.ravel() for a in np.meshgrid(*[axis] * d, indexing="ij")], axis=1)
    found = _wave_response(field, jnp.asarray(t, float), side * _f(cube), xi.reshape(-1))
    rates = _refused(*found).reshape(xi.shape)
    return rates if kappa is None else rates - xi**2 / _strength(kappa)


# ------------------------------------------------------------------ linear response

# Of the points x at which X'[h] is compared with grad h, to the axis of h: no mode has its nodes
# at all of them. Mirror images follow.
ANGLES = np.pi * ((np.arange(1, 9) * (np.sqrt(5) - 1) / 2) % 1)


def _response(field, t, x, points, log_weights, modes):
    """X at the uniform law, and X'[h] for each mode h."""
    there = lambda logs: field(t, x, Measure(points, logs))
    push = lambda h: jax.jvp(there, (log_weights,), (h,))
    return jax.vmap(push, out_axes=(None, 0))(modes)


@eqx.filter_jit
def _sphere_response(field, t, points, weights, modes, slopes):
    """The numbers a of X'[h] = a grad h, one a mode; slopes are those of h at the angles.

    In the plane a field may turn as well: X'[h] = a h' + b h, the second even in the angle.
    """
    d, radius = points.shape[1], jnp.asarray(field.geometry.radius, points.dtype)
    angles = np.concatenate([ANGLES, -ANGLES])
    plane = lambda *coordinates: _f(np.pad(np.stack(coordinates, axis=1), ((0, 0), (0, d - 2))))
    x, along = plane(np.cos(angles), np.sin(angles)), plane(-np.sin(angles), np.cos(angles))
    still, moved = _response(field, t, radius * x, radius * points, jnp.log(weights), modes)
    still = still[None]
    turning, growing = ((v * along[None]).sum(axis=-1) for v in (still, moved))
    across = [
        v - v_along[..., None] * along[None] for v, v_along in ((still, turning), (moved, growing))
    ]
    odd = (growing[:, : len(ANGLES)] - growing[:, len(ANGLES) :]) / 2
    a = (odd * slopes).sum(axis=1) / (slopes**2).sum(axis=1)
    slack = _slack(odd)
    moves = _any(slack, turning - turning[:, :1], across[0])
    return radius * a, moves, _any(slack, odd - a[:, None] * slopes, across[1])


@eqx.filter_jit
def _wave_response(field, t, cube, xi):
    """<xi, X'[sin <xi, . - x>](x)>, which is lambda, at x = 0 and at another place."""
    modes = jnp.sin(xi[:, None] * cube[None, :, 0])
    logs = jnp.zeros(len(cube), cube.dtype)
    shift = jnp.stack([jnp.zeros_like(cube[0]), jnp.full_like(cube[0], cube.max() / np.pi)])
    around = lambda x: _response(field, t, x[None], x[None] + cube, logs, modes)
    still, moved = jax.vmap(around)(shift)
    rates = xi[None] * moved[:, :, 0, 0]
    slack = _slack(moved)
    return rates[0], _any(slack, still), _any(slack, moved[1] - moved[0])


NOT_AT_REST = (
    "the field moves the uniform law, so there are no modes about it. Pass a field that knows no "
    "place and no direction, or more nodes, to resolve it."
)
NOT_A_MODE = (
    "one rate belongs to all modes of one degree only under a field that knows no direction, such "
    "as attention with multiples of the identity for V and Q^T K, and where nodes resolve them. "
    "Pass such a field, more nodes, or float64 where d is some hundreds."
)


def _refused(rates, moves, mixes):
    """The rates of a field that neither moves the uniform law nor mixes modes of it."""
    return _refuse(mixes, _refuse(moves, rates, NOT_AT_REST), NOT_A_MODE)


def _refuse(wrong, rates, message: str):
    if not is_concrete(wrong):
        return error_where(wrong, rates, message)
    if wrong:
        raise ValueError(message)
    return rates


def _slack(values):
    """What rounding may leave, of sums that cancel in high dimensions: a third of all digits."""
    return jnp.cbrt(jnp.finfo(values.dtype).eps) * jnp.maximum(jnp.abs(values).max(), 1e-6)


def _any(slack, *values):
    return jnp.stack([jnp.abs(v).max() for v in values]).max() > slack


def _strength(kappa: ScalarLike) -> Scalar:
    return real("kappa", kappa, "positive and finite", positive).astype(float)


def _checked(field: AbstractField) -> AbstractField:
    if ordered := tells_apart(is_field(field)):
        raise ValueError(
            f"{ordered} asks in which order tokens come, and the uniform law has none: pass a "
            "field without it."
        )
    return field


# ------------------------------------------------------------------ rules and polynomials


def gegenbauer(k: int, d: int, s: np.ndarray) -> np.ndarray:
    """P_k(s), the zonal harmonic of degree k of S^{d-1}, with P_k(1) = 1.

    (k + d - 2) P_{k+1} = (2k + d - 2) s P_k - k P_{k-1}:  cos(k arccos s) on the circle, Legendre's
    polynomials on S^2.
    """
    before, now = np.ones_like(s), s
    for j in range(1, k):
        before, now = now, ((2 * j + d - 2) * s * now - j * before) / (j + d - 2)
    return now if k else before


def _slope(k: int, d: int, angle: np.ndarray) -> np.ndarray:
    """d/da P_k(cos a), by (1 - s^2) P_k' = k (P_{k-1} - s P_k)."""
    s = np.cos(angle)
    return -k * (gegenbauer(k - 1, d, s) - s * gegenbauer(k, d, s)) / np.sin(angle)


def sphere_rule(d: int, nodes: int, axes: int) -> tuple[np.ndarray, np.ndarray]:
    """Points `(n, d)` and weights of the uniform law of S^{d-1}, exact for polynomials of degree
    below 2 nodes in the first `axes` coordinates: n = 2 nodes^axes, and all with axes = d - 1.

    A point is (s, sqrt(1 - s^2) u), s by its Gauss rule, u by a rule of S^{d-2}.
    """
    if d == 1 or axes == 0:
        return np.outer([-1.0, 1.0], np.eye(d)[0]), np.full(2, 0.5)
    (s, w), (u, v) = _heights(d, nodes), sphere_rule(d - 1, nodes, axes - 1)
    rest = np.kron(np.sqrt(1 - s**2)[:, None], u)
    return np.concatenate([np.repeat(s, len(u))[:, None], rest], axis=1), np.outer(w, v).ravel()


def _heights(d: int, nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """The Gauss rule of s = <e, y> under the uniform law of S^{d-1}.

    The density of s is (1 - s^2)^{(d-3)/2} up to a factor. Nodes are eigenvalues of the Jacobi
    matrix of the recurrence above, weights squares of first components of its eigenvectors
    (Golub and Welsch 1969).
    """
    j = np.arange(1.0, nodes)
    square = j * (j + d - 3) / ((2 * j + d - 2) * np.maximum(2 * j + d - 4, 1))
    square[0] = 1 / d
    s, vectors = np.linalg.eigh(np.diag(np.sqrt(square), 1), UPLO="U")
    return np.clip(s, -1, 1), vectors[0] ** 2


def _f(a: np.ndarray | list) -> Array:
    return jnp.asarray(np.asarray(a), float)
