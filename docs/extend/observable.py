"""An observable: how much the tokens agree, and the time at which they do.

    a(mu) = |E_mu[x]|^2 = sum_ij w_i w_j <x_i, x_j>

Fact: of two tokens at beta = 0, a = (1 + rho) / 2 with rho = tanh(t + artanh(rho_0)), so that it
passes (1 + 0.9) / 2 at t = artanh(0.9) - artanh(rho_0).
"""

import jax.numpy as jnp

import jaxflow as jf


def agreement(t, mu):
    return (mu.mean**2).sum()


sol = jf.flow(
    jf.SelfAttention(beta=0.0),
    jf.measure.simplex(2, 2, rho=0.3),
    t1=10.0,
    observe={"agreement": agreement},
    event=jf.events.until_above(agreement, 0.95),
)
assert abs(sol.observed["agreement"][-1] - 0.95) < 1e-4
assert abs(sol.end - (jnp.arctanh(0.9) - jnp.arctanh(0.3))) < 1e-3
