"""Derivatives through the flow, in reverse and forward mode, against their closed form.

Two tokens on the circle with inner product rho0, followed to T = 1 at beta = 0. With
a = artanh(rho0), their last inner product R and its derivatives are

    R           = tanh(T + a)
    dR/d rho0   = (1 - R^2) / (1 - rho0^2)
    dR/d beta   = -(1 - R^2)/2 (T - ln cosh(T + a) + ln cosh(a))

At rho0 = 0.3 these are 0.8641538088, 0.2782837305 and -0.0456390. Every adjoint of diffrax must
give them, to about the solver's tolerance of 1e-10, by whichever of jax.grad and jax.jvp it allows.
"""

from functools import partial

import diffrax
import jax
import jax.numpy as jnp

import jaxflow as jf

jax.config.update("jax_enable_x64", True)


def final_inner_product(rho0, beta, adjoint):
    x, y = jnp.array([1.0, 0.0]), jnp.stack([rho0, jnp.sqrt(1 - rho0**2)])
    sol = jf.flow(
        jf.SelfAttention(beta=beta),
        jf.Measure(jnp.stack([x, y])),
        t1=1.0,
        stepsize_controller=diffrax.PIDController(rtol=1e-10, atol=1e-10),
        adjoint=adjoint,
        max_steps=64,
    )
    x, y = sol.measures.points[-1]
    return x @ y


def by_grad(rho0, beta, *, adjoint):
    return jax.grad(final_inner_product, (0, 1))(rho0, beta, adjoint)


def by_jvp(rho0, beta, *, adjoint):
    R = lambda rho0, beta: final_inner_product(rho0, beta, adjoint)
    along = lambda *direction: jax.jvp(R, (rho0, beta), direction)[1]
    return along(1.0, 0.0), along(0.0, 1.0)


def main() -> dict:
    T, rho0, beta = 1.0, 0.3, 0.0
    a = jnp.arctanh(rho0)
    R = jnp.tanh(T + a)
    by_rho0 = (1 - R**2) / (1 - rho0**2)
    by_beta = -(1 - R**2) / 2 * (T - jnp.log(jnp.cosh(T + a)) + jnp.log(jnp.cosh(a)))

    print(f"{'':38}  {'dR/d rho0':>13}  {'dR/d beta':>13}")
    print(f"{'closed form':38}  {by_rho0:13.10f}  {by_beta:13.10f}")
    errors = {}
    for mode, adjoint in (
        (by_grad, diffrax.RecursiveCheckpointAdjoint()),
        (by_grad, diffrax.DirectAdjoint()),
        (by_grad, diffrax.BacksolveAdjoint()),
        (by_jvp, diffrax.DirectAdjoint()),
        (by_jvp, diffrax.ForwardMode()),
    ):
        name = f"{mode.__name__}, {type(adjoint).__name__}"
        d_rho0, d_beta = jax.jit(partial(mode, adjoint=adjoint))(rho0, beta)
        print(f"{name:38}  {d_rho0:13.10f}  {d_beta:13.10f}")
        errors[name] = max(abs(d_rho0 - by_rho0), abs(d_beta - by_beta))
    return errors


if __name__ == "__main__":
    main()
