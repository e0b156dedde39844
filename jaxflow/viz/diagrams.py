"""Pictures of a matrix, of a tree, and of a family of flows."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .._rules import count, instance
from ..fields import SelfAttention
from ..measure import Measure, check_measure
from ..observables import MergeTree, attention_matrix
from ..phase import PhaseDiagram
from .run import evenly
from .style import COLOURS, VERBATIM, cell_edges, log_spaced, new_axes, require, time_axis, words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
else:  # an annotation imports no extra
    Axes = Any

MOST_TOKENS = 1000  # of a matrix: a pixel a token, and n^2 numbers


def attention(
    field: SelfAttention,
    mu: Measure,
    *,
    labels: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """The matrix A_ij, the weight of token j for token i.

    **Arguments:** `field`: one `jaxflow.SelfAttention`; `mu`: one measure, points `(n, d)`;
    `labels`: a word a token; evenly spaced ones are written where there is no room for all. `ax`:
    Matplotlib axes, default new ones.

    **Returns:** the Matplotlib axes that hold the drawing.

    **Raises:** `ValueError` for more than 1,000 tokens: the matrix holds n^2 numbers, and no print
    shows them; `ValueError` or `TypeError` for what is not one measure of finite points, a field
    without one matrix, and bad labels.

    ```python
    >>> field, mu = jaxflow.SelfAttention(beta=4.0), jaxflow.measure.circle(8)
    >>> axes = jaxflow.viz.attention(field, mu)

    ```
    """
    check_measure("mu", mu)
    if mu.points.ndim != 2 or not np.isfinite(np.asarray(mu.points)).all():
        raise ValueError(
            "attention draws the matrix of one measure of finite points (n, d): index a solution's "
            f"measures; got shape {mu.points.shape}."
        )
    if mu.n > MOST_TOKENS:
        raise ValueError(
            f"the matrix A_ij is drawn of {MOST_TOKENS} tokens at most, got {mu.n}: take some of "
            f"them, such as jaxflow.Measure(mu.points[::{-(-mu.n // MOST_TOKENS)}])."
        )
    matrix, axes = np.asarray(attention_matrix(field, mu)), new_axes(ax)
    image = axes.imshow(matrix, vmin=min(0, matrix.min()), cmap="cividis")
    axes.figure.colorbar(image, ax=axes, label="$A_{ij}$")
    axes.set(xlabel="token $j$", ylabel="token $i$")
    if labels is not None:
        room = 0.8 * axes.bbox.height * 72 / axes.figure.dpi  # in points
        shown = evenly(mu.n, max(2, int(room / 5)))
        named = [_short(words(labels, mu.n)[int(j)]) for j in shown]
        look = dict(fontsize=min(10, room / len(shown)), **VERBATIM)
        axes.set_xticks(shown, named, rotation=90, **look)
        axes.set_yticks(shown, named, **look)
    return axes


def _short(word: str, most: int = 20) -> str:
    """A word, cut where it would leave no room for the matrix."""
    return word if len(word) <= most else f"{word[: most - 1]}…"


def phase_diagram(diagram: PhaseDiagram, *, ax: Axes | None = None) -> Axes:
    """The probability that two tokens have met, over t and beta.

    The line is the time at which equiangular tokens meet, the boundary for d -> infinity.

    **Arguments:** `diagram`: a `jaxflow.phase.PhaseDiagram`; `ax`: Matplotlib axes, default
    new ones. An axis is logarithmic where its values are spaced so.

    **Returns:** the Matplotlib axes that hold the drawing.

    **Raises:** `TypeError` for what is no phase diagram.

    ```python
    >>> betas, ts = jnp.linspace(1.0, 9.0, 9), jnp.linspace(0.0, 30.0, 61)
    >>> key = jax.random.key(0)
    >>> diagram = jaxflow.phase_diagram(betas, ts, n=32, d=3, key=key)  # doctest: +SKIP
    >>> axes = jaxflow.viz.phase_diagram(diagram)  # doctest: +SKIP

    ```
    """
    instance(
        "diagram", diagram, PhaseDiagram, "jaxflow.phase_diagram(betas, ts, n=64, d=3, key=key)"
    )
    rows = np.argsort(diagram.betas)
    betas, curve = diagram.betas[rows], diagram.curve[rows]
    log_t, log_beta = log_spaced(diagram.ts), log_spaced(betas)
    above, after = (betas > 0) | (not log_beta), (diagram.ts > 0) | (not log_t)
    x, y = cell_edges(diagram.ts[after], log_t), cell_edges(betas[above], log_beta)
    axes = new_axes(ax)
    time_axis(axes, log_t)
    axes.set_yscale("log" if log_beta else "linear")
    probability = diagram.probability[rows][np.ix_(above, after)]
    image = axes.pcolormesh(x, y, probability, vmin=0, vmax=1, cmap="cividis", rasterized=True)
    met = rf"$P\,(\langle x_i, x_j \rangle \geq {diagram.threshold:g})$"
    axes.figure.colorbar(image, ax=axes, label=met)
    shown = np.where(np.isfinite(curve), curve, np.nan)
    axes.plot(shown, betas, color=COLOURS[1], linewidth=2, label="equiangular tokens")
    axes.set(xlim=x[[0, -1]], ylim=y[[0, -1]], ylabel=r"$\beta$")
    axes.set_title(f"$n$ = {diagram.n}, $d$ = {diagram.d}")
    axes.legend(loc="upper left", facecolor="white", framealpha=0.9)
    return axes


# ------------------------------------------------------------------ the tree of merges


def merge_tree(tree: MergeTree, *, max_leaves: int = 200, ax: Axes | None = None) -> Axes:
    """A dendrogram: which clusters merge, and when.

    The leaves are the tokens, in an order in which no lines cross. Of more than `max_leaves`
    tokens the last merges are drawn: the leaves are then the clusters at the time from which on
    there are no more than that. The axis of t is logarithmic where the merges drawn cover over two
    decades.

    **Arguments:** `tree`: a `jaxflow.observables.MergeTree`; `ax`: Matplotlib axes, default
    new ones.

    **Returns:** the Matplotlib axes that hold the drawing.

    **Raises:** `ValueError` for a tree without merges, or with more than `max_leaves` roots;
    `TypeError` for what is no tree.

    ```python
    >>> angles = jnp.array([[0.0, 1.0, 3.0], [0.0, 0.01, 3.0]])
    >>> tree = jaxflow.observables.merge_tree([0.0, 1.0], jaxflow.measure.from_angles(angles))
    >>> axes = jaxflow.viz.merge_tree(tree)

    ```
    """
    instance("tree", tree, MergeTree, "jaxflow.observables.merge_tree(sol.ts, sol.measures)")
    max_leaves = count("max_leaves", max_leaves)
    times, pairs, tokens = tree.times, np.sort(tree.pairs, axis=1), tree.tokens
    skipped = max(0, len(tokens) - max_leaves)
    if skipped >= len(times):
        raise ValueError(
            f"a tree is drawn of merges among at most {max_leaves} clusters; this one has "
            f"{len(times)} merges and ends with {len(tokens) - len(times)} clusters. Draw their "
            "number, jaxflow.viz.cluster_staircase(sol), or raise max_leaves."
        )
    # A cluster is named by its first token.
    leaves = np.setdiff1d(tokens, pairs[:skipped, 1])
    start, end, log = _span(times, skipped)
    late = np.maximum(times[skipped:], start).tolist()
    lines, heights = _dendrogram(late, pairs[skipped:].tolist(), leaves.tolist(), start, end)
    axes = new_axes(ax)
    collection = require("matplotlib.collections").LineCollection
    axes.add_collection(collection(lines, colors=COLOURS[0], linewidths=1.0))
    time_axis(axes, log)
    axes.set(xlim=(start, end), ylim=(-1, len(leaves)))
    few = len(leaves) <= 40
    axes.set_yticks(heights if few else [], leaves if few else [], fontsize=8)
    axes.set_ylabel(f"clusters at $t$ = {start:.3g}, by first token" if skipped else "token $i$")
    axes.spines[["top", "right", "left"]].set_visible(False)
    return axes


def _span(times, skipped):
    """Where the lines start and end, and whether the axis is logarithmic."""
    drawn = times[skipped:]
    positive = drawn[drawn > 0]
    log = len(positive) > 0 and bool(positive[-1] > 100 * positive[0])
    if log:
        margin = (positive[-1] / positive[0]) ** 0.05
        start, end = positive[0] / margin, positive[-1] * margin
    else:
        start = min(0.0, drawn[0])
        end = drawn[-1] + 0.05 * max(drawn[-1] - start, 1e-6)
    return max(start, times[skipped - 1]) if skipped else start, end, log


def _dendrogram(times, pairs, leaves, start, end):
    """A bracket a merge and a line a root, as points (t, height); and the height of each leaf.

    The members of a cluster are side by side at all times, so that no line passes through another.
    """
    members = {leaf: [leaf] for leaf in leaves}
    for a, b in pairs:
        members[a] += members.pop(b)
    place = {leaf: y for y, leaf in enumerate(sum(members.values(), []))}
    tips = {leaf: (start, float(y)) for leaf, y in place.items()}
    lines = []
    for t, (a, b) in zip(times, pairs, strict=True):
        (_, low), (_, high) = ends = tips[a], tips.pop(b)
        lines.append([ends[0], (t, low), (t, high), ends[1]])
        tips[a] = t, (low + high) / 2
    lines += [[tip, (end, tip[1])] for tip in tips.values()]
    return lines, [place[leaf] for leaf in leaves]
