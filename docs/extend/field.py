"""A field: tokens of the sphere that are drawn to their mean (Kuramoto's model, on the circle).

    X[mu](x) = P_x E_mu[y]

Fact: tokens on the circle whose law is a Poisson kernel keep one, with the order parameter
r(t) = r_0 e^{t/2} / sqrt(1 - r_0^2 + r_0^2 e^t) (Ott and Antonsen, arXiv 0806.0004).
"""

import jax.numpy as jnp

import jaxflow as jf


class Kuramoto(jf.AbstractField):
    geometry: jf.Sphere = jf.Sphere()

    def __call__(self, t, x, mu):
        return self.geometry.project(x, jnp.broadcast_to(mu.mean, x.shape))


r0, t = 0.2, 2.0
sol = jf.flow(Kuramoto(), jf.measure.kuramoto(400, r0), t1=t)
r = jf.observables.order_parameter(sol.last)
assert abs(r - r0 * jnp.exp(t / 2) / jnp.sqrt(1 - r0**2 + r0**2 * jnp.exp(t))) < 1e-4
