"""Coarsening: two clusters become one at t = 1.7e9, in a few hundred explicit steps.

16 uniform tokens on the circle move by self-attention at beta = 12. Within t = 20 they are three
clusters, which then drift at rates like e^{-beta (1 - cos)} (arXiv 2410.06833). What keeps a plain
explicit method to short steps is that the tokens of a cluster still come together; as one token
they do not.

Expected: 15 mergers, the last ones at t = 18.5497, 13,195 and 1.699581e9, after some 470 steps of
Tsit5 in a tenth of a second, most of them in the first twenty units of time or at a merger. The
picture of the tree is runs/coarsening.png.
"""

import time
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np

import jaxflow as jf

BETA, T1, DELTA = 12.0, 1e10, 1e-3


def main() -> dict:
    jax.config.update("jax_enable_x64", True)
    mu0 = jf.measure.uniform_sphere(16, 2, key=jax.random.key(2))
    run = lambda: jf.coarsen(jf.SelfAttention(beta=BETA), mu0, t1=T1, delta=DELTA)
    run()  # compiles
    start = time.perf_counter()
    sol = jax.block_until_ready(run())
    seconds = time.perf_counter() - start

    tree = sol.merges
    for t, (a, b), size in list(zip(tree.times, tree.pairs, tree.sizes, strict=True))[-3:]:
        print(f"t = {t:14.6f}   the clusters of tokens {a} and {b} become one of {size}")
    steps = int(sol.stats["num_steps"])
    print(f"{len(tree.times)} mergers in {steps} steps and {seconds:.2f} s")

    if find_spec("matplotlib"):
        Path("runs").mkdir(exist_ok=True)
        axes = jf.viz.merge_tree(tree)
        axes.set_title(rf"16 tokens on the circle, $\beta$ = {BETA:g}")
        figure = axes.get_figure(root=True)
        assert figure is not None
        figure.savefig("runs/coarsening.png", dpi=150, bbox_inches="tight")
    return {"tree": tree, "steps": steps, "labels": np.asarray(sol.labels)}


if __name__ == "__main__":
    main()
