"""The page is compared by its data, and opened in a browser where there is one."""

import html
import json
import re
import shutil
import subprocess
import sys
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxflow as jf
import jaxflow.viz.run

go = pytest.importorskip("plotly.graph_objects")

N, TIMES = 24, 9


def solve(batch=()):
    x = jax.random.normal(jax.random.key(0), (*batch, N, 3))
    return jf.flow(
        jf.SelfAttention(beta=4.0),
        jf.Measure(jf.Sphere().retract(x)),
        t1=8.0,
        saveat=diffrax.SaveAt(ts=jnp.linspace(0.0, 8.0, TIMES)),
        observe={"energy": jf.observables.InteractionEnergy(4.0)},
    )


@pytest.fixture(scope="module")
def sol():
    return solve()


@pytest.fixture(scope="module")
def batched():
    return solve(batch=(2,))


def elsewhere(sol, d, geometry: Any = jf.Sphere()):
    """A solution in R^d without a solve: lines, put on the geometry."""
    x, v = jax.random.normal(jax.random.key(0), (2, N, d))
    points = geometry.retract(x[None] + sol.ts[:, None, None] * v[None])
    return replace(sol, measures=jf.Measure(points), geometry=geometry)


def replace(sol, **fields):
    """The solution with other fields."""
    values = {f: getattr(sol, f) for f in sol.__dataclass_fields__} | fields
    return jf.FlowSolution(**values)


def sphere(sol, **options) -> Any:  # a checker of types cannot follow a plotly figure
    return jf.viz.sphere(sol, **options)


def tokens(trace):
    """(k, n) coordinates of a trace or frame."""
    return np.stack([getattr(trace, a) for a in "xyz" if getattr(trace, a, None) is not None])


def moving(figure):
    """The traces that play: tokens, then a dot a panel."""
    return [figure.data[i] for i in figure.frames[0].traces]


# ------------------------------------------------------------------ the page


def test_frames_hold_the_tokens_at_each_time(sol):
    figure = sphere(sol)
    assert isinstance(figure, go.Figure) and len(figure.frames) == TIMES
    for k, frame in enumerate(figure.frames):
        # Rounded to four decimals.
        np.testing.assert_allclose(tokens(frame.data[0]), sol.measures.points[k].T, atol=6e-5)
    np.testing.assert_array_equal(tokens(moving(figure)[0]), tokens(figure.frames[0].data[0]))


def test_colour_is_the_last_cluster(sol):
    labels = np.asarray(jf.observables.cluster_labels(sol.measures[-1]))
    colours = np.array(moving(sphere(sol))[0].marker.color)
    assert 1 < labels.max() + 1 <= 8
    np.testing.assert_array_equal(
        labels[:, None] == labels, colours[:, None] == colours, "one colour a cluster"
    )


def test_many_clusters_differ_in_colour_or_marker(sol):
    marker = moving(sphere(elsewhere(sol, 3), threshold=1.0))[0].marker  # no two are linked
    assert len(set(zip(marker.color, marker.symbol, strict=True))) == N


def test_panels_follow_clusters_and_energy(sol):
    figure = sphere(sol)
    counts = jf.observables.cluster_count(sol.measures)
    for panel, values in enumerate((counts, sol.observed["energy"])):
        curve = figure.data[figure.frames[0].traces[0] - 2 + panel]
        np.testing.assert_array_equal(curve.y, values)
        np.testing.assert_array_equal(curve.x, sol.ts)
        for k, frame in enumerate(figure.frames):
            assert frame.data[1 + panel].x == (sol.ts[k],)
            assert frame.data[1 + panel].y == (values[k],)


def test_observed_counts_are_shown(sol):
    counts = jnp.linspace(30.0, 22.0, TIMES)
    figure = sphere(replace(sol, observed={"clusters": counts}))
    np.testing.assert_array_equal(figure.data[2].y, counts)
    assert [frame.data[1].text for frame in figure.frames[:2]] == [("30",), ("29",)]
    # Labels of the tokens, say, are not a number.
    figure = sphere(replace(sol, observed={"clusters": jnp.zeros((TIMES, N))}))
    np.testing.assert_array_equal(figure.data[2].y, jf.observables.cluster_count(sol.measures))


def test_clusters_of_many_tokens_are_counted_at_some_times(sol, monkeypatch):
    monkeypatch.setattr(jaxflow.viz.run, "PAIRS_AT_ONCE", 3 * N)
    figure = sphere(sol)
    curve = figure.data[2]
    counts = np.asarray(jf.observables.cluster_count(sol.measures))
    assert curve.x.tolist() == [0, 4, 8] and curve.mode == "lines+markers"
    np.testing.assert_array_equal(curve.y, counts[[0, 4, 8]])
    # Between them, the dot stays on the staircase.
    shown = [frame.data[1].y[0] for frame in figure.frames]
    assert shown == [*[counts[0]] * 4, *[counts[4]] * 4, counts[8]]


