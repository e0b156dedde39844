"""Published results: a few run for real, and what the command does with any of them."""

import json
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from scipy.special import iv
from typer.testing import CliRunner

from jaxflow.cli import app
from jaxflow.cli import reproduce as command
from jaxflow.reproduce import RESULTS, Outcome, Result, Row, Scheme, Seconds, hysteresis, staircase
from jaxflow.reproduce.base import panels
from jaxflow.reproduce.page import page

pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    """Tests leave nothing in the user's cache folder."""
    monkeypatch.setenv("JAXFLOW_CACHE", "")


def run(*args):
    return CliRunner().invoke(app, ["reproduce", *map(str, args)], catch_exceptions=False)


def fake(name, measured: Any = 1.0, tolerance=0.1):
    """A result that takes no time, and counts how often it ran."""
    ran = []

    def compute(quick):
        ran.append(quick)
        if isinstance(measured, Exception):
            raise measured
        rows = [Row("a <number>", measured, 1.0, tolerance, "a share of it")]
        return Outcome(rows, lambda: panels(1)[0], [Scheme("a time", 364.0, 328.0)])

    return SimpleNamespace(
        ran=ran, result=Result(name, "2400.00000", f"of {name}", Seconds(1, 2), compute)
    )


@pytest.fixture
def fakes(monkeypatch):
    """use(a, b): the results are these alone."""

    def use(*made):
        results = {one.result.name: one.result for one in made}
        monkeypatch.setattr(command, "RESULTS", results)

    return use


# ------------------------------------------------------------------ the results


FAST = {"staircase", "gaussian", "hardmax"}
NAMES = [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in RESULTS]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", NAMES)
def test_a_result_is_reproduced(name):
    outcome = RESULTS[name].run(True)
    assert outcome.rows and all(row.passed for row in outcome.rows), outcome.rows
    assert outcome.draw().axes


def test_the_reduced_staircase_is_that_of_two_tokens(monkeypatch):
    """Equal weights are two tokens: from 0 to 0.9 at beta = 4 in t = 8.390296."""
    monkeypatch.setattr(staircase, "WEIGHTS", (0.5, 0.5))
    monkeypatch.setattr(staircase, "MET", 0.9)
    np.testing.assert_allclose(staircase.meeting_time(np.pi / 2), 8.390296, rtol=0, atol=5e-7)


def test_order_sets_in_with_a_jump_or_without():
    """Laws at rest: unnormalised attention has a fold below kappa_c beyond beta_*, softmax none."""
    loop = hysteresis.Attention(2, 4.0)
    np.testing.assert_allclose(loop.critical, 4 / iv(1, 4.0), rtol=1e-14)
    np.testing.assert_allclose(loop.fold, [0.547128, 0.38706900], rtol=1e-5)
    np.testing.assert_allclose(loop.strength(loop.order(0.4)), 0.4, rtol=1e-9)
    assert loop.order(0.38) == 0
    for d, beta in ((2, 2.44692), (3, 1.81615), (8, 1.26655)):
        np.testing.assert_allclose(hysteresis.turning(d), beta, rtol=5e-4)  # at order 0.02
    for d, beta in ((2, 4.0), (3, 8.0)):
        smooth = hysteresis.Attention(d, beta, softmax=True)
        branch = [smooth.strength(r) for r in (0.01, 0.1, 0.3, 0.6, 0.9)]
        assert smooth.critical < branch[0] and (np.diff(branch) > 0).all()


def test_results_say_what_they_are():
    for name, result in RESULTS.items():
        assert result.name == name and len(result.line) < 100
        assert len(result.arxiv.partition(".")[0]) == 4
        assert 0 < result.seconds.quick <= result.seconds.full
    assert sum(r.seconds.quick for r in RESULTS.values()) < 600  # all of them in ten minutes


@pytest.mark.parametrize("measured", [1.2, float("nan"), float("inf")])
def test_a_row_off_its_tolerance_fails(measured):
    assert Row("", 1.0, 1.0, 0.0, "").passed and Row("", 1.1, 1.0, 0.2, "").passed
    assert not Row("", measured, 1.0, 0.1, "").passed


# ------------------------------------------------------------------ the command


def test_list_has_a_line_for_each_result():
    listed = run("--list")
    assert listed.exit_code == 0
    lines = listed.output.strip().splitlines()[1:]
    assert len(lines) == len(RESULTS)
    for line, result in zip(lines, RESULTS.values(), strict=True):
        assert result.name in line and f"arXiv {result.arxiv}" in line and result.line in line


