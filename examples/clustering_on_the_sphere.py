"""Attention gathers tokens on the sphere in clusters (Geshkovski et al., arXiv 2312.10794).

    dx_i/dt = P_{x_i} ( sum_j softmax_j(beta <x_i, x_j>) x_j ),    beta = 4

First 512 uniform tokens on S^2. The energy

    E = 1/(2 beta) mean_ij exp(beta <x_i, x_j>)

grows from about e^beta / (2 beta n) + sinh(beta) / (2 beta^2) = 0.866, that of uniform tokens. At
t = 20, 2 clusters are left, nearly opposite, so that each is blind to the other, and about equal in
mass: E = 3.4169, half of what one cluster has, e^beta / (2 beta) = 6.82.

Then 32 tokens at right angles, which stay equiangular. Their inner product rho obeys

    rho' = 2 (1 - rho) ((n-1) rho + 1) / (e^{beta (1 - rho)} + n - 1),    rho(0) = 0    (section 6)

and must be 0.035441, 0.118066, 0.952775 at t = 1, 2, 5.
"""

import diffrax
import jax
import jax.numpy as jnp

import jaxflow as jf

jax.config.update("jax_enable_x64", True)


def main() -> dict:
    field = jf.SelfAttention(beta=4.0)

    uniform = jf.measure.uniform_sphere(512, 3, key=jax.random.key(0))
    sol = jf.flow(
        field,
        uniform,
        t1=20.0,
        saveat=diffrax.SaveAt(ts=jnp.array([0.0, 1.0, 2.0, 5.0, 10.0, 20.0])),
        observe={
            "energy": jf.observables.InteractionEnergy(beta=4.0),
            "clusters": jf.observables.ClusterCount(threshold=0.999),
        },
    )
    energy, clusters = sol.observed["energy"], sol.observed["clusters"]
    print("512 uniform tokens on S^2\n    t    energy  clusters")
    for t, e, c in zip(sol.ts, energy, clusters, strict=True):
        print(f"{t:5.1f}  {e:8.5f}  {c:8.0f}")

    right_angles = jf.measure.simplex(32, 32, rho=0.0)
    sol = jf.flow(
        field,
        right_angles,
        t1=5.0,
        saveat=diffrax.SaveAt(ts=jnp.array([1.0, 2.0, 5.0])),
        stepsize_controller=diffrax.PIDController(rtol=1e-9, atol=1e-9),
    )
    rho = jf.observables.inner_products(sol.measures)[:, 0, 1]
    print("32 tokens at right angles\n    t       rho")
    for t, r in zip(sol.ts, rho, strict=True):
        print(f"{t:5.1f}  {r:8.6f}")
    return {"energy": energy, "clusters": clusters, "rho": rho}


if __name__ == "__main__":
    main()
