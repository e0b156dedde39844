"""The page that plays a flow, by the data that it holds; `test_browser` opens it."""

import base64
import re
import zlib
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxflow as jf
import jaxflow.viz.run
from jaxflow._page import asset, embedded
from jaxflow.viz.page import _packed
from jaxflow.viz.style import COLOURS

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


def read(sol, **options) -> dict[str, Any]:
    """What the page holds, with its points (times, k, n)."""
    data = embedded(jf.viz.sphere(sol, **options).html)
    n, k, times = data["shape"]
    planes = np.frombuffer(zlib.decompress(base64.b64decode(data["points"])), np.uint8)
    signed = planes.reshape(2, -1).T.copy().view("<u2").reshape(n, k, times).astype(int)
    levels = np.cumsum(np.where(signed % 2, -(signed + 1) // 2, signed // 2), axis=-1)
    windows = np.array(data["windows"])
    low, high = windows[..., 0, None], windows[..., 1, None]
    data["points"] = low + (high - low) * levels.transpose(2, 1, 0) / (2**14 - 1)
    return data


# Half a level of a window from -1.1 to 1.1.
ROUNDED = 1.1 / (2**14 - 1) + 1e-6


def test_the_page_holds_the_tokens_at_each_time(sol):
    data = read(sol)
    np.testing.assert_allclose(data["ts"], sol.ts)
    tokens = sol.measures.points.swapaxes(1, 2)
    np.testing.assert_allclose(data["points"], tokens, atol=ROUNDED)


def test_colour_is_the_last_cluster(sol):
    labels = np.asarray(jf.observables.cluster_labels(sol.measures[-1]))
    assert 1 < labels.max() + 1 <= 8
    assert read(sol)["clusters"] == labels.tolist()


def test_colours_of_the_page_are_those_of_the_figures():
    light, dark = re.split("@media", asset("base.css"))[:2]
    colours = [re.findall(r"--c\d: (#\w{6})", block) for block in (light, dark)]
    assert colours[0] == COLOURS and len(set(colours[1])) == len(COLOURS)


def test_panels_follow_clusters_and_energy(sol):
    counts, energy = read(sol)["panels"]
    assert counts["y"] == np.asarray(jf.observables.cluster_count(sol.measures)).tolist()
    assert counts["step"] and not counts["dots"] and not energy["step"]
    np.testing.assert_array_equal(np.float32(energy["y"]), sol.observed["energy"])
    assert counts["t"] == energy["t"] == sol.ts.tolist()
    # JSON knows no infinity.
    unbounded = replace(sol, observed={"energy": sol.observed["energy"].at[2].set(jnp.inf)})
    assert read(unbounded)["panels"][1]["y"].index(None) == 2


def test_observed_counts_are_shown(sol):
    counts = jnp.linspace(30.0, 22.0, TIMES)
    [panel] = read(replace(sol, observed={"clusters": counts}))["panels"]
    assert panel["y"] == counts.tolist()
    # Labels of the tokens, say, are not a number.
    [panel] = read(replace(sol, observed={"clusters": jnp.zeros((TIMES, N))}))["panels"]
    assert panel["y"] == np.asarray(jf.observables.cluster_count(sol.measures)).tolist()


def test_clusters_of_many_tokens_are_counted_at_some_times(sol, monkeypatch):
    monkeypatch.setattr(jaxflow.viz.run, "PAIRS_AT_ONCE", 3 * N)
    panel = read(sol)["panels"][0]
    counts = np.asarray(jf.observables.cluster_count(sol.measures))
    assert panel["t"] == [0, 4, 8] and panel["dots"]
    assert panel["y"] == counts[[0, 4, 8]].tolist()


def test_time_axes_are_logarithmic_where_times_are(sol):
    spaced = replace(sol, ts=jnp.concatenate([jnp.zeros(1), jnp.geomspace(0.1, 1e3, TIMES - 1)]))
    assert read(spaced)["log_time"] and not read(sol)["log_time"]


def test_labels_are_words_as_written(sol):
    words = [f"</script><b>{j}" for j in range(N)]
    page = jf.viz.sphere(sol, labels=words)
    assert "</script><b>" not in page.html and embedded(page.html)["labels"] == words
    assert read(sol)["labels"] is None
    with pytest.raises(TypeError, match="list of strings"):
        jf.viz.sphere(sol, labels="x" * N)
    with pytest.raises(ValueError, match="one string a token: 24, got 23"):
        jf.viz.sphere(sol, labels=words[1:])


def test_subsample(sol):
    data = read(sol, max_points=10, max_frames=5, labels=list(map(str, range(N))))
    assert "10 of them drawn" in data["title"] and data["ts"] == [0, 2, 4, 6, 8]
    assert data["points"].shape == (5, 3, 10)
    assert data["tokens"] == list(map(int, data["labels"])) and data["tokens"][-1] == N - 1
    last = np.asarray(sol.measures.points[-1, data["tokens"]])
    np.testing.assert_allclose(data["points"][-1], last.T, atol=ROUNDED)
    with pytest.raises(ValueError, match="at least 2"):
        jf.viz.sphere(sol, max_points=1)


def test_projection_is_on_principal_directions(sol):
    projected = elsewhere(sol, 5)
    data = read(projected)
    assert "principal directions" in data["title"] and data["names"] == ["v₁", "v₂", "v₃"]
    last = np.asarray(projected.measures.points[-1], float)
    energy = np.linalg.eigvalsh(last.T @ last)[:-4:-1]
    drawn = data["points"][-1]
    # A sum of n squares below 1 is within 2 n times the rounding; and the first measure's share.
    np.testing.assert_allclose(np.diag(drawn @ drawn.T), energy, atol=4e-3)
    assert np.abs(drawn @ drawn.T - np.diag(energy)).max() < 4e-3


@pytest.mark.parametrize("d", [1, 2, 3])
def test_euclidean_windows_hold_the_tokens(sol, d):
    flat = elsewhere(sol, d, jf.Euclidean())
    data = read(flat)
    assert data["wires"] == [] and data["radius"] is None
    tokens = np.asarray(flat.measures.points).swapaxes(1, 2)
    windows = np.array(data["windows"])
    assert len(windows) == TIMES
    # By the window of its own time: what comes later does not make the beginning coarse.
    half_level = np.ptp(windows, axis=-1)[:, :d].max(axis=1) / 2**15
    assert (np.abs(data["points"][:, :d] - tokens).max(axis=(1, 2)) <= 1.01 * half_level).all()
    assert half_level[0] < 0.5 * half_level[-1]
    assert (windows[:, :d, :1] <= tokens).all() and (tokens <= windows[:, :d, 1:]).all()


def test_circle_and_sphere_are_drawn(sol):
    for d, lines in ((2, 1), (3, 11)):
        wires = np.array(read(elsewhere(sol, d))["wires"])
        assert wires.shape[0] == lines and wires.shape[2] == d
        np.testing.assert_allclose(np.linalg.norm(wires, axis=-1), 1, atol=1e-4)


@pytest.mark.slow
def test_system_chooses_among_several(sol, batched):
    with pytest.raises(ValueError, match=r"shape \(2,\): choose one, such as system=\(0,\)"):
        jf.viz.sphere(batched)
    with pytest.raises(ValueError, match="drop system"):
        jf.viz.sphere(sol, system=0)
    data = read(batched, system=1)
    expected = batched.measures.points[:, 1].swapaxes(1, 2)
    np.testing.assert_allclose(data["points"], expected, atol=ROUNDED)
    np.testing.assert_array_equal(
        np.float32(data["panels"][1]["y"]), batched.observed["energy"][:, 1]
    )
    # The systems of jax.vmap(flow) come before the times.
    swap = lambda a: a.swapaxes(0, 1)
    mapped = replace(
        batched,
        ts=jnp.stack([batched.ts, batched.ts]),
        measures=jf.Measure(swap(batched.measures.points)),
        observed={"energy": swap(batched.observed["energy"])},
    )
    np.testing.assert_array_equal(read(mapped, system=1)["points"], data["points"])


def test_times_not_reached_are_left_out(sol):
    unreached = jf.Measure(sol.measures.points.at[6:].set(jnp.inf))
    stopped = replace(sol, ts=sol.ts.at[6:].set(jnp.inf), measures=unreached)
    assert len(read(stopped)["points"]) == 6
    with pytest.raises(ValueError, match=r"two or more saved times, got 1: .*SaveAt\(ts="):
        jf.viz.sphere(replace(sol, ts=sol.ts.at[1:].set(jnp.inf)))


def test_tokens_without_mass_have_no_cluster(sol):
    logs = jnp.where(jnp.arange(N) < N // 2, 0.0, -jnp.inf)
    clusters = read(replace(sol, measures=jf.Measure(sol.measures.points, logs)))["clusters"]
    assert set(clusters[N // 2 :]) == {-1} and -1 not in clusters[: N // 2]


def test_the_page_needs_no_other_file_and_is_small(sol, tmp_path):
    page = jf.viz.sphere(sol)
    page.write_html(tmp_path / "flow.html")
    text = (tmp_path / "flow.html").read_text(encoding="utf-8")
    assert text == page.html and len(text) < 1e5
    assert not re.search(
        r"""(src|href)=["'](?!data:)|url\(|@import|https?://(?!www.w3.org)""", text
    )
    # A notebook shows it as a page of its own, which nothing of the notebook's can reach.
    assert 'sandbox="allow-scripts" srcdoc="&lt;!DOCTYPE html&gt;' in page._repr_html_()


def test_five_thousand_tokens_take_less_than_two_megabytes():
    """Tokens that all move by about a thousandth of the sphere between two of 151 times."""
    draw = np.random.default_rng(0).normal
    x = draw(size=(5000, 3)) + np.arange(151)[:, None, None] * draw(size=(5000, 3)) / 1e3
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    assert len(_packed(x, np.array([[[-1.1, 1.1]] * 3]))) < 1.9e6


def test_a_page_without_data_is_told():
    with pytest.raises(ValueError, match="holds no data"):
        embedded("<html></html>")