def test_unknown_names_are_refused_with_those_that_are(tmp_path):
    refused = run("stairs", "--out", tmp_path / "run")
    assert refused.exit_code == 2 and "'stairs'" in refused.output
    assert all(name in refused.output for name in RESULTS) and not (tmp_path / "run").exists()
    for args in ([], ["--list", "staircase"]):
        assert run(*args).exit_code == 2


def test_a_run_folder_shows_what_was_found(tmp_path, fakes):
    fakes(fake("one"), fake("two"))
    done = run("all", "--quick", "--out", tmp_path)
    assert done.exit_code == 0 and "About 2 s on two cores: one 1 s, two 1 s." in done.output
    assert "2 of 2 pass" in done.output
    record = json.loads((tmp_path / "one.json").read_text())
    assert record["rows"] == [
        {
            "what": "a <number>", "measured": 1.0, "expected": 1.0, "tolerance": 0.1,
            "why": "a share of it", "passed": True,
        }
    ]  # fmt: skip
    assert record["schemes"] == [{"what": "a time", "published": 364.0, "exact": 328.0}]
    assert record["passed"] and record["seconds"] > 0 and record["error"] is None
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "index.html").read_text()
    assert text.count("data:image/png;base64,") == 2 and "a &lt;number&gt;" in text
    assert 'src="http' not in text and "<script" not in text
    assert json.loads((tmp_path / "config.json").read_text())["quick"] is True


def test_results_that_are_there_are_kept(tmp_path, fakes):
    one, two = fake("one"), fake("two")
    fakes(one, two)
    assert run("one", "--quick", "--out", tmp_path).exit_code == 0
    again = run("all", "--quick", "--out", tmp_path)
    assert "1 of the results were there already" in again.output and "kept" in again.output
    assert one.ran == [True] and two.ran == [True]
    assert (tmp_path / "index.html").read_text().count("base64,") == 2
    run("all", "--quick", "--again", "--out", tmp_path)
    assert one.ran == two.ran == [True, True]
    run("all", "--out", tmp_path)  # other settings
    assert one.ran == two.ran == [True, True, False]


@pytest.mark.parametrize("damage", ["json", "png", "version"])
def test_what_is_damaged_or_old_is_computed_again(tmp_path, fakes, monkeypatch, damage):
    one = fake("one")
    fakes(one)
    run("one", "--out", tmp_path)
    if damage == "version":
        monkeypatch.setattr(command, "__version__", "9.0")
    else:
        path = tmp_path / f"one.{damage}"
        path.write_bytes(path.read_bytes().replace(b"1.0", b"1.1")[:-3])
    assert run("one", "--out", tmp_path).exit_code == 0 and len(one.ran) == 2


def test_a_failure_is_reported_and_stops_no_other(tmp_path, fakes):
    wrong, broken, right = fake("wrong", 2.0), fake("broken", ValueError("no\nsuch")), fake("right")
    fakes(wrong, broken, right)
    done = run("all", "--out", tmp_path)
    assert done.exit_code == 1 and "Failed: wrong, broken." in done.output
    assert "FAIL a <number>" in done.output and "ValueError: no such" in done.output
    assert right.ran and "right: pass" in done.output
    text = (tmp_path / "index.html").read_text()
    assert "1 of 3 pass" in text and "ValueError: no such" in text
    assert not (tmp_path / "broken.png").exists()
    # A result that failed is a result; one that broke is tried again.
    again = run("all", "--out", tmp_path)
    assert again.exit_code == 1 and len(wrong.ran) == 1 and len(broken.ran) == 2


def test_the_page_of_another_is_not_overwritten(tmp_path, fakes):
    fakes(fake("one"))
    (tmp_path / "index.html").write_text("mine")
    refused = run("one", "--out", tmp_path)
    assert refused.exit_code == 2 and "index.html" in refused.output
    assert (tmp_path / "index.html").read_text() == "mine"


def test_a_number_that_is_not_finite_is_none(tmp_path, fakes):
    fakes(fake("one", float("inf")))
    assert run("one", "--out", tmp_path).exit_code == 1
    record = json.loads((tmp_path / "one.json").read_text())
    assert record["rows"][0]["measured"] is None
    assert "not finite" in page([(record, None)], "")


def test_results_are_in_double_precision(tmp_path, fakes):
    found = []
    one = fake("one")

    def compute(quick):
        found.append(jax.numpy.zeros(()).dtype)
        return one.result.run(quick)

    fakes(SimpleNamespace(result=one.result._replace(run=compute)))
    assert run("one", "--out", tmp_path).exit_code == 0 and found == [np.float64]
