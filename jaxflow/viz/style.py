"""What all pictures share: colours and markers, limits and names of axes, optional libraries."""

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from .._rules import instance

# Okabe and Ito's palette, told apart by colour-blind readers, and grey for tokens without mass.
# Cluster c has the colour c mod 8 and the marker c // 8 mod 5.
COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #56B4E9 #E69F00 #000000 #F0E442 #999999".split()
MARKERS = {"circle": "o", "diamond": "D", "square": "s", "cross": "P", "x": "X"}
FAINT = "#B0B0B0"
ROUND = [a * 10**b for b in range(9) for a in (1, 2, 5)]


def style(clusters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The colour of each token and the number of its marker."""
    cycle = len(COLOURS) - 1
    colour = np.where(clusters < 0, cycle, clusters % cycle)
    return np.array(COLOURS)[colour], np.maximum(clusters, 0) // cycle % len(MARKERS)


def words(labels: Sequence[str] | None, n: int) -> Sequence[str]:
    """A word a token."""
    if labels is None:
        return [f"token {j}" for j in range(n)]
    listed = isinstance(labels, Sequence | np.ndarray) and not isinstance(labels, str)
    if not listed or not all(isinstance(word, str) for word in labels):
        raise TypeError(f"labels must be a list of strings, one a token; got {labels!r:.80}.")
    if len(labels) != n:
        raise ValueError(f"labels must have one string a token: {n}, got {len(labels)}.")
    return labels


# What a user or a model wrote is shown as it is written: $ and \\ are no mathematics there.
VERBATIM = {"parse_math": False, "usetex": False}


def name_legend(axes: Any, lines: Sequence[Any], **look: Any) -> None:
    """A legend of lines by their labels; Matplotlib would leave out those that start with _."""
    legend = axes.legend(lines, [str(k) for k in range(len(lines))], **look)
    for text, line in zip(legend.get_texts(), lines, strict=True):
        text.set(text=line.get_label(), **VERBATIM)


# ------------------------------------------------------------------ axes


def limits(x: np.ndarray, radius: float | None, margin: float = 0.05) -> np.ndarray:
    """The ends of each axis, (k, 2): those of the sphere, or else of the points."""
    x = x.reshape(-1, x.shape[-1])
    low, high = x.min(axis=0), x.max(axis=0)
    if radius is not None:
        low, high = np.full_like(low, -radius), np.full_like(high, radius)
    wider = np.maximum(margin * (high - low), 1e-6 * np.abs(x).max() + 1e-12)
    return np.stack([low - wider, high + wider], axis=1)


def token_limits(x: np.ndarray, radius: float | None) -> np.ndarray:
    """The ends of the axes on which tokens are shown, (k, 2).

    Those that hold them, and no less than a twentieth of the widest axis and a hundredth of the
    distance from 0: tokens on a line, or in one cluster, are not shown at the size of rounding.
    """
    ends = limits(x, radius)
    middle, half = ends.mean(axis=1), np.ptp(ends, axis=1) / 2
    half = np.maximum(half, max(half.max() / 20, np.abs(x).max() / 100))
    return np.stack([middle - half, middle + half], axis=1)


def axis_names(directions: np.ndarray, coordinate: str, projection: str) -> list[str]:
    """The names of the coordinates, or those of principal directions."""
    d, k = directions.shape
    return [(coordinate if d <= 3 else projection).format(i) for i in range(1, k + 1)]


def log_spaced(values: np.ndarray) -> bool:
    """Whether values, but for a first 0, cover over two decades in a nearly constant ratio.

    The last step may be shorter: there an event has stopped the flow.
    """
    positive = values[1:] if values[0] == 0 else values
    if len(positive) < 4 or (positive <= 0).any():
        return False
    steps = np.diff(np.log10(positive))
    return bool(steps.sum() > 2 and steps.max() < 1.5 * steps[:-1].min())


def cell_edges(centres: np.ndarray, log: bool) -> np.ndarray:
    """The ends of cells around increasing values: half-way between them, of logarithms where log.

    The first and the last cell end at their value.
    """
    x = np.log(centres) if log else np.asarray(centres, float)
    edges = np.concatenate([x[:1], (x[1:] + x[:-1]) / 2, x[-1:]])
    edges = edges if len(x) > 1 else x + np.array([-0.5, 0.5])
    return np.exp(edges) if log else edges


def wires(k: int) -> np.ndarray:
    """The unit circle (k = 2), or meridians and parallels of the sphere: (k, curves, points)."""
    turn = np.linspace(0, 2 * np.pi, 73)
    circle = np.stack([np.cos(turn), np.sin(turn)])
    if k == 2:
        return circle[:, None]
    a, b = np.linspace(0, np.pi, 7)[:-1, None], np.linspace(-np.pi / 2, np.pi / 2, 7)[1:-1, None]
    meridians = np.cos(a) * circle[0], np.sin(a) * circle[0], np.ones_like(a) * circle[1]
    parallels = np.cos(b) * circle[0], np.cos(b) * circle[1], np.sin(b) * np.ones_like(turn)
    return np.concatenate([meridians, parallels], axis=1)


# ------------------------------------------------------------------ optional libraries


def require(module: str) -> Any:
    """An optional library, or an ImportError that names the line to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        raise ImportError(f'pictures need {library}: pip install "jaxflow[viz]".') from error


def new_axes(ax: Any, projection: str | None = None) -> Any:
    """The axes given, or those of a new figure; without pyplot, so of no window."""
    if ax is not None:
        return instance("ax", ax, require("matplotlib.axes").Axes, "matplotlib's figure.subplots()")
    figure = require("matplotlib.figure").Figure(figsize=(5, 4), layout="constrained")
    return figure.add_subplot(projection=projection)


def time_axis(axes: Any, log: bool, label: str = "$t$") -> None:
    """The axis of t; a logarithmic one leaves out t = 0."""
    if log:
        axes.set_xscale("log", nonpositive="mask")
    axes.set_xlabel(label)
