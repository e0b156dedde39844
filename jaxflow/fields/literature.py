"""Fields of the literature on clustering that are near to attention.

MeanShift           X[mu](x) = E_{mu_x}[y] - x      mu_x = exp(-beta/2 |x - y|^2) mu / Z_x
BoundedConfidence   X[mu](x) = E_{mu_x}[y] - x      mu_x = mu where |x - y| <= radius
weighted_attention  X[mu](x) = P_x D E_{mu_x}[y]    mu_x by the scores beta <x, D y>
"""

import jax
import jax.numpy as jnp
import numpy as np

from .._rules import positive, real
from .._types import ArrayLike, Scalar, ScalarLike, accumulation_dtype, is_concrete
from ..geometry import AbstractGeometry, Euclidean, Sphere
from .attention import SelfAttention
from .base import AbstractDivergenceField
from .biased import L2
from .interactions import AbstractInteraction, Softmax, Tokens, weighted_sums


class MeanShift(AbstractDivergenceField):
    """Mean shift with a Gaussian kernel of bandwidth 1/sqrt(beta), on R^d.

        X[mu](x) = E_{mu_x}[y] - x,    mu_x(dy) proportional to exp(-beta/2 |x - y|^2) mu(dy)

    It is 1/beta times the gradient of the log of the density of mu smoothed by the kernel
    (Fukunaga and Hostetler 1975; Cheng 1995). A flow moves the data itself, which is blurring mean
    shift; `dt0=1` with `diffrax.Euler()` is its iteration. Probes x climb to the modes of data that
    stay where they are.

    **Arguments:** `beta`, positive; it may be traced.

    **Raises:** `ValueError` or `TypeError` for what is no positive number.

    ```python
    >>> mu = jaxflow.Measure(jnp.array([[-1.0], [1.0]]))
    >>> v = jaxflow.MeanShift(1.0)(0.0, jnp.array([[0.5]]), mu)  # tanh(x) - x
    >>> round(float(v[0, 0]), 4)
    -0.0379

    ```
    """

    beta: Scalar

    def __init__(self, beta: ScalarLike = 1.0):
        self.beta = real("beta", beta, "positive and finite", positive)

    def __call__(self, t, x, mu):
        return self._attention(t, x, mu) - x

    def divergence(self, t, x, mu):
        return self._attention.divergence(t, x, mu) - x.shape[1]

    @property
    def geometry(self) -> AbstractGeometry:  # pyright: ignore[reportIncompatibleVariableOverride]
        return Euclidean()

    @property
    def _attention(self):
        return SelfAttention(beta=self.beta, interaction=L2(), geometry=self.geometry)


class BoundedConfidence(AbstractDivergenceField):
    """Hegselmann and Krause's bounded confidence (J. Artif. Soc. Soc. Simul. 5(3), 2002), on R^d.

        X[mu](x) = E_{mu_x}[y] - x,    mu_x = mu restricted to |x - y| <= radius

    Each moves to the mean of those it trusts; who is alone stays. `dt0=1` with `diffrax.Euler()` is
    the published iteration, which stops after finitely many steps. X jumps where a distance passes
    the radius, and has the divergence -d elsewhere.

    **Arguments:** `radius`, positive; it may be traced.

    **Raises:** `ValueError` or `TypeError` for what is no positive number.

    ```python
    >>> mu = jaxflow.Measure(jnp.array([[0.0], [1.0], [5.0]]))
    >>> jaxflow.BoundedConfidence(2.0)(0.0, mu.points, mu)[:, 0].tolist()
    [0.5, -0.5, 0.0]

    ```
    """

    radius: Scalar

    def __init__(self, radius: ScalarLike = 1.0):
        self.radius = real("radius", radius, "positive and finite", positive)

    def __call__(self, t, x, mu):
        total, moment = self._trusted(x, mu)
        mean = moment / jnp.where(total > 0, total, 1)
        return jnp.where(total > 0, mean - x, 0)

    def divergence(self, t, x, mu):
        total, _ = self._trusted(x, mu)
        return jnp.where(total[:, 0] > 0, -x.shape[1], 0).astype(x.dtype)

    @property
    def geometry(self) -> AbstractGeometry:  # pyright: ignore[reportIncompatibleVariableOverride]
        return Euclidean()

    def _trusted(self, x, mu):
        """The mass within the radius, `(m, 1)`, and the sum of its points."""
        square = self.radius.astype(accumulation_dtype(x.dtype)) ** 2
        near = lambda x, y: (((y - x[None]) ** 2).sum(axis=1) <= square).astype(square.dtype)
        y = mu.points
        values = jnp.concatenate([jnp.ones_like(y[:, :1]), y], axis=1)
        tokens = Tokens(y, y, mu.log_weights, signs=mu.signs)
        sums = weighted_sums(jax.lax.stop_gradient(x), tokens, values, near)
        return sums[:, :1], sums[:, 1:]


def weighted_attention(
    matrix: ArrayLike,
    *,
    beta: ScalarLike = 1.0,
    interaction: AbstractInteraction = Softmax(),
    geometry: AbstractGeometry = Sphere(),
) -> SelfAttention:
    """Attention in which a symmetric matrix D is V and Q^T K (Burger et al., arXiv 2501.03096).

        X[mu](x) = P_x ( D E_{mu_x}[y] ),    mu_x by the scores beta <x, D y>

    With `Unnormalised()` it is the gradient flow of E[mu] = 1/(2 beta) int int e^{beta <x, D y>},
    `jaxflow.observables.InteractionEnergy` with `key=D`, and dE/dt = E|x'|^2; with `Softmax()`
    the same in another metric. A token at an eigenvector of D alone stays where it is.

    **Arguments:** `matrix`: D, shape `(d, d)`; the others as in `jaxflow.SelfAttention`.

    **Returns:** a `jaxflow.SelfAttention` with `key` and `value` D.

    **Raises:** `ValueError` where D is not symmetric, and as `jaxflow.SelfAttention`.

    ```python
    >>> field = jaxflow.fields.weighted_attention(jnp.diag(jnp.array([2.0, 1.0])))
    >>> mu = jaxflow.measure.from_angles([0.0, 0.0])  # the eigenvector of the largest eigenvalue
    >>> jnp.abs(field(0.0, mu.points, mu)).max().tolist()
    0.0

    ```
    """
    field = SelfAttention(
        key=matrix, value=matrix, beta=beta, interaction=interaction, geometry=geometry
    )
    if is_concrete(field.value):
        known = np.asarray(field.value, float)
        if abs(known - known.T).max() > 1e-6 * abs(known).max():
            raise ValueError(
                "D must be symmetric, so that the flow follows the gradient of its energy; the "
                f"entries differ from their mirror images by {abs(known - known.T).max():.3g}. For "
                "any matrices take SelfAttention(query=..., key=..., value=...)."
            )
    return field
