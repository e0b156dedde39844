"""Pictures of a flow: a page that plays it, figures for print, a film.

    sphere(sol)                    a Page       sphere(sol).write_html("flow.html") opens from disk
    summary(sol)                   matplotlib   the first panels below on one sheet
    film(sol, "flow.mp4")          matplotlib   the tokens in motion

    points(mu)                     tokens on the circle or the sphere, coloured by cluster
    inner_product_histogram(sol)   the density of <x_i, x_j> against t
    cluster_staircase(sol)         the number of clusters against t
    energy_curve(sol)              sol.observed["energy"] against t
    trajectories(sol)              the path of each token
    hulls(sol)                     the convex hull of the tokens at a few times, in the plane
    attention(field, mu)           the matrix A_ij
    merge_tree(tree)               which clusters merge, and when
    phase_diagram(diagram)         the probability of clustering over (t, beta)
    curves({name: (ts, values)})   one curve a run
    training_curve(history)        training and validation loss against the step
    inspection_page(found, words)  one HTML page of what a model does to a text

Every panel takes and returns a matplotlib `Axes`. Tokens in more than three dimensions are
projected on principal directions: leading eigenvectors of E[x x^T] at the last time. The axis of
time is logarithmic where the saved times are. Matplotlib comes with `jaxflow[viz]` and is imported
where it is used; a page needs no library.
"""

from .diagrams import attention, merge_tree, phase_diagram
from .figures import (
    cluster_staircase,
    curves,
    energy_curve,
    inner_product_histogram,
    summary,
    training_curve,
)
from .film import film
from .inspection import inspection_page
from .page import Page, sphere
from .run import System
from .tokens import hulls, points, trajectories

__all__ = [
    "Page",
    "System",
    "attention",
    "cluster_staircase",
    "curves",
    "energy_curve",
    "film",
    "hulls",
    "inner_product_histogram",
    "inspection_page",
    "merge_tree",
    "phase_diagram",
    "points",
    "sphere",
    "summary",
    "training_curve",
    "trajectories",
]


def __dir__() -> list[str]:
    return __all__
