"""Figures and films are compared by their data."""

import sys
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxflow as jf
from jaxflow.observables import MergeTree
from jaxflow.phase import PhaseDiagram
from jaxflow.viz.film import _boxes, _Stage
from jaxflow.viz.run import read_run
from jaxflow.viz.style import style

Figure = pytest.importorskip("matplotlib.figure").Figure
viz: Any = jf.viz  # a checker of types cannot follow matplotlib's artists

N, TIMES = 24, 9
LINEAR = jnp.linspace(0.0, 8.0, TIMES)
SPACED = jnp.concatenate([jnp.zeros(1), jnp.geomspace(0.1, 1e3, TIMES - 1)])


def solution(points, ts=LINEAR, geometry: Any = jf.Sphere(), **observed):
    """A solution without a solve."""
    return jf.FlowSolution(
        ts=ts,
        measures=jf.Measure(points),
        observed=observed,
        ys=None,
        t0=ts[0],
        end=ts[-1],
        final=jf.Measure(points[-1]),
        stats={},
        result=diffrax.RESULTS.successful,
        event_mask=None,
        interpolation=None,
        geometry=geometry,
        log_weights=None,
    )


def gathering(d, ts=LINEAR, geometry: Any = jf.Sphere(), n=N):
    """Tokens that move to the nearest of six places."""
    centres, x = jnp.split(jax.random.normal(jax.random.key(0), (6 + n, d)), [6])
    goals = centres[jnp.argmax(x @ centres.T, axis=1)]
    left = jnp.exp(-ts)[:, None, None]
    points = geometry.retract(goals[None] * (1 - left) + x[None] * left)
    return solution(points, ts, geometry, energy=ts**2)


@pytest.fixture(scope="module")
def sol():
    return gathering(3)


def last_labels(sol):
    return np.asarray(jf.observables.cluster_labels(sol.measures[-1]))


# ------------------------------------------------------------------ tokens


def test_points(sol):
    mu = sol.measures[0]
    ax = Figure().add_subplot()
    assert viz.points(mu, labels=[str(j) for j in range(N)], ax=ax) is ax
    drawn = np.concatenate([c.get_offsets() for c in ax.collections])
    expected = np.asarray(mu.points[:, :2])  # flat axes see the first two coordinates
    np.testing.assert_allclose(np.sort(drawn, axis=0), np.sort(expected, axis=0), rtol=1e-6)
    assert [t.get_text().strip() for t in ax.texts] == [str(j) for j in range(N)]
    assert viz.points(mu).name == "3d"


def test_axes_fit_tokens_of_any_extent():
    """One cluster of R^d is shown at a hundredth of its distance from 0, not at rounding's size;
    tokens on a line, on an axis a twentieth as wide."""
    one = np.full((5, 2), 3.0) + 1e-9 * np.arange(5)[:, None]
    axes = viz.points(jf.Measure(one.astype(np.float32)), geometry=jf.Euclidean())
    np.testing.assert_allclose(axes.get_xlim(), [2.97, 3.03], rtol=1e-5)
    line = np.stack([np.linspace(-1, 1, 5), np.zeros(5)], axis=1).astype(np.float32)
    axes = viz.points(jf.Measure(line), geometry=jf.Euclidean())
    np.testing.assert_allclose(axes.get_xlim(), [-1.1, 1.1], rtol=1e-5)
    np.testing.assert_allclose(axes.get_ylim(), [-0.055, 0.055], rtol=1e-5)


def test_colours_are_of_several_clusters():
    """Where all tokens end as one, of the last saved time at which there were two or more."""
    angles = jnp.exp(-LINEAR)[:, None] * jnp.array([0.0, 0.3, 2.0])[None]
    one = solution(jf.measure.from_angles(angles).points)
    counts = np.asarray(jf.observables.cluster_count(one.measures))
    last = int(np.flatnonzero(counts > 1)[-1])
    assert counts[-1] == 1 and 0 < last < TIMES - 1
    labels, k = read_run(one).colouring(0.999)
    assert k == last and labels.tolist() == [0, 0, 1]
    assert f"cluster at t = {float(LINEAR[last]):.4g}" in viz.summary(one).get_suptitle()


