"""The density of tokens that become one cluster, along their flow, against its closed form.

Tokens on the circle with a Poisson kernel for a law keep one at beta = 0 (Ott and Antonsen 2008),
with the order parameter r = r_0 e^{t/2} / sqrt(1 - r_0^2 + r_0^2 e^t).

Expected: 400 probes among 400 tokens, from r_0 = 0.2 to r = 0.833 at t = 4, find log rho to 1e-8.
"""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxflow as jf

TS = (1.0, 2.0, 4.0)


def main() -> dict:
    jax.config.update("jax_enable_x64", True)
    law, tokens = jf.density.closures.OttAntonsen(), jf.measure.kuramoto(400, 0.2)
    log_poisson = jax.vmap(lambda r, x: law.log_density(jnp.stack([r, 0 * r]), x), (None, 0))
    found, errors = {}, {}
    for t in TS:
        field, start = jf.SelfAttention(beta=0.0), jnp.asarray(0.2)
        logs0 = log_poisson(start, tokens.points)
        x, logs = found[t] = jf.log_density(field, tokens, tokens.points, logs0, t1=t)
        r = 0.2 * jnp.exp(t / 2) / jnp.sqrt(1 - 0.04 + 0.04 * jnp.exp(t))
        errors[t] = float(jnp.abs(logs - log_poisson(r, x)).max())
        print(f"t = {t:.0f}: r = {r:.6f}, error of log rho at most {errors[t]:.1e}")
    if importlib.util.find_spec("matplotlib"):
        print(f"wrote {picture(found)}")
    return errors


def picture(found) -> Path:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for t, (x, logs) in found.items():
        angles = np.arctan2(x[:, 1], x[:, 0])
        order = np.argsort(angles)
        axes.plot(angles[order], np.exp(logs)[order], label=f"t = {t:.0f}")
    axes.set(xlabel="angle", ylabel="density")
    axes.legend()
    path = Path("runs/log_density.png")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


if __name__ == "__main__":
    main()
