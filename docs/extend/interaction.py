"""An interaction: a query weighs each token by the square of its score.

    mu_x(dy) = s(x, y)^2 mu(dy),    s(x, y) = beta <Q x, K y>

Fact: two tokens of the sphere with rho = <x_1, x_2> obey rho' = rho^2 (1 - rho^2) at beta = 1, so
that artanh(rho) - 1/rho grows by t.
"""

import jax.numpy as jnp

import jaxflow as jf
from jaxflow.fields import AbstractInteraction, weighted_sums


class Quadratic(AbstractInteraction):
    def expectation(self, q, tokens, values, scale):
        return weighted_sums(q, tokens, values, lambda q, keys: (scale * (keys @ q)) ** 2)

    def trace(self, q, tokens, values, slopes, scale):  # of its derivative in x, for divergences
        pulls = (values * slopes).sum(axis=1, keepdims=True)
        return weighted_sums(q, tokens, pulls, lambda q, keys: 2 * scale * (keys @ q))[:, 0]


field = jf.SelfAttention(interaction=Quadratic())
clock = lambda rho: jnp.arctanh(rho) - 1 / rho
sol = jf.flow(field, jf.measure.simplex(2, 2, rho=0.5), t1=clock(0.9) - clock(0.5))
assert abs(sol.last.points[0] @ sol.last.points[1] - 0.9) < 1e-4