@pytest.mark.parametrize("geometry", [jf.Sphere(), jf.Euclidean()])
def test_hulls(geometry):
    """Of tokens that shrink to (1 - t/10) x, once they are rescaled by e^{-t}."""
    x = np.random.default_rng(0).normal(size=(N, 2)).astype(np.float32)
    factors = (1 - np.asarray(LINEAR) / 10)[:, None, None]
    grown = solution(jnp.asarray(np.exp(LINEAR)[:, None, None] * factors * x), geometry=geometry)
    axes = viz.hulls(grown, rescale=lambda t, x: np.exp(-t) * x, times=TIMES)
    turn = np.linspace(0, 2 * np.pi, 64)
    turns = np.stack([np.cos(turn), np.sin(turn)])
    rings = [line.get_xydata() for line in axes.get_lines() if not line.get_label()[0] == "_"]
    support = np.stack([(ring @ turns).max(axis=0) for ring in rings])
    np.testing.assert_allclose(support, factors[..., 0] * (x @ turns).max(axis=0), rtol=1e-5)


def test_hulls_are_in_the_plane(sol):
    with pytest.raises(ValueError, match="in the plane, d = 2; the tokens have d = 3"):
        viz.hulls(sol)


def test_trajectories_in_space_end_in_their_clusters(sol):
    ax = viz.trajectories(sol)
    assert ax.name == "3d"
    paths = [np.array(line.get_data_3d()) for line in ax.lines][-N:]
    np.testing.assert_allclose(np.array(paths), jnp.moveaxis(sol.measures.points, 0, 2))
    colours = np.array([line.get_color() for line in ax.lines[-N:]])
    labels = last_labels(sol)
    np.testing.assert_array_equal(labels[:, None] == labels, colours[:, None] == colours)


def test_trajectories_of_few_tokens_in_many_dimensions():
    ax = viz.trajectories(gathering(5), max_points=4)
    paths = np.array([line.get_data_3d() for line in ax.lines[-4:]])
    assert paths.shape == (4, 3, TIMES) and np.linalg.norm(paths, axis=1).max() < 1 + 1e-6
    assert ax.get_xlabel() == r"$\langle x, v_1 \rangle$"


def test_trajectories_on_the_circle_go_through_the_cut():
    # Nearly one and a half times around, in opposite directions.
    angles = np.linspace(0.0, 2.9 * np.pi, TIMES)[:, None] * np.array([1.0, -1.0]) + 0.1
    points = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    ax = viz.trajectories(solution(points))
    assert ax.get_ylim() == pytest.approx((-np.pi, np.pi)) and ax.get_ylabel() == r"$\theta_i$"
    copies = np.array([line.get_ydata() for line in ax.lines])
    turns = 2 * np.pi * np.array([0, -1, 1, 0])
    expected = angles.T[[0, 0, 1, 1]] + turns[:, None]
    np.testing.assert_allclose(copies, expected, atol=1e-5)  # ten roundings of 3 pi in float32
    # At each time one of the two copies of a token is in sight.
    assert ((np.abs(copies) <= np.pi).sum(axis=0) == 2).all()


def test_trajectories_on_the_line():
    sol = gathering(1, geometry=jf.Euclidean())
    ax = viz.trajectories(sol)
    np.testing.assert_array_equal([x.get_ydata() for x in ax.lines], sol.measures.points[..., 0].T)
    assert ax.get_ylabel() == "$x_i$" and ax.get_xlabel() == "$t$"


# ------------------------------------------------------------------ over time


def test_summary_has_five_panels(sol, tmp_path):
    figure = viz.summary(sol, title="A flow")
    panels = [ax for ax in figure.axes if ax.get_label() != "<colorbar>"]
    assert [ax.name for ax in panels] == ["3d", "3d", *["rectilinear"] * 3]
    assert [ax.get_title() for ax in panels[:2]] == ["$t$ = 0", "$t$ = 8"]
    figure.savefig(tmp_path / "flow.png")


