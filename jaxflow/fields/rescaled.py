"""The dynamics of attention in R^d in coordinates that grow with it, as a curve in time.

With z = e^{-tV} x, and V constant in time, x' = V E_{mu_x}[y] becomes

    z' = V ( E_{nu_z}[y] - z ),    nu_z the law of the scores beta <Q e^{tV} z, K e^{tV} y>

for any interaction that weighs values linearly, since e^{-tV} commutes with V and with the mean.
"""

import equinox as eqx
import jax.numpy as jnp
from jax.scipy.linalg import expm

from .._rules import instance
from ..geometry import Euclidean
from .attention import SelfAttention
from .base import Sum, apply
from .curves import AbstractCurve, as_time
from .feedforward import LinearDrift


class Rescaled(AbstractCurve):
    """Attention in R^d in the variable z = e^{-tV} x (Geshkovski et al., arXiv 2305.05465).

        z' = V ( E_{nu_z}[y] - z ),    nu_z(dy) proportional to exp(beta <Q e^{tV} z, K e^{tV} y>)

    Tokens x that move by `attention` move by `TimeDependent(Rescaled(attention))` as z, from the
    same points at t = 0. Softmax attention alone grows like e^{t lambda}, lambda the eigenvalues of
    V; the rescaled tokens stay bounded, and settle at the corners of a polytope or on planes.

    **Arguments:** `attention`, a `jaxflow.SelfAttention` on `Euclidean()` whose `query`, `key`
    and `value` are matrices or `None`.

    **Raises:** `ValueError` for another geometry, and for maps that are no matrices; `TypeError`
    for another field.

    ```python
    >>> mu0 = jaxflow.measure.gaussian(6, 2, key=jax.random.key(0))
    >>> attention = jaxflow.SelfAttention(geometry=jaxflow.Euclidean())
    >>> x = jaxflow.flow(attention, mu0, t1=1.0).last.points
    >>> rescaled = jaxflow.TimeDependent(jaxflow.Rescaled(attention))
    >>> z = jaxflow.flow(rescaled, mu0, t1=1.0).last.points
    >>> bool(jnp.abs(jnp.exp(-1.0) * x - z).max() < 1e-4)
    True

    ```
    """

    attention: SelfAttention

    def __check_init__(self):
        instance("attention", self.attention, SelfAttention, "jaxflow.SelfAttention()")
        if not isinstance(self.attention.geometry, Euclidean):
            raise ValueError(
                "z = e^{-tV} x rescales the tokens of R^d, got attention on "
                f"{self.attention.geometry}: pass geometry=jaxflow.Euclidean()."
            )
        if any(map(callable, self.attention.maps)):
            raise ValueError(
                "z = e^{-tV} x takes query, key and value that are matrices or None, got functions."
            )

    @property
    def breakpoints(self):
        return ()

    def at(self, t):
        field = self.attention
        query, key, value = field.maps
        assert not (callable(query) or callable(key) or callable(value))
        drift = LinearDrift(-1.0 if value is None else -value)
        if value is None:  # both scaled by e^t, and with them each score by e^{2t}
            growth = jnp.exp(2 * as_time(t)).astype(field.beta.dtype)
            return Sum((eqx.tree_at(lambda f: f.beta, field, growth * field.beta), drift))
        grow = expm(as_time(t).astype(value.dtype) * value)
        both = (grow if a is None else apply(grow.T, a) for a in (query, key))
        grown = eqx.tree_at(
            lambda f: (f.query, f.key), field, tuple(both), is_leaf=lambda a: a is None
        )
        return Sum((grown, drift))
