"""One page of what a model does to a text along its depth."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .._page import assemble
from .._rules import instance
from ..models.inspection import BETAS, THRESHOLDS, Inspection
from .style import COLOURS, require, words

BINS = 60

# Titles of the sections, and what they show.
_SENSITIVITY = (
    "Sensitivity of the tokens",
    "|dL/dx_i(0)| |x_i(0)|: what a relative change of the embedded token does to the loss L. The "
    "darkest is the largest; the shade grows as the square root. In a causal text a token changes "
    "what is said of those after it alone.",
)
_PRODUCTS = (
    "Inner products",
    "The density of cos(x_i, x_j) over pairs of tokens at each time (left), and the number of "
    "clusters: tokens that a chain of cosines above a threshold links (right). In the theory all "
    "cosines tend to 1, cluster by cluster.",
)
_ENTROPY = (
    "Entropy of attention",
    "Of each head, at the tokens where its step begins; the dashed line is uniform attention.",
)
_TEMPERATURE = (
    "Inverse temperature of the heads",
    "beta is the slope of the scores of a head against the cosines of the tokens that it sees. The "
    "lines are the attention of the theory, softmax(beta cos), of the same tokens: a head on its "
    "line attends as the theory does, one below it is sharper than nearness explains, and one at "
    "the left edge scores tokens that are near no higher than others.",
)
_SPECTRA = (
    "Spectra",
    "The singular values of beta Q^T K and of O V: a line each time, the mean over its heads.",
)


def inspection_page(
    found: Inspection, labels: Sequence[str], about: Mapping[str, str] | None = None
) -> str:
    """One HTML page, which needs no other file.

    **Arguments:** `found`, by `jaxflow.models.inspect`; `labels`, the text of each token;
    `about`, lines {name: text} below the title.

    **Returns:** the HTML.

    **Raises:** `ValueError` or `TypeError` where these are no such things; `ImportError` without
    matplotlib.

    ```python
    >>> found = jaxflow.models.inspect(model, [3, 1, 4])  # doctest: +SKIP
    >>> page = jaxflow.viz.inspection_page(found, ["three", "one", "four"])  # doctest: +SKIP

    ```
    """
    instance("found", found, Inspection, "jaxflow.models.inspect(model, tokens)")
    labels = words(labels, len(found.sensitivity))
    rows = "".join(f"<tr><td>{_safe(k)}<td>{_safe(v)}" for k, v in (about or {}).items())
    spectra = "" if found.query_key is None else _picture(_spectra, found)
    sections = [
        (_SENSITIVITY, _text(found.sensitivity, labels)),
        (_PRODUCTS, _picture(_inner_products, found)),
        (_ENTROPY, _picture(_entropies, found)),
        (_TEMPERATURE, _picture(_temperatures, found)),
        (_SPECTRA, spectra),
    ]
    body = "".join(
        f"<h2>{title}</h2><p>{_safe(text)}</p>{content}"
        for (title, text), content in sections
        if content
    )
    title = "A text along the depth of a model"
    above = f'<h1>{title}</h1><div class="wide"><table class="about">{rows}</table></div>'
    return assemble(title, above + body, styles=["inspection.css"])


def _safe(text: str) -> str:
    return html.escape(text)


def _text(sensitivity: np.ndarray, labels: Sequence[str]) -> str:
    """The tokens, each on a ground of its sensitivity."""
    share = np.sqrt(np.nan_to_num(sensitivity / max(sensitivity.max(), 1e-30)))
    spans = (
        f'<span title="{_safe(repr(word))}: {value:.3g}" '
        f'style="background:rgb(var(--heat) / {part:.3f})">{_safe(_visible(word))}</span>'
        for word, value, part in zip(labels, sensitivity, share, strict=True)
    )
    return f'<p class="text">{"".join(spans)}</p>'


def _visible(word: str) -> str:
    """The word; one without a mark, such as a line feed, with a sign in its place."""
    return word.replace("\n", "\u21b5\n") or "\u2205"


def _picture(draw: Any, found: Inspection) -> str:
    figure = require("matplotlib.figure").Figure(figsize=(11, 4.2), layout="constrained")
    draw(figure, found)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    data = base64.b64encode(content.getvalue()).decode()
    name = draw.__name__.strip("_").replace("_", " ")
    return f'<img alt="{name}" src="data:image/png;base64,{data}">'


# ------------------------------------------------------------------ pictures


def _inner_products(figure: Any, found: Inspection):
    left, right = figure.subplots(1, 2)
    unit = found.points / np.linalg.norm(found.points, axis=-1, keepdims=True)
    upper = np.triu_indices(unit.shape[1], 1)
    cosines = np.einsum("kid,kjd->kij", unit, unit)[:, *upper]
    edges = np.linspace(min(-0.25, cosines.min()), 1.0, BINS + 1)
    density = [np.histogram(row, edges, density=True)[0] for row in np.clip(cosines, -1, 1)]
    mesh = left.pcolormesh(
        _time_edges(found.ts), edges, np.log10(np.array(density).T + 1e-2), cmap="viridis"
    )
    left.plot(found.ts, cosines.mean(axis=1), color="white", label="mean")
    left.set(xlabel="$t$", ylabel=r"$\cos(x_i, x_j)$")
    left.legend(loc="lower right", facecolor=COLOURS[0], labelcolor="white")
    figure.colorbar(mesh, ax=left, label=r"$\log_{10}$ of the density")
    for k, threshold in enumerate(THRESHOLDS):
        right.step(found.ts, found.clusters[:, k], where="post", label=f"cosine > {threshold}")
    right.set(xlabel="$t$", ylabel="clusters", ylim=(0, None))
    right.yaxis.get_major_locator().set_params(integer=True)
    right.legend()


def _entropies(figure: Any, found: Inspection):
    axes = figure.subplots()
    for head in range(found.entropy.shape[1]):
        colour = COLOURS[head % len(COLOURS)]
        axes.plot(found.ts[:-1], found.entropy[:, head], "o-", color=colour, label=f"head {head}")
    axes.axhline(found.most, color="black", linestyle="--", label="uniform")
    axes.set(xlabel="$t$", ylabel="entropy", ylim=(0, 1.08 * found.most))
    if found.entropy.shape[1] <= 16:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def _temperatures(figure: Any, found: Inspection):
    axes = figure.subplots()
    low, high = BETAS[0], BETAS[-1]
    for k, colour in enumerate(_by_depth(figure, axes, found)):
        axes.plot(BETAS, found.curve[k], color=colour, linewidth=1)
        place = np.clip(found.beta[k], low, high)
        axes.plot(place, found.entropy[k], "o", color=colour, markeredgecolor="white")
    axes.set(xscale="log", xlabel=r"$\beta$", ylabel="entropy", xlim=(low, high))
    axes.set_ylim(0, 1.08 * found.most)


def _spectra(figure: Any, found: Inspection):
    axes = figure.subplots(1, 2)
    pair = zip(axes, (found.query_key, found.output_value), strict=True)
    for panel, values in pair:
        assert values is not None
        for k, colour in enumerate(_by_depth(figure, panel, found)):
            ranks = np.arange(1, values.shape[-1] + 1)
            panel.plot(ranks, values[k].mean(axis=0), "o-", markersize=3, color=colour)
        panel.set(yscale="log", xlabel="$k$")
    axes[0].set(ylabel=r"singular values of $\beta\, Q^\top K$")
    axes[1].set(ylabel="singular values of $O\\, V$")


def _by_depth(figure: Any, axes: Any, found: Inspection) -> list[Any]:
    """A colour for each step, and a bar that names them."""
    ts = found.ts[:-1]
    colours = require("matplotlib").colormaps["viridis"]
    norm = require("matplotlib.colors").Normalize(ts[0], max(ts[-1], ts[0] + 1e-9))
    figure.colorbar(require("matplotlib.cm").ScalarMappable(norm, colours), ax=axes, label="$t$")
    return [colours(norm(t)) for t in ts]


def _time_edges(ts: np.ndarray) -> np.ndarray:
    middle = (ts[1:] + ts[:-1]) / 2
    return np.concatenate([ts[:1], middle, ts[-1:]])