@pytest.mark.parametrize("d, geometry", [(2, jf.Sphere()), (2, jf.Euclidean()), (5, jf.Sphere())])
def test_summary_elsewhere(d, geometry, tmp_path):
    viz.summary(gathering(d, SPACED, geometry)).savefig(tmp_path / "flow.png")


def test_no_cluster_of_the_least_mass_is_drawn_as_none(sol):
    none = solution(sol.measures.points, clusters=jnp.zeros(TIMES))
    low, high = viz.cluster_staircase(none).get_ylim()
    assert 0 < low < 1 < high


def test_inner_products(sol):
    ax = viz.inner_product_histogram(sol, bins=50)
    density = np.ma.filled(ax.collections[0].get_array(), 0)
    assert density.shape == (50, TIMES)
    np.testing.assert_allclose(density.sum(axis=0) * 2 / 50, 1, rtol=1e-5)
    gram = np.asarray(jf.observables.inner_products(sol.measures[0]))
    above = (gram[np.triu_indices(N, 1)] > 0).mean()
    np.testing.assert_allclose(density[25:, 0].sum() * 2 / 50, above, rtol=1e-5)
    assert ax.get_xlabel() == "$t$"


def test_curves_over_time(sol):
    ax = viz.cluster_staircase(sol)
    np.testing.assert_array_equal(
        ax.lines[0].get_ydata(), jf.observables.cluster_count(sol.measures)
    )
    np.testing.assert_array_equal(
        viz.energy_curve(sol).lines[0].get_ydata(), sol.observed["energy"]
    )
    with pytest.raises(ValueError, match="did not observe its energy"):
        viz.energy_curve(solution(sol.measures.points))


PANELS = [viz.inner_product_histogram, viz.cluster_staircase, viz.energy_curve, viz.trajectories]


@pytest.mark.parametrize("panel", PANELS)
def test_time_axes_are_logarithmic_where_times_are(panel):
    assert panel(gathering(2)).get_xscale() == "linear"
    ax = panel(gathering(2, SPACED))
    assert ax.get_xscale() == "log"
    if panel is viz.inner_product_histogram:  # which leaves out t = 0
        assert ax.collections[0].get_array().shape[1] == TIMES - 1
    assert 0.05 < ax.get_xlim()[0] <= 0.1001 and 999 < ax.get_xlim()[1] < 2000


@pytest.mark.parametrize(
    "ts",
    [
        np.linspace(0.1, 100, 9),  # evenly spaced
        np.geomspace(1, 90, 9),  # within two decades
        np.array([0, 0, 1, 10, 100, 1000]),
        np.array([1, 1e3]),
        np.array([1, 2, 100, 1000]),
    ],
)
def test_other_times_have_a_linear_axis(ts):
    sol = gathering(2, jnp.asarray(ts, jnp.float32))
    assert viz.energy_curve(sol).get_xscale() == "linear"


def test_curves_of_several_runs():
    runs = {"one": (LINEAR, LINEAR**2), "two": ([0.0, 1.0, 2.0], [3, float("nan"), 5])}
    ax = viz.curves(runs, ylabel="energy")
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), LINEAR**2)
    np.testing.assert_array_equal(ax.lines[1].get_xydata(), [[0, 3], [2, 5]])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["one", "two"]
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_xscale()) == ("$t$", "energy", "linear")
    assert viz.curves({"one": (SPACED, SPACED)}).get_xscale() == "log"
    with pytest.raises(ValueError, match=r"'two' has \(3,\) times and \(2,\) values"):
        viz.curves({"two": ([0, 1, 2], [3, 4])})
    with pytest.raises(ValueError, match="no curve to draw"):
        viz.curves({})


def test_needs_points(sol):
    empty = jf.FlowSolution(**{**vars(sol), "measures": None})
    with pytest.raises(ValueError, match=r"needs the points: .*SaveAt\(ts="):
        viz.summary(empty)


# ------------------------------------------------------------------ diagrams


