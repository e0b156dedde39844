"""An interaction of one's own: mu_x(dy) = s(x, y)^2 mu(dy), in ten lines.

An interaction says how a query weighs the tokens, by the scores s = beta <Q x, K y>: `expectation`
is the mean of values, and `trace` that of its derivative in x, of which `slopes` are k' = D_x s.
With the density phi(s) it is sum_j w_j phi'(s_j) <k'_j, v_j>. Fields, flows, divergences, masks and
pictures then serve it.

Expected: the divergence agrees with that by forward-mode derivatives to 1e-12. The force
E[<x, y>^2 y] is odd in mu, so that tokens together with their antipodes stay where they are, to
1e-14. 64 uniform tokens on the sphere S^2 end as 4 clusters, each at obtuse angles to the others.
"""

import diffrax
import jax
import jax.numpy as jnp

import jaxflow as jf
from jaxflow.fields import AbstractInteraction, weighted_sums


class Quadratic(AbstractInteraction):
    """mu_x(dy) = s(x, y)^2 mu(dy)."""

    def expectation(self, q, tokens, values, scale):
        square = lambda q, keys: (scale * (keys @ q)) ** 2
        return weighted_sums(q, tokens, values, square)

    def trace(self, q, tokens, values, slopes, scale):
        double = lambda q, keys: 2 * scale * (keys @ q)
        pulls = (values * slopes).sum(axis=1, keepdims=True)  # <k', v>
        return weighted_sums(q, tokens, pulls, double)[:, 0]


def main() -> dict:
    jax.config.update("jax_enable_x64", True)
    field = jf.SelfAttention(beta=2.0, interaction=Quadratic())
    mu0 = jf.measure.uniform_sphere(64, 3, key=jax.random.key(0))
    x = mu0.points

    exact = jf.fields.base.divergence_by_derivatives(field, 0.0, x, mu0)
    error = jnp.abs(jf.divergence(field, 0.0, x, mu0) - exact).max()
    print(f"divergence: differs from that by derivatives by {error:.1e}")

    antipodes = jf.Measure(jnp.concatenate([x, -x]))
    speed = jnp.abs(field(0.0, antipodes.points, antipodes)).max()
    print(f"antipodes move at {speed:.1e}")

    sol = jf.flow(field, mu0, t1=40.0, saveat=diffrax.SaveAt(t1=True))
    clusters = int(jf.observables.cluster_count(sol.last))
    labels = jf.observables.cluster_labels(sol.last)
    centres = jnp.stack([sol.last.points[labels == k][0] for k in range(clusters)])
    cosines = (centres @ centres.T)[~jnp.eye(clusters, dtype=bool)]
    print(f"{clusters} clusters at t = 40, with cosines {cosines.min():.3f} to {cosines.max():.3f}")
    return {"error": error, "speed": speed, "clusters": clusters, "largest": cosines.max()}


if __name__ == "__main__":
    main()
