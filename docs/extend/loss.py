"""A loss: cross-entropy against targets that are a bit uncertain.

    L = (1 - a) (-log p_target) + a/C sum_c (-log p_c),    p = softmax(logits)

Fact: where all classes are equally likely, L = log C for every a; at a = 0 it is the cross-entropy.
"""

import jax
import jax.numpy as jnp

from jaxflow import training


def smoothed(logits, targets, a=0.1):
    """The mean over the targets that are not negative: those fill up the last batch."""
    surprise = -jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(surprise, targets[..., None], axis=-1)[..., 0]
    each = (1 - a) * chosen + a * surprise.mean(axis=-1)
    return each.mean(where=targets >= 0)


logits = jax.random.normal(jax.random.key(0), (4, 10))
targets = jnp.array([3, 1, 4, -1])
exact = training.cross_entropy(logits, targets)
loss = training.FlowLoss(smoothed, costs={})  # what `fit(loss=smoothed)` makes of it
assert jnp.allclose(loss.outputs(0 * logits, targets), jnp.log(10))
assert jnp.allclose(smoothed(logits, targets, 0.0), exact)