def test_what_a_user_wrote_is_shown_as_it_is_written(sol):
    """Matplotlib leaves out names in _, and takes what stands between two $ for mathematics."""
    names = ["_hidden", r"$\beta$ a_b", "$5 and $6", "$"]
    ax = viz.curves({name: ([0, 1], [1, 2]) for name in names}, xlabel="$t$", ylabel="a_b $x^2$")
    ax = viz.curves({"_more": ([0, 1], [2, 3])}, ax=ax)
    shown = ax.get_legend().get_texts()
    assert [text.get_text() for text in shown] == [*names, "_more"]
    words = [*names, "x" * 50, *(f"$w_{j}$" for j in range(N - 5))]
    attention = viz.attention(jf.SelfAttention(), sol.measures[0], labels=words)
    ticks = attention.get_yticklabels()
    assert [tick.get_text() for tick in ticks[:5]] == [*names, "x" * 19 + "…"]
    beside = viz.points(sol.measures[0], labels=words).texts
    title = viz.summary(sol, title=r"\frac $x$")._suptitle
    assert title is not None and title.get_text() == r"\frac $x$"
    for text in (*shown, *ticks, *beside, title, ax.yaxis.label):
        assert not text.get_parse_math() and not text.get_usetex()


@pytest.mark.parametrize(
    "draw, error, message",
    [
        (lambda sol: viz.summary(sol, system=0), ValueError, "drop system"),
        (lambda sol: viz.trajectories(sol, max_points=1), ValueError, "at least 2"),
        (lambda sol: viz.inner_product_histogram(sol, bins=10**9), MemoryError, "fewer bins"),
        (lambda sol: viz.points(sol.measures), ValueError, "one measure"),
        (lambda sol: viz.points(sol.measures[0], clusters=[0]), ValueError, "clusters must"),
        (lambda sol: viz.points(sol.measures[0], directions=np.eye(2)), ValueError, "columns"),
        (lambda sol: viz.attention(jf.SelfAttention(), sol.measures), ValueError, "one measure"),
        (lambda sol: viz.training_curve([{"step": 1}]), ValueError, "no logged step"),
        (lambda sol: viz.curves({"a": ([1.0], [np.nan])}), ValueError, "'a' has no finite"),
        (lambda sol: viz.film(sol, "flow.gif", fps=0), ValueError, "fps must be positive"),
        (lambda sol: viz.film(sol, "none/flow.gif"), ValueError, "folder that exists"),
    ],
)
def test_refused_before_anything_is_drawn(sol, draw, error, message):
    with pytest.raises(error, match=message):
        draw(sol)


def test_attention(sol):
    field, mu = jf.SelfAttention(beta=4.0), sol.measures[0]
    words = [f"w{j}" for j in range(N)]
    ax = viz.attention(field, mu, labels=words)
    matrix = jf.observables.attention_matrix(field, mu)
    np.testing.assert_array_equal(ax.images[0].get_array(), matrix)
    assert [t.get_text() for t in ax.get_yticklabels()] == words


def test_attention_writes_as_many_words_as_there_is_room_for():
    mu = gathering(2, n=120).measures[0]
    ticks = viz.attention(jf.SelfAttention(), mu, labels=[str(j) for j in range(120)]).get_xticks()
    assert 20 < len(ticks) < 60 and (ticks[0], ticks[-1]) == (0, 119)
    with pytest.raises(ValueError, match="one string a token: 120, got 1"):
        viz.attention(jf.SelfAttention(), mu, labels=["one"])


def test_attention_of_many_tokens_is_refused():
    mu = jf.Measure(jnp.ones((100_000, 2)))
    with pytest.raises(ValueError, match=r"got 100000: take .*Measure\(mu.points\[::100\]\)"):
        viz.attention(jf.SelfAttention(beta=4.0), mu)


def diagram(betas, ts):
    betas, ts = np.asarray(betas, float), np.asarray(ts, float)
    curve = np.where(betas > 4, np.inf, betas)
    return PhaseDiagram(
        betas=betas,
        ts=ts,
        probability=1 / (1 + np.exp(betas[:, None] - ts)),
        standard_error=np.zeros((len(betas), len(ts))),
        curve=curve,
        threshold=0.999,
        n=32,
        d=128,
        systems=1,
    )