def test_time_axes_are_logarithmic_where_times_are(sol):
    spaced = replace(sol, ts=jnp.concatenate([jnp.zeros(1), jnp.geomspace(0.1, 1e3, TIMES - 1)]))
    for flow, kind in ((sol, None), (spaced, "log")):
        layout = sphere(flow).layout
        assert layout.xaxis.type == layout.xaxis2.type == kind


def test_play_pause_and_slider(sol):
    layout = sphere(sol).layout
    assert [b.label.split()[-1] for b in layout.updatemenus[0].buttons] == ["Play", "Pause"]
    assert [s.label for s in layout.sliders[0].steps] == [f"{t:g}" for t in sol.ts]
    assert layout.sliders[0].currentvalue.prefix == "t = "


def test_labels_are_under_the_pointer(sol):
    words = [f"<w{j}>" for j in range(N)]
    text = moving(sphere(sol, labels=words))[0].text
    assert text[3].startswith("&lt;w3&gt;<br>cluster ")
    formula = moving(sphere(sol, labels=["$x^2$"] * N))[0].text
    assert formula[0].startswith("&#36;x^2&#36;<br>")  # which MathJax would typeset
    with pytest.raises(TypeError, match="list of strings"):
        sphere(sol, labels="x" * N)
    with pytest.raises(ValueError, match="one string a token: 24, got 23"):
        sphere(sol, labels=words[1:])


def test_subsample(sol):
    figure = sphere(sol, max_points=10, max_frames=5)
    assert "10 of them drawn" in figure.layout.title.text
    assert [s.label for s in figure.layout.sliders[0].steps] == ["0", "2", "4", "6", "8"]
    drawn = tokens(figure.frames[-1].data[0])
    last = np.asarray(sol.measures.points[-1])
    assert drawn.shape == (3, 10)
    np.testing.assert_allclose(drawn[:, [0, -1]], last[[0, -1]].T, atol=6e-5)
    with pytest.raises(ValueError, match="at least 2"):
        sphere(sol, max_points=1)


def test_projection_is_on_principal_directions(sol):
    projected = elsewhere(sol, 5)
    figure = sphere(projected)
    assert "principal directions" in figure.layout.title.text
    assert figure.layout.scene.xaxis.title.text == "v<sub>1</sub>"
    last = np.asarray(projected.measures.points[-1], float)
    energy = np.linalg.eigvalsh(last.T @ last)[:-4:-1]
    drawn = tokens(figure.frames[-1].data[0]).astype(float)
    # Four decimals of n numbers below 1: a sum of squares within 2 n 5e-5; and the first measure's
    # share of 1e-6.
    np.testing.assert_allclose(np.diag(drawn @ drawn.T), energy, atol=3e-3)
    assert np.abs(drawn @ drawn.T - np.diag(energy)).max() < 3e-3


@pytest.mark.parametrize("d", [1, 2, 3])
def test_euclidean_axes_hold_the_tokens(sol, d):
    figure = sphere(elsewhere(sol, d, jf.Euclidean()))
    assert figure.frames[0].traces[0] == 2  # after the two curves: no sphere
    for frame in figure.frames:
        x = tokens(frame.data[0])
        space = frame.layout.scene if d == 3 else frame.layout
        ranges = np.array([space[f"{a}axis"].range for a in "xyz"[: len(x)]])
        assert (ranges[:, :1] <= x).all() and (x <= ranges[:, 1:]).all()


@pytest.mark.slow
def test_system_chooses_among_several(sol, batched):
    with pytest.raises(ValueError, match=r"shape \(2,\): choose one, such as system=\(0,\)"):
        sphere(batched)
    with pytest.raises(ValueError, match="drop system"):
        sphere(sol, system=0)
    figure = sphere(batched, system=1)
    expected = batched.measures.points[-1, 1].T
    np.testing.assert_allclose(tokens(figure.frames[-1].data[0]), expected, atol=6e-5)
    dot = figure.frames[-1].data[-1]
    assert dot.y == (batched.observed["energy"][-1, 1],)
    # The systems of jax.vmap(flow) come before the times.
    swap = lambda a: a.swapaxes(0, 1)
    mapped = replace(
        batched,
        ts=jnp.stack([batched.ts, batched.ts]),
        measures=jf.Measure(swap(batched.measures.points)),
        observed={"energy": swap(batched.observed["energy"])},
    )
    again = sphere(mapped, system=1)
    np.testing.assert_array_equal(
        tokens(again.frames[-1].data[0]), tokens(figure.frames[-1].data[0])
    )


