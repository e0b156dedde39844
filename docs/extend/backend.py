"""A backend: the operation in the fewest lines, for one system without batch axes.

    s_ij = scale <q_i, k_j> + log w_j
    log_partition_i = logsumexp_j s_ij,    mean_i = sum_j exp(s_ij - log_partition_i) v_j

Fact: its values and both of its derivatives are those of the definition, and two tokens of the
sphere that flow by it go from rho = 0 to 0.9 in the time 8.390296 at beta = 4.
"""

import jax
import jax.numpy as jnp

import jaxflow as jf
from jaxflow.kernels import check_backend, conformance, register_backend


def plain(q, k, v, log_weights, scale):
    s = scale * jnp.matmul(q, k.T, precision="highest") + log_weights[None, :]
    return jax.nn.softmax(s, axis=1) @ v, jax.nn.logsumexp(s, axis=1)


register_backend("plain", plain)
found = check_backend("plain", dtypes=["float32"], trials=conformance.TRIALS[1:2])
assert len(found.right) == 3 and not found.faults

sol = jf.flow(jf.SelfAttention(beta=4.0, backend="plain"), jf.measure.simplex(2, 2), t1=8.390296)
assert abs(sol.last.points[0] @ sol.last.points[1] - 0.9) < 1e-4
