"""Every page that jaxflow writes or serves, opened in Chromium: in light and in dark, on a desk and
on a phone, by keys alone, without an error on the console."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from browser import Browser

import jaxflow as jf
from jaxflow._folder import write_settings
from jaxflow.models.inspection import BETAS, THRESHOLDS, Inspection
from jaxflow.reproduce.page import page as results_page

N, TIMES = 24, 41
PHONE = 360  # pixels


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


def flow_of(d: int, geometry: Any) -> jf.FlowSolution:
    """Tokens on lines, put on the geometry: no solve."""
    x, v = jax.random.normal(jax.random.key(0), (2, N, d))
    ts = jnp.linspace(0.0, 4.0, TIMES)
    mu = jf.Measure(geometry.retract(x[None] + ts[:, None, None] * v[None]))
    observed = {"energy": jnp.sin(ts), "clusters": jnp.arange(TIMES)[::-1] + 1}
    return jf.FlowSolution(
        ts=ts, measures=mu, observed=observed, ys=None, t0=ts[0], end=ts[-1], final=mu[-1],
        stats={}, result=diffrax.RESULTS.successful, event_mask=None, interpolation=None,
        geometry=geometry, log_weights=None,
    )  # fmt: skip


def inspected() -> str:
    pytest.importorskip("matplotlib")
    draw = np.random.default_rng(0).uniform
    found = Inspection(
        ts=np.arange(3.0), points=draw(size=(3, 7, 4)), clusters=np.ones((3, len(THRESHOLDS)), int),
        entropy=draw(size=(2, 1)), beta=1 + draw(size=(2, 1)), curve=draw(size=(2, len(BETAS))),
        most=2.0, sensitivity=draw(size=7), loss=1.0, query_key=None, output_value=None,
    )  # fmt: skip
    words = ["<b>", "a", "\n", "long" * 30, "e", "f", "g"]
    return jf.viz.inspection_page(found, words, {"model": "x" * 90})


def results() -> str:
    row = {"what": "a time", "measured": 1.0, "expected": 1.0, "tolerance": 0.1, "why": "so",
           "passed": True}  # fmt: skip
    record = {
        "name": "staircase", "arxiv": "2400.00000", "line": "Steps", "parameters": "n = 3",
        "passed": True, "seconds": 1.0, "error": None, "rows": [row],
        "schemes": [{"what": "a time", "published": 364.0, "exact": 328.0}],
    }  # fmt: skip
    return results_page([(record, None), (record | {"passed": False, "error": "E: no"}, None)], "x")


PAGES = {
    "sphere": lambda: jf.viz.sphere(flow_of(3, jf.Sphere())).html,
    "circle": lambda: jf.viz.sphere(flow_of(2, jf.Sphere()), labels=["<w>"] * N).html,
    "ball": lambda: jf.viz.sphere(flow_of(5, jf.Sphere())).html,
    "space": lambda: jf.viz.sphere(flow_of(3, jf.Euclidean())).html,
    "plane": lambda: jf.viz.sphere(flow_of(2, jf.Euclidean())).html,
    "inspection": inspected,
    "results": results,
}
PLAYED = [name for name in PAGES if name not in ("inspection", "results")]


def opened(browser: Browser, folder: Path, name: str, **look: Any):
    path = folder / f"{name}.html"
    path.write_text(PAGES[name](), encoding="utf-8")
    tab = browser.page(path.as_uri(), **look)
    if name in PLAYED:
        tab.wait("byId('now').textContent !== ''")
    return tab


# Of the colour of the text and of that of the ground, by the rule of WCAG 2.
CONTRAST = """(() => {
  const light = (text) => {
    const [r, g, b] = text.match(/[\\d.]+/g).map((c) => c / 255)
      .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = light(getComputedStyle(document.body).backgroundColor);
  const texts = [...document.querySelectorAll("body, p, td, th, a, output, span")];
  const contrasts = texts.map((e) => {
    const text = light(getComputedStyle(e).color);
    return (Math.max(text, ground) + 0.05) / (Math.min(text, ground) + 0.05);
  });
  return [ground, Math.min(...contrasts)];
})()"""


UNNAMED = """[..."button select input canvas svg[role] img iframe".split(" ")]
  .flatMap((kind) => [...document.querySelectorAll(kind)])
  .filter((e) => !(e.ariaLabel || e.alt || e.title || e.labels?.length || e.textContent.trim()))
  .map((e) => e.outerHTML)"""


def is_legible(tab: Any) -> bool:
    """Checks what holds of every page, on a phone and in both colours; whether it is light."""
    assert tab.value("document.documentElement.scrollWidth") <= PHONE
    assert tab.value("document.documentElement.lang") == "en"
    small = "[...document.querySelectorAll('button, select')].some(e => e.offsetHeight < 36)"
    assert not tab.value(small)
    assert tab.value(UNNAMED) == []
    grounds = []
    for dark in (False, True):
        tab.colours(dark)
        ground, contrast = tab.value(CONTRAST)
        assert contrast >= 4.5, (dark, contrast)
        grounds.append(ground)
    assert grounds[0] > 0.9 and grounds[1] < 0.05
    return True


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_legible_on_a_phone_and_in_the_dark(browser, tmp_path, name):
    tab = opened(browser, tmp_path, name, width=PHONE, height=740)
    assert is_legible(tab)
    if name in PLAYED:
        drawn = """(() => { const c = byId('tokens');
          return c.getContext('2d').getImageData(0, 0, c.width, c.height).data
            .reduce((n, v, i) => n + (i % 4 === 3 && v > 0), 0) })()"""
        assert tab.value(drawn) > 500
        play = "byId('play').getBoundingClientRect().bottom <= innerHeight"
        assert tab.value(play), "the film plays without scrolling"
    assert tab.errors() == []
    tab.close()


def test_the_labels_of_an_axis_are_distinct(browser, tmp_path):
    tab = opened(browser, tmp_path, "circle")
    texts = lambda ends: tab.value(f"ticks({ends}, false, 5).map(([, text]) => text)")
    assert texts("axisEnds([2, 2], false, false)") == ["2"]
    assert texts("[0, 1]") == ["0", "0.2", "0.4", "0.6", "0.8", "1"]
    tab.close()


# Frames come when `frames` is called, at the intervals that it is given.
CLOCK = """{
  let next = null, now = 1000;
  performance.now = () => now;
  window.requestAnimationFrame = (draw) => { next = draw; return 1; };
  window.frames_ = (...waits) => { for (const wait of waits) {
    now += wait;
    const draw = next;
    next = null;
    draw?.(now);
  } };
}"""


def test_a_film_plays_at_a_steady_rate_and_by_keys(browser, tmp_path):
    tab = opened(browser, tmp_path, "sphere")
    k = lambda: tab.value("Number(byId('time').value)")
    tab.value(CLOCK)
    # By one clock, however seldom a frame is drawn: 20 times a second.
    for waits in ([16] * 50, [7, 33] * 20, [200] * 4):
        tab.press("Home")
        tab.press(" ")
        tab.value(f"frames_({', '.join(map(str, waits))})")
        assert k() == sum(waits) // 50
        assert "Pause" in tab.value("byId('play').textContent")
        tab.press(" ")
    # A page that was out of sight goes on where it was.
    tab.press("Home")
    tab.press(" ")
    tab.value("frames_(60000)")
    assert k() == 5
    tab.value("frames_(...Array(200).fill(20))")
    assert k() == TIMES - 1 and "Play" in tab.value("byId('play').textContent")
    tab.press(" ")
    tab.value("frames_(50)")
    assert k() == 1, "from the beginning, where it was at the end"
    tab.press("ArrowRight")
    tab.press("ArrowRight")
    tab.press("ArrowLeft")
    assert k() == 2 and tab.value("byId('now').textContent") == "t = 0.2"
    assert tab.value("byId('time').getAttribute('aria-valuetext')") == "t = 0.2"
    assert (
        tab.value("document.querySelectorAll('#panels text')[0].textContent")
        == "number of clusters"
    )
    counts = "[...document.querySelectorAll('#panels figure:first-child text')].at(-1).textContent"
    assert tab.value(counts) == str(TIMES - 2)
    image = lambda: tab.value("byId('tokens').toDataURL()")
    before = image()
    tab.press("ArrowLeft", shift=True)
    assert image() != before and k() == 2, "turned, at the same time"
    before = image()
    tab.press("+")
    assert image() != before
    # Tab reaches every control, and shows where it is.
    reached = []
    for _ in range(5):
        tab.press("Tab")
        reached.append(tab.value("document.activeElement.id"))
        assert tab.value("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert reached == ["play", "back", "forward", "time", "speed"]
    assert tab.errors() == []
    tab.close()


def test_the_page_reads_its_points_and_tells_a_token(browser, tmp_path):
    tab = opened(browser, tmp_path, "circle")
    levels = tab.value("unpack(pageData()).then((found) => [...found])")
    found = np.array(levels).reshape(N, 2, TIMES).transpose(2, 0, 1) * 2.2 / (2**14 - 1) - 1.1
    points = np.asarray(flow_of(2, jf.Sphere()).measures.points)
    np.testing.assert_allclose(found, points, atol=1.1 / (2**14 - 1) + 1e-6)
    # The first token is at 1.1 / 1.1 of the room from the middle.
    x, y = points[0, 0].tolist()
    place = """((x, y) => { const box = byId('tokens').getBoundingClientRect();
      const scale = Math.min(box.width - 70, box.height - 60) / 2.2;
      return [box.x + box.width / 2 + 15 + scale * x, box.y + box.height / 2 - 12 - scale * y] })"""
    px, py = tab.value(f"{place}({x}, {y})")
    tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=px, y=py)
    tab.wait("!byId('tip').hidden")
    assert tab.value("byId('tip').textContent").startswith("<w>\ncluster ")
    tab.close()


def test_a_damaged_film_says_so(browser, tmp_path):
    path = tmp_path / "flow.html"
    path.write_text(PAGES["plane"]().replace('"points": "', '"points": "AAAA'), encoding="utf-8")
    tab = browser.page(path.as_uri())
    tab.wait("!byId('failure').hidden")
    assert "as it is damaged" in tab.value("byId('failure').textContent")
    tab.close()


# ------------------------------------------------------------------ jaxflow view


def log(first: int, last: int, scale: float = 1.0) -> str:
    row = lambda k: {"step": k, "loss": scale / k, "seconds": k / 4}
    return "".join(json.dumps(row(k)) + "\n" for k in range(first, last))


@pytest.fixture
def runs(tmp_path):
    """A training and another one, and a simulation with its film."""
    attack = "<img src=x onerror=document.title='owned'>"
    for name, command, settings in (
        ("a", "train", {"steps": 100, "curve": "layers", "text": attack}),
        ("b", "train", {"steps": 100, "curve": "smooth", "text": attack}),
        ("s", "simulate", {"n": N}),
    ):
        (tmp_path / name).mkdir()
        write_settings(tmp_path / name, command, {"settings": settings})
    (tmp_path / "a" / "metrics.jsonl").write_text(log(1, 4) + '{"step": 4, "lo')
    (tmp_path / "b" / "metrics.jsonl").write_text(log(1, 9, 2.0))
    (tmp_path / "s" / "metrics.jsonl").write_text('{"t": 0.0, "energy": 0.5}\n')
    (tmp_path / "s" / "flow.html").write_text(PAGES["sphere"](), encoding="utf-8")
    return tmp_path


# The value of a metric of a run in the table of last values.
LAST = """((metric, run) => [...document.querySelectorAll('#last tr')]
  .find((row) => row.cells[0].textContent === metric)?.cells[run].textContent)"""
CURVES = """[...document.querySelectorAll('#charts svg')]
  .map((chart) => [chart.ariaLabel, chart.querySelectorAll('path').length])"""


@pytest.fixture
def served(runs):
    """The URL of a server of the runs, which stops when it is told to."""
    command = [sys.executable, "-m", "jaxflow", "view", "--no-browser"]
    command += [str(runs / name) for name in "abs"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
        server.send_signal(signal.SIGTERM)
    assert server.returncode == 0


def test_view_follows_a_run_that_is_written(browser, runs, served):
    tab = browser.page(served, width=PHONE, height=740)
    tab.wait(f"{LAST}('loss', 1) === '0.333333'")
    # What another process writes is there a moment later.
    with (runs / "a" / "metrics.jsonl").open("a") as opened:
        opened.write('ss": 0.25, "seconds": 1.0}\n' + log(5, 11))
    tab.wait(f"{LAST}('loss', 1) === '0.1'")
    assert "10 lines of metrics, being written" in tab.value("byId('runs').textContent")
    assert tab.value(f"{LAST}('loss', 2)") == "0.25"
    # Two curves on one axis; the simulation has its own.
    assert tab.value(CURVES) == [["loss", 2], ["seconds", 2], ["energy", 1]]
    clock = "byId('clock')"
    tab.value(f"{clock}.value = 'seconds', {clock}.dispatchEvent(new Event('change'))")
    assert tab.value(CURVES) == [["loss", 2], ["seconds", 2]]
    tab.value("document.querySelector('#runs input').click()")
    assert tab.value(CURVES) == [["loss", 1], ["seconds", 1]]
    settings = tab.value("byId('settings').innerText")
    assert "smooth" in settings and "steps" in settings and "<img src=x" in settings
    assert tab.value("document.title") == "jaxflow view"
    assert tab.value("document.querySelectorAll('img').length") == 0
    assert is_legible(tab)
    assert tab.errors() == []
    # The simulation plays, in a frame that shows all of it.
    frame = "document.querySelector('iframe')"
    tab.value(f"{frame}.scrollIntoView()")
    tab.wait(f"parseInt({frame}.style.height) > 0.92 * innerHeight")
    assert tab.value("document.querySelector('iframe').src") == f"{served}film/2"
    film = browser.page(f"{served}film/2")
    film.wait("byId('now').textContent === 't = 0'")
    film.press(" ")
    film.wait("Number(byId('time').value) > 1")
    assert film.errors() == []
    film.close()
    tab.close()
