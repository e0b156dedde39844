"""Noise against attention: swept up and down, its strength meets a first-order transition.

    d_t rho + div(rho X[rho]) = (1/kappa) Lap rho     unnormalised attention on the circle, beta = 4

The uniform law is stable up to kappa_c = beta / I_1(beta) = 0.4099, and an ordered one from 0.3871
on: between them it depends on the past which of the two tokens settle on.

Expected at kappa = 0.38, 0.40, 0.42: order 0, 0, 0.8208 on the way up, and 0, 0.7399, 0.8208 down.
"""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp

import jaxflow as jf

KAPPAS = (0.36, 0.37, 0.38, 0.39, 0.40, 0.41, 0.42, 0.43, 0.44)
GRID, FIELD = (
    jf.density.FourierCircle(64),
    jf.SelfAttention(beta=4.0, interaction=jf.Unnormalised()),
)


def sweep(kappas, rho) -> dict[float, float]:
    """The order |E x| at rest for one kappa after the other, from the law before, a bit tilted."""
    order = {}
    for kappa in kappas:
        rho = 0.98 * rho + 0.02 * GRID.sample(lambda x: 1 + x[0])
        sol = jf.density.solve(FIELD, rho, GRID, t1=120.0, kappa=kappa)
        rho, order[kappa] = jnp.maximum(sol.densities[-1], 0), float(jnp.linalg.norm(sol.mean[-1]))
    return order


def main() -> dict:
    jax.config.update("jax_enable_x64", True)
    up = sweep(KAPPAS, GRID.sample(lambda x: 1 + 0.01 * x[0]))
    down = sweep(KAPPAS[::-1], GRID.sample(lambda x: jnp.exp(2 * x[0])))
    for kappa in KAPPAS:
        print(f"kappa = {kappa:.2f}: order {up[kappa]:.4f} up, {down[kappa]:.4f} down")
    if importlib.util.find_spec("matplotlib"):
        drawn = {"up": (KAPPAS, list(up.values())), "down": (KAPPAS[::-1], list(down.values()))}
        figure = jf.viz.curves(drawn, xlabel="kappa", ylabel="order").get_figure(root=True)
        assert figure is not None
        path = Path("runs/noise.png")
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, dpi=120)
        print(f"wrote {path}")
    return {"up": up, "down": down}


if __name__ == "__main__":
    main()
