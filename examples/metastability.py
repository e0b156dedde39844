"""Metastability: clusters that last exponentially long, and when they end.

48 uniform tokens on the circle move by self-attention at beta = 9. At t = 10 they are three
clusters; then nothing seems to happen, until two of them meet (arXiv 2410.06833). An implicit
method takes steps as long as the motion of the clusters allows, times are saved evenly in log t,
and an event stops the flow when one cluster is left.

Expected: 3 clusters from t = 10, 2 from t = 823, and one from t = 5.5 million, after about a
thousand steps. The energy rises all along, and the merges, found by bisection, agree with the
staircase.
"""

import diffrax
import jax
import numpy as np

import jaxflow as jf

BETA, T1 = 9.0, 1e7


def main() -> dict:
    jax.config.update("jax_enable_x64", True)
    mu0 = jf.measure.uniform_sphere(48, 2, key=jax.random.key(2))
    field, stiff = jf.SelfAttention(beta=BETA), diffrax.Kvaerno5()
    tolerance = diffrax.PIDController(rtol=1e-7, atol=1e-7)
    times = jf.events.log_times(0.1, T1, 81)
    sol = jf.flow(
        field,
        mu0,
        t1=T1,
        solver=stiff,
        stepsize_controller=tolerance,
        saveat=diffrax.SaveAt(ts=times, t1=True),
        event=jf.events.until_clustered(),
        observe={
            "energy": jf.observables.InteractionEnergy(BETA),
            "clusters": jf.observables.ClusterCount(),
        },
    )
    reached = np.isfinite(np.asarray(sol.ts))
    ts, clusters, energy = (
        np.asarray(a)[reached] for a in (sol.ts, sol.observed["clusters"], sol.observed["energy"])
    )
    for k in np.flatnonzero(np.diff(clusters, prepend=clusters[0] + 1)):
        print(f"t = {ts[k]:12.4g}   {int(clusters[k]):3d} clusters   energy {energy[k]:.4f}")
    print(f"one cluster at t = {ts[-1]:.6g}, after {int(sol.stats['num_steps'])} steps")

    tree = jf.events.merges(field, mu0, t1=T1, solver=stiff, stepsize_controller=tolerance)
    print("the last merges, in time, and the tokens that met:")
    assert tree.links is not None
    for t, pair in list(zip(tree.times, tree.links.tolist(), strict=True))[-4:]:
        print(f"t = {t:12.6g}   {pair}")
    return {"ts": ts, "clusters": clusters, "energy": energy, "tree": tree}


if __name__ == "__main__":
    main()
