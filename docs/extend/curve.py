"""A curve in time: a field that fades.

    X_t[mu] = e^{-t} X[mu]

Fact: the tokens are at t where those of X are at 1 - e^{-t}. For two tokens of the sphere at
beta = 0, rho = tanh(artanh(rho_0) + 1 - e^{-t}).
"""

import jax.numpy as jnp

import jaxflow as jf
from jaxflow.fields import AbstractCurve


class Fading(AbstractCurve):
    field: jf.AbstractField

    @property
    def breakpoints(self):  # the times at which parameters jump
        return ()

    def at(self, t):
        return jnp.exp(-t) * self.field


rho0, t = 0.3, 2.0
field, mu0 = jf.SelfAttention(beta=0.0), jf.measure.simplex(2, 2, rho=rho0)
x, y = jf.flow(jf.TimeDependent(Fading(field)), mu0, t1=t).last.points
assert abs(x @ y - jnp.tanh(jnp.arctanh(rho0) + 1 - jnp.exp(-t))) < 1e-4
