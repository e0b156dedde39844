"""What a model does to a text along its depth, in numbers.

    c_ij(t) = <x_i, x_j> / |x_i| |x_j|              how near tokens are in direction
    entropy of head h = mean_i -sum_j A_ij log A_ij
    beta_h = argmin_b sum_ij ((s_ij - mean_j s_ij) - b (c_ij - mean_j c_ij))^2

A head whose scores s_ij are beta c_ij up to what is the same for all keys is the attention of the
theory, softmax(beta c_ij), and has its entropy. beta_h is the inverse temperature that is nearest
to a head in this sense, among the tokens that it sees.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._rules import instance
from .._types import ArrayLike
from ..fields import MultiHeadAttention, SelfAttention, Softmax, TiedAttention
from ..kernels.base import band, visible
from ..measure import Measure
from ..observables import cluster_count
from ..observables.attention import attentions
from .base import AbstractModel
from .language import LanguageModel

THRESHOLDS = 0.9, 0.99, 0.999  # of the cosine, for clusters
BETAS = np.geomspace(0.05, 200, 60)  # of the curve of the theory


class Inspection(NamedTuple):
    """What `jaxflow.models.inspect` finds of n tokens at K times, H heads in all at each.

    - `ts`: the ends of the steps, shape `(K,)`. `points`: the tokens there, `(K, n, d)`.
    - `clusters`: how many there are at the thresholds of `THRESHOLDS`, `(K, 3)`.
    - `entropy`, `beta`: of each head in the step from each time but the last, `(K - 1, H)`.
    - `curve`: the entropy of softmax(beta c_ij) at the inverse temperatures `BETAS`, of the tokens
      that the first attention sees, `(K - 1, 60)`; `most`: log of the number of tokens seen, on
      average, the largest entropy.
    - `query_key`, `output_value`: the singular values of beta Q_h^T K_h and of O_h V_h, `(K - 1, H,
      p)`; None where they are no matrices.
    - `sensitivity`: of the loss to each token, |dL/dx_i(0)| |x_i(0)|, `(n,)`.
    - `loss`: the mean cross-entropy of the next tokens; of an encoder the mean square of its
      outputs in place of it.
    """

    ts: np.ndarray
    points: np.ndarray
    clusters: np.ndarray
    entropy: np.ndarray
    beta: np.ndarray
    curve: np.ndarray
    most: float
    query_key: np.ndarray | None
    output_value: np.ndarray | None
    sensitivity: np.ndarray
    loss: float


def inspect(model: AbstractModel, tokens: ArrayLike) -> Inspection:
    """Follows a text through a model.

    **Arguments:** `model`, with softmax attention in its field, of a text: a
    `jaxflow.models.LanguageModel` or a `jaxflow.models.Encoder`; `tokens`, integers `(n,)`,
    at least two.

    **Returns:** an `Inspection`: NumPy arrays of what was found at the end of each step.

    **Raises:** `ValueError` or `TypeError` for a model or tokens of another kind.

    ```python
    >>> model = jaxflow.models.LanguageModel(
    ...     vocab_size=11, dim=8, heads=2, layers=1, context=8, key=jax.random.key(0)
    ... )
    >>> found = jaxflow.models.inspect(model, [3, 1, 4])  # doctest: +SKIP
    >>> found.entropy  # doctest: +SKIP

    ```
    """
    instance("model", model, AbstractModel, "jaxflow.models.from_pretrained(folder)")
    start = model.embed(tokens)
    if start.points.ndim != 2 or start.n < 2:
        raise ValueError(f"one text of at least two tokens is inspected, got {np.shape(tokens)}.")
    ts, points = _path(model, start)
    heads = [_heads(model.field, ts[k], points[k]) for k in range(len(ts) - 1)]
    loss, gradient = _sensitivity(model, start.points, jnp.asarray(tokens))
    unit = _directions(points)
    clusters = [cluster_count(Measure(unit), threshold) for threshold in THRESHOLDS]
    entropy, beta, curve, most, query_key, output_value = zip(*heads, strict=True)
    stacked = lambda arrays: None if arrays[0] is None else np.stack(arrays)
    return Inspection(
        np.asarray(ts), np.asarray(points), np.stack(clusters, axis=-1), np.stack(entropy),
        np.stack(beta), np.stack(curve), float(most[0]), stacked(query_key), stacked(output_value),
        np.asarray(gradient), float(loss),
    )  # fmt: skip


def _directions(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


@eqx.filter_jit
def _solved(model, start):
    return model.depth.flow(model.field, start, {"points": lambda t, mu: mu.points})


def _path(model, start: Measure) -> tuple[Array, Float[Array, "K n d"]]:
    """The ends of the steps, and the tokens there."""
    solved = _solved(model, start)
    if not solved.ok:
        raise ValueError("the flow did not reach T: raise max_steps or the tolerance of the depth.")
    ts, points = np.asarray(solved.ts), np.asarray((solved.observed or {})["points"])
    ts, points = ts[np.isfinite(ts)], points[np.isfinite(ts)]
    kept = np.append(np.diff(ts) > 0, True)  # an adaptive solve may save its end twice
    return jnp.asarray(ts[kept]), jnp.asarray(points[kept])


@eqx.filter_jit
def _heads(field, t, x):
    """Entropies, inverse temperatures, the curve of the theory and spectra at one time."""
    found = attentions(field, t, Measure(x))
    if not found:
        raise TypeError(f"{type(field).__name__} has no attention that could be inspected.")
    parts = [_head_numbers(part, seen) for part, seen in found]
    joined = lambda k: jnp.concatenate([part[k] for part in parts])
    spectra = [pair for part, _ in found if (pair := _spectra(part)) is not None]
    known = len(spectra) == len(found) and len({s[0].shape[1:] for s in spectra}) == 1
    both = [jnp.concatenate([s[k] for s in spectra]) if known else None for k in range(2)]
    return joined(0), joined(1), parts[0][2], parts[0][3], *both


def _head_numbers(field, mu: Measure):
    if not isinstance(field.interaction, Softmax):
        raise TypeError(f"softmax attention is inspected, got {field.interaction!r}.")
    if field.mask is not None:
        raise NotImplementedError(f"attention with the mask {field.mask!r} cannot be inspected.")
    wide = lambda a: jnp.asarray(a).astype(jnp.float32)
    scale, pair = field.scores(mu)
    queries, keys = map(wide, pair)
    rows = jnp.arange(mu.n)
    seen = visible(rows, rows, band(field.causal, field.window))
    seen = jnp.ones((mu.n, mu.n), bool) if seen is None else seen
    unit = _directions(wide(mu.points))
    cosines, scores = unit @ unit.T, wide(scale) * jnp.einsum("hip,hjp->hij", queries, keys)
    centred = lambda a: jnp.where(seen, a - a.mean(axis=1, where=seen, keepdims=True), 0)
    c, s = centred(cosines), jax.vmap(centred)(scores)
    beta = (s * c[None]).sum(axis=(1, 2)) / (c * c).sum()
    betas = jnp.asarray(BETAS, jnp.float32)
    curve = jax.vmap(lambda b: _entropy(b * cosines, seen))(betas)
    most = jnp.log(seen.sum(axis=1).astype(jnp.float32)).mean()
    return jax.vmap(lambda s: _entropy(s, seen))(scores), beta, curve, most


def _entropy(scores, seen):
    """The mean over queries of the entropy of softmax over the keys that are seen."""
    logs = jax.nn.log_softmax(jnp.where(seen, scores, -jnp.inf), axis=1)
    return -jnp.where(seen, jnp.exp(logs) * logs, 0).sum(axis=1).mean()


def _spectra(field: Any):
    """The singular values (H, p) of beta Q^T K and O V, products of thin matrices."""
    matrices = _matrices(field)
    if matrices is None:
        return None
    beta, query, key, value, output = matrices
    thin = lambda a: jnp.linalg.qr(a.astype(jnp.float32), mode="r")  # (H, d, p) -> (H, p, p)
    turned = lambda a: a.transpose(0, 2, 1)
    values = lambda a, b: jnp.linalg.svd(thin(a) @ turned(thin(b)), compute_uv=False)
    scale = jnp.asarray(beta).astype(jnp.float32)
    return scale * values(turned(query), turned(key)), values(output, turned(value))


def _matrices(field: Any):
    """beta, and Q, K, V (H, p, d) and O (H, d, p) of attention whose maps are matrices."""
    if isinstance(field, MultiHeadAttention):
        key, value = field.of_heads(field.key, 0), field.of_heads(field.value, 0)
        beta = field.scores(Measure(jnp.ones((1, field.query.shape[2]))))[0]
        return beta, field.query, key, value, field.output
    if isinstance(field, TiedAttention):
        a = field.matrix
        return jnp.abs(field.beta)[:, None], a, a, a, a.transpose(0, 2, 1)
    assert isinstance(field, SelfAttention)
    if any(a is None or callable(a) for a in field.maps):
        return None
    query, key, value = (jnp.asarray(a)[None] for a in field.maps)
    return field.beta, query, key, value, jnp.eye(value.shape[1])[None]


@eqx.filter_jit
def _sensitivity(model, points, tokens):
    """The loss, and |dL/dx_i(0)| |x_i(0)| of each token."""

    def loss(x):
        outputs = model.read_out(model.depth.flow(model.field, Measure(x)).final)
        if not isinstance(model, LanguageModel):
            return (outputs**2).mean()
        logs = jax.nn.log_softmax(outputs[:-1].astype(jnp.float32))
        return -jnp.take_along_axis(logs, tokens[1:, None].astype(jnp.int32), axis=1).mean()

    value, gradient = jax.value_and_grad(loss)(points)
    return value, jnp.linalg.norm(gradient, axis=1) * jnp.linalg.norm(points, axis=1)


def loss_name(model: AbstractModel) -> str:
    """What `loss` is of a model."""
    return "loss" if isinstance(model, LanguageModel) else "mean square of the hidden states"
