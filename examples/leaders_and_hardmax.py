"""Hardmax attention has leaders, and the other tokens go to them (arXiv 2407.01602).

    x_i <- x_i + a/(1+a) (y_i - x_i),    y_i = the mean over C_i = argmax_j <x_i, x_j>

is one Euler step of length 1 along the field a/(1+a) (hardmax attention - x). Here a = 0.5. The
leaders are those that attend to themselves alone, C_i = {i}: 5 tokens of a pentagon, around 59
Gaussian ones. Leaders do not move, nobody changes leader, and the distance of every other token to
its leader shrinks by exactly 1/(1+a) = 0.666667 a step.
"""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import jaxflow as jf

jax.config.update("jax_enable_x64", True)


def main() -> dict:
    a = 0.5
    attention = jf.SelfAttention(interaction=jf.Hardmax(), geometry=jf.Euclidean())
    field = a / (1 + a) * (attention + jf.LinearDrift(-1.0))

    pentagon = 4 * jf.measure.circle(5).points
    inside = jf.measure.gaussian(59, 2, key=jax.random.key(0)).points
    sol = jf.flow(
        field,
        jf.Measure(jnp.concatenate([pentagon, inside])),
        t1=10.0,
        dt0=1.0,
        solver=diffrax.Euler(),
        saveat=diffrax.SaveAt(ts=jnp.linspace(0.0, 10.0, 11)),
        observe={"attention": lambda t, mu: jf.observables.attention_matrix(attention, mu)},
    )

    x = np.asarray(sol.measures.points)
    leader = np.asarray(sol.observed["attention"]).argmax(axis=-1)
    leaders = np.unique(leader)
    followers = np.setdiff1d(np.arange(64), leaders)
    changes = (leader != leader[0]).sum()
    moved = np.abs(x[:, leaders] - x[0, leaders]).max()
    gaps = np.linalg.norm(x - x[:, leader[0]], axis=-1)[:, followers]
    factors = gaps[1:] / gaps[:-1]

    print(f"{len(leaders)} leaders, which move by {moved:.1e}; {changes} changes of leader")
    print("step  farthest follower  distances shrink by")
    for k, (gap, factor) in enumerate(zip(gaps[1:], factors, strict=True), 1):
        print(f"{k:4d}  {gap.max():17.6f}  {factor.min():.12f} to {factor.max():.12f}")
    return {"leaders": leaders, "moved": moved, "changes": changes, "factors": factors}


if __name__ == "__main__":
    main()