def test_phase_diagram(tmp_path):
    drawn = diagram([5.0, 1.0, 3.0], [0.0, 1.0, 2.0, 4.0])
    ax = viz.phase_diagram(drawn)
    mesh, line = ax.collections[0], ax.lines[0]
    np.testing.assert_array_equal(mesh.get_array(), drawn.probability[[1, 2, 0]])
    corners = mesh.get_coordinates()
    np.testing.assert_allclose(corners[0, :, 0], [0, 0.5, 1.5, 3, 4])
    np.testing.assert_allclose(corners[:, 0, 1], [1, 2, 4, 5])
    np.testing.assert_array_equal(line.get_xydata(), [[1, 1], [3, 3], [np.nan, 5]])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("$t$", r"$\beta$")
    assert ax.get_title() == "$n$ = 32, $d$ = 128"
    ax.get_figure().savefig(tmp_path / "phase.png")


def test_phase_diagram_on_logarithmic_axes():
    ax = viz.phase_diagram(diagram(np.geomspace(0.1, 100, 5), SPACED))
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert ax.collections[0].get_array().shape == (5, TIMES - 1)
    one = viz.phase_diagram(diagram([2.0], LINEAR))
    assert one.get_ylim() == (1.5, 2.5)


def random_tree(n, k, seed=0):
    """k mergers of random pairs of clusters."""
    rng = np.random.default_rng(seed)
    sizes, pairs, merged = {i: 1 for i in range(n)}, [], []
    for _ in range(k):
        a, b = sorted(rng.choice(list(sizes), 2, replace=False).tolist())
        sizes[a] += sizes.pop(b)
        pairs.append((a, b))
        merged.append(sizes[a])
    return MergeTree(n, np.sort(rng.uniform(1, 9, k)), np.array(pairs), np.array(merged))


def pieces(ax):
    """Horizontal (y, from, to) and vertical (t, from, to) pieces of the lines."""
    lines = [np.array(line) for line in ax.collections[0].get_segments()]
    ends = np.array([piece for line in lines for piece in zip(line[:-1], line[1:], strict=True)])
    level = ends[:, 0, 1] == ends[:, 1, 1]
    across = [(a[1], *sorted((a[0], b[0]))) for a, b in ends[level]]
    return across, [(a[0], *sorted((a[1], b[1]))) for a, b in ends[~level]]


@pytest.mark.parametrize("k", [29, 20])
def test_lines_of_a_merge_tree_do_not_cross(k):
    tree = random_tree(30, k)
    ax = viz.merge_tree(tree)
    across, up = pieces(ax)
    assert sorted(t for t, *_ in up) == sorted(tree.times)
    for t, low, high in up:
        assert not [y for y, start, end in across if low < y < high and start < t < end]
    right = ax.get_xlim()[1]
    assert sum(end == right for *_, end in across) == 30 - k  # the roots
    heights = dict(zip(ax.get_yticks().astype(int), range(30), strict=True))
    assert sorted(heights) == list(range(30)), "each leaf has a height of its own"
    assert [t.get_text() for t in ax.get_yticklabels()] == [str(i) for i in range(30)]


def test_a_merge_tree_by_hand():
    tree = MergeTree(
        4, np.array([1.0, 2.0, 4.0]), np.array([[1, 3], [0, 2], [0, 1]]), np.array([2, 2, 4])
    )
    ax = viz.merge_tree(tree)
    one, two, three, root = (np.array(line).tolist() for line in ax.collections[0].get_segments())
    # The leaves from below: 0, 2, 1, 3.
    assert one == [[0, 2], [1, 2], [1, 3], [0, 3]]
    assert two == [[0, 0], [2, 0], [2, 1], [0, 1]]
    assert three == [[2, 0.5], [4, 0.5], [4, 2.5], [1, 2.5]]
    assert root == [[4, 1.5], [4.2, 1.5]]


