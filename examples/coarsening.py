"""Coarsening: tokens that have met are one token, and metastable times take moments.

16 uniform tokens on the circle move by self-attention at beta = 12. What makes such a flow stiff is
the contraction of tokens that are one already: while the clusters drift as slowly as
e^{-beta (1 - cos)} (arXiv 2410.06833), an explicit method takes steps of length 1. Tokens that come
within an angle delta become one token with the sum of their weights, and the steps grow with the
time of the drift.

Expected: two clusters become one at t = 1.699581e9, after about 480 steps of Tsit5, and the time
depends on delta by no more than a share of delta^2. The tree of all mergers is drawn over log t.
"""

import importlib.util
import time
from pathlib import Path

import diffrax
import jax

import jaxflow as jf

BETA, T1 = 12.0, 1e10


def main() -> dict:
    jax.config.update("jax_enable_x64", True)
    mu0 = jf.measure.uniform_sphere(16, 2, key=jax.random.key(2))
    field, tolerance = jf.SelfAttention(beta=BETA), diffrax.PIDController(rtol=1e-8, atol=1e-8)
    solutions = {}
    for delta in (1e-3, 1e-4):
        start = time.perf_counter()
        sol = jf.coarsen(field, mu0, t1=T1, delta=delta, stepsize_controller=tolerance)
        tree, steps = sol.merges, int(sol.stats["num_steps"])
        assert isinstance(tree, jf.observables.MergeTree)
        took = time.perf_counter() - start
        solutions[delta] = sol
        print(f"delta = {delta:g}: one cluster at t = {tree.times[-1]:.9e}", end=", ")
        print(f"{steps} steps, {took:.1f} s with the time to compile")
    print("the last mergers, and the tokens in each cluster:")
    for t, pair, size in list(zip(tree.times, tree.pairs.tolist(), tree.sizes, strict=True))[-4:]:
        print(f"t = {t:12.6g}   {pair}   {size}")

    if importlib.util.find_spec("matplotlib"):
        picture = Path("runs/coarsening.png")
        picture.parent.mkdir(exist_ok=True)
        figure = jf.viz.merge_tree(tree).get_figure(root=True)
        assert figure is not None
        figure.savefig(picture, dpi=120)
        print(f"wrote {picture}")
    return {"solutions": solutions, "tree": tree}


if __name__ == "__main__":
    main()
