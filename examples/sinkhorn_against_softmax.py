"""Doubly stochastic attention moves the mean of the tokens linearly; softmax attention does not.

    dx_i/dt = V sum_j p_ij x_j    in R^2,    V the rotation by 90 degrees

The rows of p sum to 1. Where the columns do as well, the mean m of the tokens obeys m' = V m
exactly: it turns on a circle and is back at t = 2 pi. Sinkhorn's iterations (Sinkformers, arXiv
2110.11773) balance columns and rows in turn. None of them is softmax attention; continued to
convergence they balance both. From softmax to convergence, the column defect max_j |sum_i p_ij - 1|
must fall from 5.5 to below 1e-13, the error of m' from 0.58 to below 1e-13, and that of m(2 pi)
from 2.2 to some 1e-8, the tolerance of the solver.
"""

import jax
import jax.numpy as jnp

import jaxflow as jf

jax.config.update("jax_enable_x64", True)


def main() -> dict:
    V = jnp.array([[0.0, -1.0], [1.0, 0.0]])
    mu0 = jf.measure.gaussian(64, 2, key=jax.random.key(0), mean=[1.0, 0.0], covariance=0.5)

    rows = []
    print("iterations  column defect  |m' - V m|  |m(2 pi) - m(0)|")
    for iterations in (0, 4, None):
        sinkhorn = jf.Sinkhorn(iterations=iterations)
        field = jf.SelfAttention(value=V, interaction=sinkhorn, geometry=jf.Euclidean())

        defect = jf.observables.column_defect(field, mu0)
        velocity = field(0.0, mu0.points, mu0)
        rate_error = jnp.linalg.norm(velocity.mean(axis=0) - V @ mu0.mean)
        sol = jf.flow(field, mu0, t1=2 * jnp.pi)
        return_error = jnp.linalg.norm(sol.measures[-1].mean - mu0.mean)

        rows.append([defect, rate_error, return_error])
        print(f"{iterations!s:>10}  {defect:13.1e}  {rate_error:10.1e}  {return_error:16.1e}")
    defects, rate_errors, return_errors = jnp.array(rows).T
    return {"defects": defects, "rate_errors": rate_errors, "return_errors": return_errors}


if __name__ == "__main__":
    main()
