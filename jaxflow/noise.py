"""Noise beside the drift of a flow: dX_i = X_t[mu_t](X_i) dt + sqrt(2 / kappa) dW_i."""

from typing import cast

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from ._flow_input import Times
from ._rules import flag, instance, positive, prng_key, real
from ._types import Points, Scalar, ScalarLike, is_concrete
from .explicit import AbstractMethod, is_method
from .geometry import AbstractGeometry, Euclidean, Sphere
from .solvers import Geodesic

__all__ = [
    "Noise",
]


def __dir__() -> list[str]:
    return __all__


FOR_NOISE = (
    diffrax.Euler, diffrax.EulerHeun, diffrax.Heun, diffrax.Midpoint, diffrax.Ralston,
    diffrax.ReversibleHeun, diffrax.AbstractSRK,
)  # fmt: skip
# Those for noise that does not depend on the place; the last one averages its vector fields.
ON_FLAT_SPACE = diffrax.SEA, diffrax.SRA1, diffrax.ShARK, diffrax.ReversibleHeun


class Noise(eqx.Module):
    """Brownian motion of the tokens, at the inverse temperature kappa.

        dX_i = X_t[mu_t](X_i) dt + sqrt(2 / kappa) dW_i                on R^d
        dX_i = X_t[mu_t](X_i) dt + sqrt(2 / kappa) P_{X_i} o dW_i      on the sphere

    The law of many tokens then obeys d_t mu + div(mu X_t[mu]) = (1 / kappa) Lap mu, with the
    Laplacian of the geometry: on the sphere the projected noise, in the sense of Stratonovich, is
    its Brownian motion (Hsu, Stochastic Analysis on Manifolds, 2002, section 3.3). Each step is
    retracted, which keeps the sphere to rounding and gives Euler's method, otherwise one of Ito's,
    the same limit. A time that is saved between two steps is interpolated, and smoother than the
    path: save multiples of `dt0`.

    **Arguments:**

    - `kappa`: positive; 1 / kappa is the temperature. It may be traced.
    - `key`: a PRNG key. With the same `tolerance` it is the same path, whatever the step.
    - `common`: one Brownian motion for all tokens of a system instead of one for each.
    - `tolerance`: the time within which the path is interpolated, less than a step. `None` takes
      half of `dt0`.

    A step moves a token by about sqrt(2 d dt0 / kappa), which must be small against the radius of
    the sphere: dt0 well below kappa / (2 d).

    **Raises:** `ValueError` or `TypeError` for what is none of these.

    ```python
    >>> mu0 = jaxflow.measure.circle(1000)
    >>> noise = jaxflow.Noise(kappa=0.5, key=jax.random.key(0))
    >>> sol = jaxflow.flow(jaxflow.SelfAttention(beta=1.0), mu0, t1=1.0, dt0=0.1, noise=noise)
    >>> bool(jnp.abs(jnp.linalg.norm(sol.last.points, axis=1) - 1).max() < 1e-6)
    True

    ```
    """

    kappa: Scalar
    key: Array
    common: bool = eqx.field(static=True)
    tolerance: Scalar | None

    def __init__(
        self,
        kappa: ScalarLike,
        *,
        key: Array,
        common: bool = False,
        tolerance: ScalarLike | None = None,
    ):
        self.kappa = real("kappa", kappa, "positive and finite", positive)
        self.key = prng_key(key)
        self.common = flag("common", common)
        self.tolerance = (
            None
            if tolerance is None
            else real("tolerance", tolerance, "positive and finite", positive)
        )

    def term(self, times: Times, y0: Points, solver: diffrax.AbstractSolver, geometry):
        """sqrt(2 / kappa) dW as a term of diffrax's."""
        tolerance = self.tolerance
        if tolerance is None:
            assert times.dt0 is not None
            tolerance = times.dt0 / 2
        shape = (*y0.shape[:-2], 1, y0.shape[-1]) if self.common else y0.shape
        path = diffrax.VirtualBrownianTree(
            times.t0,
            times.t1,
            tolerance.astype(times.t0.dtype),
            jax.ShapeDtypeStruct(shape, y0.dtype),
            self.key,
            levy_area=_levy_area(solver),
        )
        return _Diffusion(path, jnp.sqrt(2 / self.kappa).astype(y0.dtype), geometry)


class _Diffusion(diffrax.AbstractTerm):
    """sqrt(2 / kappa) P_x dW. Its vector field is the place x where increments are projected, or
    on R^d, where nothing is, their size."""

    path: diffrax.AbstractPath
    size: Scalar
    geometry: AbstractGeometry

    def vf(self, t, y, args) -> Points:
        if isinstance(self.geometry, Euclidean):
            return jnp.broadcast_to(self.size, y.shape)
        return self.geometry.retract(y)

    def contr(self, t0, t1, **kwargs):
        return self.path.evaluate(t0, t1, **kwargs)

    def prod(self, vf, control) -> Points:
        control = jnp.broadcast_to(control, vf.shape)
        if isinstance(self.geometry, Euclidean):
            return vf * control
        return self.size * self.geometry.project(vf, control)


def noisy_solver(
    noise: Noise,
    solver: diffrax.AbstractSolver,
    geometry: AbstractGeometry,
    dt0: ScalarLike | None,
) -> diffrax.AbstractSolver:
    """The method for a flow with noise; Tsit5, the default of flows without, stands for Heun's
    along geodesics.

    **Raises:** `ValueError` where noise, geometry and method do not go together.
    """
    instance("noise", noise, Noise, "jaxflow.Noise(kappa=1.0, key=jax.random.key(0))")
    fine = noise.tolerance
    if fine is not None and dt0 is not None and is_concrete(fine, dt0) and not fine < dt0:
        raise ValueError(f"the tolerance of a path must be below a step, dt0={dt0}; got {fine}.")
    name = type(solver).__name__
    if not isinstance(geometry, Euclidean | Sphere):
        raise ValueError(
            f"noise is for R^d and for spheres, and the field lives on {geometry}: give the field "
            "another geometry, or leave noise out."
        )
    if solver == diffrax.Tsit5():
        return Geodesic(diffrax.Heun())
    if is_method(solver, Geodesic):
        return solver
    if is_method(solver, AbstractMethod) or not isinstance(solver, FOR_NOISE):
        raise ValueError(
            f"{name} is no method for noise: pass diffrax.Heun(), diffrax.Euler(), diffrax.SPaRK() "
            "or, on R^d, diffrax.ShARK()."
        )
    if isinstance(solver, ON_FLAT_SPACE) and isinstance(geometry, Sphere):
        raise ValueError(
            f"{name} is for noise that does not depend on the place, and on a sphere noise is "
            "projected there: pass diffrax.Heun(), diffrax.Euler() or diffrax.SPaRK()."
        )
    return solver


def _levy_area(solver) -> type:
    """What a method asks of a path beside its increments."""
    if isinstance(solver, diffrax.AbstractSRK):
        wanted = cast(diffrax.AbstractSRK, solver).minimal_levy_area
        kinds = diffrax.SpaceTimeLevyArea, diffrax.SpaceTimeTimeLevyArea
        return next((kind for kind in kinds if issubclass(kind, wanted)), diffrax.BrownianIncrement)
    return diffrax.BrownianIncrement
