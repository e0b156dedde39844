"""A backend: the operation in the fewest lines, for one system without batch axes.

    s_ij = scale <q_i, k_j> + log w_j
    log_partition_i = logsumexp_j s_ij,    mean_i = sum_j exp(s_ij - log_partition_i) v_j

Fact: two tokens of the sphere that flow by it at beta = 4 go from rho = 0 to 0.9 in the time
8.390296, and its derivatives are those of the operation.
"""

import jax
import jax.numpy as jnp

import jaxflow as jf


def plain(q, k, v, log_weights, scale):
    s = scale * jnp.matmul(q, k.T, precision="highest") + log_weights[None, :]
    return jax.nn.softmax(s, axis=1) @ v, jax.nn.logsumexp(s, axis=1)


jf.kernels.register_backend("plain", plain)
field, mu0 = jf.SelfAttention(beta=4.0, backend="plain"), jf.measure.simplex(2, 2)
x, y = jf.flow(field, mu0, t1=8.390296).last.points
assert abs(x @ y - 0.9) < 1e-4
probe = jf.measure.simplex(2, 2, rho=0.3).points
slope = lambda field: jax.jvp(lambda x: field(0.0, x, mu0), (probe,), (mu0.points,))[1]
assert jnp.allclose(slope(field), slope(jf.SelfAttention(beta=4.0)), atol=1e-6)
