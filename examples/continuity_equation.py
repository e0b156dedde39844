"""Infinitely many tokens: how many clusters the continuity equation forms, by beta.

    d_t rho + div(rho X[rho]) = 0      softmax attention on the circle

Off the uniform law the mode k grows at the rate k^2 I_k(beta) / (beta I_0(beta)), the fastest near
k = sqrt(2 beta): 3 at beta = 5, 4 at beta = 7 and at beta = 9. From all modes alike, that many
clusters form.

Expected: 3, 4 and 4 peaks; mass 1 to rounding, no density below 0.
"""

import importlib.util
from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import jaxflow as jf

BETAS, GRID, TS = (5.0, 7.0, 9.0), jf.density.Circle(256), np.linspace(0.0, 12.0, 61)


def rho0(x):
    """Uniform but for one part in 1000 of each of the first 8 modes, with phases of their own."""
    k = jnp.arange(1.0, 9.0)
    return 1 + 1e-3 * jnp.cos(k * jnp.arctan2(x[1], x[0]) + k**2).sum()


def main() -> dict:
    jax.config.update("jax_enable_x64", True)
    peaks, pictures = {}, {}
    for beta in BETAS:
        field, saveat = jf.SelfAttention(beta=beta), diffrax.SaveAt(ts=jnp.asarray(TS))
        sol = jf.density.solve(field, rho0, GRID, t1=TS[-1], saveat=saveat)
        rho = pictures[beta] = np.asarray(sol.densities)
        above = (rho[-1] > np.roll(rho[-1], 1)) & (rho[-1] >= np.roll(rho[-1], -1))
        peaks[beta] = int((above & (rho[-1] > 1 / (2 * np.pi))).sum())
        defect = float(jnp.abs(sol.mass - 1).max())
        print(
            f"beta = {beta:.0f}: {peaks[beta]} clusters, mass to {defect:.0e}, "
            f"least density {rho.min():.0e}"
        )
    if importlib.util.find_spec("matplotlib"):
        print(f"wrote {picture(pictures)}")
    return peaks


def picture(densities) -> Path:
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(10, 3.5), sharey=True, layout="constrained")
    for axes, (beta, rho) in zip(panels, densities.items(), strict=True):
        axes.pcolormesh(GRID.axes[0], TS, np.log10(rho + 1e-3), cmap="magma")
        axes.set(xlabel="angle", title=f"beta = {beta:.0f}")
    panels[0].set_ylabel("t")
    path = Path("runs/continuity_equation.png")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


if __name__ == "__main__":
    main()
