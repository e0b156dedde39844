"""Reductions of attention on the sphere to one equation, V = Q = K = I.

Equiangular   <x_i, x_j> = rho for all i != j stays so      arXiv 2312.10794, section 6
TwoTokens     the angle of two tokens                       arXiv 2312.10794, 2411.04990
OttAntonsen   Poisson kernels stay Poisson kernels          Ott and Antonsen 2008
"""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..._rules import check_real, count, flag, instance, known, real, reals
from ..._types import Scalar, ScalarLike
from ...fields import Softmax, Unnormalised
from .base import AbstractClosure


class Equiangular(AbstractClosure):
    """n tokens of the unit sphere with <x_i, x_j> = rho for all i != j.

        rho' = 2 c (1 - rho) ((n-1) rho + 1)
        c = 1 / (e^{beta (1 - rho)} + n - 1)  softmax,    c = e^{beta rho} / n  unnormalised

    c is the weight of another token (arXiv 2312.10794, section 6; 2512.01868, section 6.1).

    **Arguments:** `n`, at least 2; `beta`; `interaction`, `Softmax()` or `Unnormalised()`.

    **Raises:** `ValueError` or `TypeError` where these are none.
    """

    n: int = eqx.field(static=True)
    beta: Scalar
    interaction: Softmax | Unnormalised

    def __init__(self, n: int, beta: ScalarLike, interaction: Softmax | Unnormalised = Softmax()):
        self.n = count("n", n, 2)
        self.beta = real("beta", beta)
        kinds = (Softmax, Unnormalised)
        self.interaction = instance("interaction", interaction, kinds, "jaxflow.Softmax()")

    def __call__(self, z: Scalar) -> Scalar:
        beta = self.beta.astype(z.dtype)
        if isinstance(self.interaction, Softmax):
            weight = 1 / (jnp.exp(beta * (1 - z)) + self.n - 1)
        else:
            weight = jnp.exp(beta * z) / self.n
        return 2 * weight * (1 - z) * ((self.n - 1) * z + 1)

    def check(self, z: Any) -> None:
        least = -1 / (self.n - 1) - 1e-6
        rule = f"from {-1 / (self.n - 1):.6g} to 1, a common inner product of {self.n} tokens"
        check_real("z0", z, rule, lambda rho: least <= rho <= 1)


class TwoTokens(AbstractClosure):
    """Two tokens of the unit sphere, rho = <x_1, x_2>, under softmax attention.

        rho' = 2 c (1 - rho^2),  c = 1 / (e^{beta (1 - rho)} + 1);    causal: rho' = c (1 - rho^2)

    With a causal mask x_1 stays where it is (arXiv 2411.04990). At beta = 0,
    rho = tanh(t + artanh rho_0), causal tanh(t/2 + artanh rho_0).

    **Arguments:** `beta`; `causal`.

    **Raises:** `ValueError` or `TypeError` where these are none.
    """

    beta: Scalar
    causal: bool = eqx.field(static=True)

    def __init__(self, beta: ScalarLike, causal: bool = False):
        self.beta = real("beta", beta)
        self.causal = flag("causal", causal)

    def __call__(self, z: Scalar) -> Scalar:
        weight = 1 / (jnp.exp(self.beta.astype(z.dtype) * (1 - z)) + 1)
        return (1 if self.causal else 2) * weight * (1 - z**2)

    def check(self, z: Any) -> None:
        check_real("z0", z, "from -1 to 1, the cosine of an angle", lambda rho: -1 <= rho <= 1)


class OttAntonsen(AbstractClosure):
    """The order parameter of a Poisson kernel in k a, a the angle of a token on the circle.

        a' = c Im(e^{i alpha} z e^{-ika}),    z = E[e^{ika}]
        z' = (k c / 2) (e^{i alpha} z - e^{-i alpha} conj(z) z^2)

    (Ott and Antonsen, Low dimensional behavior of large systems of globally coupled oscillators,
    2008.) Attention at beta = 0 has k = 1, c = 1, with V the rotation by alpha; linear attention
    has k = 2 and c = beta / 2, for laws that are the same at x and -x.

    **Arguments:** `coupling`, c; `angle`, alpha in radians; `harmonic`, k, at least 1. The
    parameters z are (Re z, Im z), shape `(2,)`, with |z| < 1.

    **Raises:** `ValueError` or `TypeError` where these are none.
    """

    coupling: Scalar
    angle: Scalar
    harmonic: int = eqx.field(static=True)

    def __init__(self, coupling: ScalarLike = 1.0, angle: ScalarLike = 0.0, harmonic: int = 1):
        self.coupling = real("coupling", coupling)
        self.angle = real("angle", angle)
        self.harmonic = count("harmonic", harmonic)

    def __call__(self, z: Float[Array, "2"]) -> Float[Array, "2"]:
        angle = self.angle.astype(z.dtype)
        c, s = jnp.cos(angle), jnp.sin(angle)
        # w = e^{i alpha} z; conj(w) z^2 = e^{-i alpha} |z|^2 z
        gain, turn = c * (1 - (z**2).sum()), s * (1 + (z**2).sum())
        rate = self.harmonic * self.coupling.astype(z.dtype) / 2
        return rate * jnp.stack([gain * z[0] - turn * z[1], gain * z[1] + turn * z[0]])

    def check(self, z: Any) -> None:
        there = known(reals("z0", z))
        if np.shape(z) != (2,):
            raise ValueError(f"z0 must be (Re z, Im z), shape (2,); got shape {np.shape(z)}.")
        if there is not None and not (there**2).sum() < 1:
            raise ValueError(f"z0, an order parameter, must have |z| < 1; got {there}.")

    def log_density(self, z: Float[Array, "2"], x: Float[Array, "2"]) -> Float[Array, ""]:
        """log of the Poisson kernel with the order parameter z, at a point of the circle."""
        angle = self.harmonic * jnp.arctan2(x[1], x[0])
        square = (z**2).sum()
        along = z[0] * jnp.cos(angle) + z[1] * jnp.sin(angle)
        return jnp.log((1 - square) / (2 * jnp.pi * (1 - 2 * along + square)))
