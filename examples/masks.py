"""Does a mask change what clusters? Full attention against masks of the same tokens.

256 uniform tokens on the circle move by self-attention at beta = 16, each seeing all tokens or
those of a mask. Masks go by the order of the tokens, so all is done twice: ordered by angle,
neighbours are alike, as in a text; shuffled, they are not. The agreement is the share of pairs of
tokens that are together, or apart, under both the mask and full attention (Rand's index).

Expected: it does. Full attention has 34 clusters at t = 3 and 3 from t = 24 on. The hierarchical
mask follows it where neighbours are alike (agreement 1.00), and not where they are shuffled: means
of far tokens then say little, and 8 clusters are left at t = 300. Blocks of tokens cluster for
themselves: 4 blocks that are arcs end as 4 clusters, shuffled ones as 14. Strided attention and
BigBird come to the number of full attention, or one more, later and with other members (agreement
0.79 to 0.93). The top 16 stop at 9 clusters, in any order: a cluster of 16 sees no other.
"""

import importlib.util
from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import jaxflow as jf

MASKS = {
    "full attention": None,
    "blocks": jf.masks.Blocks(64),
    "strided": jf.masks.Strided(4, 1, size=8),
    "BigBird": jf.masks.big_bird(window=8, tokens=4, blocks=2, size=8),
    "hierarchical": jf.masks.Hierarchical(8),
    "top 16": jf.masks.TopK(16),
}
N, BETA, T1 = 256, 16.0, 300.0
TS = np.concatenate([[0.0], np.geomspace(0.1, T1, 70)])
AT = [int(np.abs(TS - t).argmin()) for t in (3, 30, 300)]


def labels_over_time(mask, mu0) -> np.ndarray:
    """The cluster of each token at each time, (t, n)."""
    field = jf.SelfAttention(beta=BETA, mask=mask)
    # The choice of the largest scores jumps, which no control of the error likes.
    fixed, saveat = diffrax.ConstantStepSize(), diffrax.SaveAt(ts=jnp.asarray(TS))
    sol = jf.flow(
        field, mu0, t1=T1, dt0=0.25, solver=diffrax.Heun(), stepsize_controller=fixed, saveat=saveat
    )
    return np.asarray(jf.observables.cluster_labels(sol.measures))


def together(labels: np.ndarray) -> np.ndarray:
    return labels[:, :, None] == labels[:, None, :]


def main() -> dict:
    shuffled = jf.measure.uniform_sphere(N, 2, key=jax.random.key(0))
    angles = jnp.arctan2(shuffled.points[:, 1], shuffled.points[:, 0])
    ordered = jf.Measure(shuffled.points[jnp.argsort(angles)])

    counts, agreement = {}, {}
    for order, mu0 in (("ordered", ordered), ("shuffled", shuffled)):
        print(f"{order:16s} clusters at t = 3, 30, 300   agreement at t = 30, 300")
        for name, mask in MASKS.items():
            labels = labels_over_time(mask, mu0)
            if mask is None:
                full = together(labels)
            counts[order, name] = labels.max(axis=1) + 1
            agreement[order, name] = (together(labels) == full).mean(axis=(1, 2))
            few, near = counts[order, name][AT], agreement[order, name][AT]
            print(
                f"  {name:14s} {few[0]:14d} {few[1]:4d} {few[2]:4d} {near[1]:21.2f} {near[2]:5.2f}"
            )
    if importlib.util.find_spec("matplotlib"):
        print(f"wrote {picture(counts)}")
    return {"counts": counts, "agreement": agreement}


def picture(counts) -> Path:
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axes, order in zip(panels, ("ordered", "shuffled"), strict=True):
        for name, mask in MASKS.items():
            style = {"color": "black", "linewidth": 2.5} if mask is None else {}
            axes.step(TS[1:], counts[order, name][1:], where="post", label=name, **style)
        axes.set(xscale="log", yscale="log", xlabel="t", title=f"tokens {order}")
    ticks = [1, 2, 5, 10, 20, 50]
    panels[0].set_yticks(ticks, map(str, ticks))
    panels[0].set_ylabel("number of clusters")
    panels[1].legend()
    path = Path("runs/masks.png")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


if __name__ == "__main__":
    main()