def test_a_large_tree_is_drawn_from_above():
    tree = random_tree(1000, 995)
    ax = viz.merge_tree(tree, max_leaves=50)
    across, up = pieces(ax)
    np.testing.assert_array_equal(sorted(t for t, *_ in up), tree.times[950:])
    assert ax.get_xlim()[0] == tree.times[949]
    assert sum(start == ax.get_xlim()[0] for _, start, _ in across) == 50
    with pytest.raises(ValueError, match="at most 5 clusters; this one has 995 merges"):
        viz.merge_tree(tree, max_leaves=5)


def test_a_merge_tree_over_decades_has_a_logarithmic_axis():
    sizes, pairs = np.array([2, 3, 4]), np.array([[0, 1], [0, 2], [0, 3]])
    ax = viz.merge_tree(MergeTree(4, np.array([0.0, 1.0, 1e3]), pairs, sizes))
    assert ax.get_xscale() == "log" and 0 < ax.get_xlim()[0] < 1
    assert all(start > 0 for _, start, _ in pieces(ax)[0])


# ------------------------------------------------------------------ films


def test_film(sol, tmp_path):
    image = pytest.importorskip("PIL.Image")
    calls = []
    path = viz.film(
        sol,
        tmp_path / "flow.gif",
        fps=4,
        seconds=1,
        max_points=10,
        dpi=40,
        progress=lambda *done: calls.append(done),
    )
    assert calls == [(k, 4) for k in range(1, 5)]
    with image.open(path) as gif:
        assert (gif.n_frames, gif.size, gif.info["duration"]) == (4, (200, 180), 250)
        frames = []
        for k in range(4):
            gif.seek(k)
            frames.append(np.asarray(gif.convert("RGB"), int))
    for one, other in zip(frames[:-1], frames[1:], strict=True):
        assert np.abs(one - other).max() > 50
    assert (frames[0][:5] == 255).all()  # white paper
    assert (np.ptp(frames[-1], axis=-1) > 60).any()  # colours


def test_tokens_of_a_film_lie_where_its_axes_are():
    """Through axes that hold still until a token leaves them, and then have room."""
    x = np.geomspace(1, 100, 200)[:, None, None] * np.array([[-1.0, 0, 0], [0, 1, 0.5]])[None]
    boxes = _boxes(x)
    assert len({id(box) for box in boxes}) < 25
    for points, box in zip(x, boxes, strict=True):
        assert (box[0] <= points).all() and (points <= box[1]).all()
    stage = _Stage(*style(np.arange(2)), np.eye(3), None, 40.0)
    stage.set_up(boxes[-1])
    stage.axes.scatter(*x[-1].T)
    pixels, depth = stage.project(x[-1])
    again = stage.axes.collections[-1]
    again.do_3d_projection()
    np.testing.assert_allclose(pixels, stage.axes.transData.transform(again.get_offsets()))
    assert (0 < depth).all() and (depth < 1).all()


def test_film_without_ffmpeg(sol, tmp_path, monkeypatch):
    animation = pytest.importorskip("matplotlib.animation")
    monkeypatch.setattr(animation.FFMpegWriter, "isAvailable", lambda: False)
    with pytest.raises(RuntimeError, match=r"flow.mp4 needs ffmpeg, .* or write flow.gif"):
        viz.film(sol, tmp_path / "flow.mp4")
    with pytest.raises(ValueError, match=r".mp4 or .gif, got .*flow.avi"):
        viz.film(sol, tmp_path / "flow.avi")
    plane = gathering(2, geometry=jf.Euclidean())
    path = viz.film(plane, str(tmp_path / "flow"), fps=2, seconds=1, dpi=20)
    assert path == tmp_path / "flow.gif" and path.read_bytes()[:6] == b"GIF89a"


def test_film_by_ffmpeg(sol, tmp_path):
    animation = pytest.importorskip("matplotlib.animation")
    if not animation.FFMpegWriter.isAvailable():
        pytest.skip("no ffmpeg on this machine")
    path = viz.film(sol, tmp_path / "flow", fps=4, seconds=1, dpi=40)
    assert path == tmp_path / "flow.mp4" and path.read_bytes()[4:8] == b"ftyp"


# ------------------------------------------------------------------ optional libraries


def test_missing_matplotlib_is_named(sol, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'matplotlib: pip install "jaxflow\[viz\]"'):
        viz.summary(sol)