def test_times_not_reached_are_left_out(sol):
    unreached = jf.Measure(sol.measures.points.at[6:].set(jnp.inf))
    stopped = replace(sol, ts=sol.ts.at[6:].set(jnp.inf), measures=unreached)
    assert len(sphere(stopped).frames) == 6
    with pytest.raises(ValueError, match=r"two or more saved times, got 1: .*SaveAt\(ts="):
        sphere(replace(sol, ts=sol.ts.at[1:].set(jnp.inf)))


def test_tokens_without_mass_are_grey(sol):
    logs = jnp.where(jnp.arange(N) < N // 2, 0.0, -jnp.inf)
    mu = jf.Measure(sol.measures.points, logs)
    colours = moving(sphere(replace(sol, measures=mu)))[0].marker.color
    assert set(colours[N // 2 :]) == {"#999999"} and "#999999" not in colours[: N // 2]


def test_page_holds_all_it_needs(sol, tmp_path):
    path = tmp_path / "flow.html"
    sphere(sol).write_html(path)
    page = path.read_text(encoding="utf-8")
    assert not re.search(r"<(script|link)[^>]+(src|href)=", page)
    assert "Plotly.addFrames(" in page and "Plotly.animate('" not in page
    assert len(page) < 6e6


SPY = """<head><script>
    const seen = {errors: [], labels: []};
    onerror = message => { seen.errors.push(message) };
    // What a page catches on its own it has prevented when all listeners have run.
    onunhandledrejection = e => setTimeout(() => {
        if (!e.defaultPrevented) seen.errors.push(`uncaught: ${e.reason}`);
    });
    console.error = (...words) => { seen.errors.push(words.join(" ")) };
    // Without a screen there is no frame to wait for.
    requestAnimationFrame = draw => setTimeout(() => draw(performance.now()), 40);
</script>"""
PLAYER = """<script>setTimeout(() => {
    const figure = document.querySelector(".plotly-graph-div");
    const [play, pause] = document.querySelectorAll(".updatemenu-button");
    const click = button => button.dispatchEvent(new MouseEvent("click"));
    figure.on("plotly_animatingframe", frame => {
        if (frame.name === "5") click(pause);
    });
    figure.on("plotly_sliderchange", event => seen.labels.push(event.step.label));
    seen.points = figure._fullData[figure.data.length - 3].x.length;
    click(play);
    setTimeout(() => {
        seen.shown = document.querySelector(".slider-label").textContent;
        document.title = JSON.stringify(seen);
    }, 1500);
}, 1000)</script></body>"""


def opened(path, browser):
    """The page after it has been played, and what happened on it."""
    page = path.read_text(encoding="utf-8")
    page = page.replace("<head>", SPY, 1).replace("</body>", PLAYER)
    path.write_text(page, encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    flags += "--disable-background-networking --disable-component-update --use-angle=swiftshader "
    flags += "--enable-unsafe-swiftshader --dump-dom --virtual-time-budget=4000"
    command = [browser, *flags.split(), f"--user-data-dir={path.parent / 'user'}", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    dom = re.sub(r"<script.*?</script>", "", done.stdout, flags=re.DOTALL)
    title = re.search(r"<title>(.*?)</title>", dom)
    assert title, "the page did not play to its end"
    return dom, json.loads(html.unescape(title[1]))


@pytest.mark.slow
@pytest.mark.parametrize("d", [2, 3])
def test_page_plays_in_a_browser(sol, d, tmp_path):
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("no Chromium on this machine")
    path = tmp_path / "flow.html"
    sphere(sol if d == 3 else elsewhere(sol, d)).write_html(path)
    dom, seen = opened(path, browser)
    assert seen["errors"] == []
    assert seen["points"] == N
    # The slider moves on from t = 0 until the page is paused.
    assert seen["labels"] == [f"{t:g}" for t in sol.ts[1:6]]
    assert seen["shown"] == "t = 5"
    assert "▶ Play" in dom and "❚❚ Pause" in dom
    if d == 2:
        assert dom.count('class="point"') == N + 2
    else:
        assert "<canvas" in dom and "WebGL is not supported" not in dom


# ------------------------------------------------------------------ optional libraries


def test_missing_plotly_is_named(sol, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(ImportError, match=r'plotly: pip install "jaxflow\[viz\]"'):
        sphere(sol)
