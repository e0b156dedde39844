"""Phase diagrams: equiangular tokens, high dimension, runs that were cut off, the command."""

import json
import sys
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

import jaxflow as jf
from jaxflow import phase_rows
from jaxflow.cli import app
from jaxflow.phase import MetPairs, crossing, equiangular_time, phase_diagram

TIGHT = diffrax.PIDController(rtol=1e-9, atol=1e-9)
SMALL: dict[str, Any] = {"n": 6, "d": 3, "systems": 4, "key": jax.random.key(0)}
BETAS, TS = np.array([0.5, 1.0, 4.0]), np.linspace(0, 12, 25)


@pytest.fixture(scope="module")
def diagram():
    return phase_diagram(BETAS, TS, **SMALL)


# ------------------------------------------------------------------ equiangular tokens


def test_equiangular_time():
    np.testing.assert_allclose(
        equiangular_time([0.0, 4.0], n=32), [5.18626, 6.95350], rtol=0, atol=5e-6
    )
    # Two tokens, from 0 to 0.9: known to six decimals.
    exact = [1.917028, 8.390296, 194.134994]
    found = equiangular_time([1.0, 4.0, 8.0], n=2, threshold=0.9)
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("beta", [0.1, 3.0, 60.0])
def test_equiangular_time_is_the_integral_over_rho(beta):
    """By Simpson's rule on a grid of rho: n = 5, up to 0.5, unnormalised and softmax."""
    n, rho = 5, np.linspace(0, 0.5, 20001)
    weights = np.full(rho.size, 2.0)
    weights[1::2], weights[[0, -1]] = 4, 1
    for interaction, others in (
        (jf.Softmax(), 1 / (np.exp(beta * (1 - rho)) + n - 1)),
        (jf.Unnormalised(), np.exp(beta * rho) / n),
    ):
        rate = 2 * others * (1 - rho) * ((n - 1) * rho + 1)
        expected = (weights / rate).sum() * rho[1] / 3
        options = {"n": n, "threshold": 0.5, "interaction": interaction}
        # Simpson's error at beta = 60: (beta h)^4 / 180 = 3e-14 relative, times a few.
        np.testing.assert_allclose(equiangular_time([beta], **options), expected, rtol=1e-11)


def test_a_huge_beta_is_no_error():
    assert equiangular_time([1e4], n=32) == np.inf


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "interaction", [jf.Softmax(), pytest.param(jf.Unnormalised(), marks=pytest.mark.slow)]
)
def test_particles_at_right_angles_meet_when_the_reduction_says(interaction):
    beta = 1.5
    (met,) = equiangular_time([beta], n=8, interaction=interaction)
    sol = jf.flow(
        jf.SelfAttention(beta=beta, interaction=interaction),
        jf.measure.simplex(8, 8, 0.0),
        t1=met + 1e-4,
        stepsize_controller=TIGHT,
        saveat=diffrax.SaveAt(ts=jnp.array([met - 1e-4, met + 1e-4])),
        observe={"met": MetPairs()},
    )
    assert sol.observed["met"].tolist() == [0, 1]


# Of tokens in high dimension, nearly at right angles, examples/phase_diagram.py has the curve.


# ------------------------------------------------------------------ the diagram


def test_it_is_a_probability(diagram):
    p = diagram.probability
    assert p.shape == diagram.standard_error.shape == (3, 25)
    assert ((p >= 0) & (p <= 1)).all() and (p[:, 0] == 0).all() and (p[:2, -1] == 1).all()
    # Once all have met, they stay together.
    assert all((row[row.argmax() :] == 1).all() for row in p if row.max() == 1)
    assert (diagram.standard_error[p == 1] == 0).all()
    # Four systems, p between 0 and 1: no standard error above that of fair coins.
    assert (diagram.standard_error <= 0.5 / np.sqrt(4 - 1)).all()
    assert (diagram.boundary() < diagram.boundary(0.9)).all()


def test_a_higher_threshold_is_met_later(diagram):
    lower = phase_diagram(BETAS, TS, threshold=0.9, **SMALL)
    # The same points; the mean over pairs is rounded.
    assert (lower.probability >= diagram.probability - 1e-6).all()
    assert (lower.probability > diagram.probability + 0.1).any()
    assert (lower.curve < diagram.curve).all()


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("d", [2, 40])
def test_systems_together_are_systems_one_by_one(d):
    """In R^d, without a rotation, an event or a shared step; at 1e-9 no pair is in doubt."""
    n, systems, key, ts = 6, 3, jax.random.key(2), np.linspace(0, 8, 17)
    together = phase_diagram([2.0], ts, n=n, d=d, systems=systems, tolerance=1e-9, key=key)
    points = jf.measure.uniform_sphere(n * systems, d, key=key).points.reshape(systems, n, d)
    alone = [
        jf.flow(
            jf.SelfAttention(beta=2.0),
            jf.Measure(x),
            t1=ts[-1],
            stepsize_controller=TIGHT,
            saveat=diffrax.SaveAt(ts=jnp.asarray(ts)),
        ).measures
        for x in points
    ]
    inner = np.asarray(jnp.stack([jf.observables.inner_products(mu) for mu in alone], axis=1))
    met = (inner >= 0.999)[..., *np.triu_indices(n, 1)].mean(axis=-1)
    np.testing.assert_allclose(together.probability[0], met.mean(axis=1), rtol=0, atol=1e-15)
    spread = met.std(axis=1, ddof=1) / np.sqrt(systems)
    np.testing.assert_allclose(together.standard_error[0], spread, rtol=0, atol=1e-15)
    assert 0 < met.mean() < 1


@pytest.mark.slow
def test_one_system_has_no_standard_error():
    one = phase_diagram([1.0], [0.0, 5.0], n=3, d=2, systems=1, key=jax.random.key(0))
    assert np.isnan(one.standard_error).all() and np.isfinite(one.probability).all()


def test_new_numbers_are_no_new_program(monkeypatch, diagram):
    count, observed = [], MetPairs.__call__
    monkeypatch.setattr(
        MetPairs, "__call__", lambda self, t, mu: count.append(0) or observed(self, t, mu)
    )
    numbers: dict[str, Any] = SMALL | {"n": 5}  # a shape of its own
    phase_diagram([0.5], TS, **numbers)
    traces = len(count)
    phase_diagram([1.5, 3.0], TS + 0.5, threshold=0.95, tolerance=1e-4, **numbers)
    assert len(count) == traces > 0


def test_crossing():
    ts, values = np.array([0.0, 1.0, 2.0]), np.array([0.0, 0.4, 0.8])
    assert crossing(ts, values, 0.5) == pytest.approx(1.25)
    assert crossing(ts, values, 0.9) == np.inf and crossing(ts, values, 0.0) == 0


# ------------------------------------------------------------------ what is kept


def cut_after(count):
    seen = []

    def progress(row):
        seen.append(row)
        if len(seen) == count:
            raise KeyboardInterrupt

    return progress


def test_an_interrupted_diagram_goes_on(tmp_path, diagram):
    with pytest.raises(KeyboardInterrupt):
        phase_diagram(BETAS, TS, path=tmp_path / "a" / "b", progress=cut_after(2), **SMALL)
    seen = []
    whole = phase_diagram(BETAS, TS, path=tmp_path / "a" / "b", progress=seen.append, **SMALL)
    assert [row.kept for row in seen] == [True, True, False]
    for name in ("probability", "standard_error", "curve"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(diagram, name))
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == [
        "beta-00000.json",
        "beta-00001.json",
        "beta-00002.json",
        "settings.json",
    ]


def test_a_damaged_row_is_named_and_made_again_once_it_is_deleted(tmp_path):
    whole = phase_diagram(BETAS[:1], TS, path=tmp_path, **SMALL)
    row = tmp_path / "beta-00000.json"
    text = row.read_text()
    other = text.replace("[[0.", "[[1.", 1)
    assert other != text
    for damaged in (text[:-9], other, "", "[]", text.replace('"row"', '"rows"')):
        row.write_text(damaged)
        with pytest.raises(ValueError, match="beta-00000.json"):
            phase_diagram(BETAS[:1], TS, path=tmp_path, **SMALL)
        assert row.read_text() == damaged
    row.unlink()
    again = phase_diagram(BETAS[:1], TS, path=str(tmp_path), **SMALL)
    np.testing.assert_array_equal(again.probability, whole.probability)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ValueError, match="has rows of a diagram"):
        phase_diagram(BETAS[:1], TS, path=tmp_path, **SMALL)


def test_a_folder_with_another_diagram_is_refused(tmp_path):
    phase_diagram([1.0], [1.0], path=tmp_path, **SMALL)
    for others, told in (
        ({"n": 7}, "n is 6 there and 7 here"),
        ({"threshold": 0.9, "tolerance": 1e-3}, "0.9 here; tolerance is 1e-05 there"),
        ({"interaction": jf.Unnormalised()}, "interaction is Softmax there"),
        ({"key": jax.random.key(1)}, r"key is \[0, 0\] there and \[0, 1\] here"),
    ):
        numbers: dict[str, Any] = SMALL | others
        with pytest.raises(ValueError, match=told):
            phase_diagram([1.0], [1.0], path=tmp_path, **numbers)
    with pytest.raises(ValueError, match=r"betas is \[1.0\] there and \[0.5, 1.0, 4.0\] here"):
        phase_diagram(BETAS, [1.0], path=tmp_path, **SMALL)


@pytest.mark.parametrize(
    "betas, ts, numbers, told",
    [
        ([1.0], [1.0], {"n": 1}, "n must be at least 2, got 1"),
        ([1.0], [1.0], {"n": 6.5}, "n must be a whole number"),
        ([1.0], [1.0], {"d": 1}, "d must be at least 2"),
        ([1.0], [1.0], {"systems": 0}, "systems must be at least 1"),
        ([1.0], [1.0], {"threshold": 1.0}, "threshold must lie between 0 and 1"),
        ([1.0], [1.0], {"threshold": 1 - 1e-6}, "float64"),
        ([1.0], [1.0], {"tolerance": 0.0}, "tolerance must be positive"),
        ([1.0], [1.0], {"interaction": jf.Hardmax()}, "interaction must be Softmax"),
        ([np.nan], [1.0], {}, "betas must be finite"),
        ([], [1.0], {}, "betas must be finite numbers, at least one"),
        ([1.0], [[1.0]], {}, "ts must be finite numbers"),
        ([1.0], [1.0, 0.5], {}, "ts must increase"),
        ([1.0], [-1.0], {}, "ts must increase from 0"),
    ],
)
def test_bad_input_is_refused(betas, ts, numbers, told):
    with pytest.raises((ValueError, TypeError), match=told):
        phase_diagram(betas, ts, **SMALL | numbers)


# ------------------------------------------------------------------ the command

FLAGS = "--n 6 --d 3 --systems 4 --betas 3 --beta-min 0.5 --beta-max 4 --t1 12 --times 25".split()


def command(*args, flags=FLAGS):
    pytest.importorskip("matplotlib")
    return CliRunner().invoke(app, ["phase-diagram", *flags, *map(str, args)])


def arrays(folder):
    with np.load(folder / "phase.npz") as file:
        return dict(file)


def test_the_command_writes_a_run_folder(tmp_path, monkeypatch):
    result = command("--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "4 systems of 6 tokens in R^3" in result.output and "s for the other 1." in " ".join(
        result.output.split()
    )
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (
        config["command"] == "phase-diagram" and config["n"] == 6 and config["threshold"] == 0.999
    )
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["beta"] for line in lines] == [0.5, 2.25, 4.0]
    found = arrays(tmp_path / "run")
    assert found["probability"].shape == found["standard_error"].shape == (3, 25)
    np.testing.assert_allclose(found["curve"], equiangular_time(found["betas"], n=6))
    expected = phase_diagram(found["betas"], found["ts"], **SMALL)
    np.testing.assert_array_equal(found["probability"], expected.probability)
    assert (tmp_path / "run" / "phase.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "run" / "phase.png").unlink()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    again = command("--resume", tmp_path / "run", flags=[])
    assert again.exit_code == 0 and "It goes on without phase.png" in again.output
    assert not (tmp_path / "run" / "phase.png").exists()


@pytest.mark.parametrize("by_name", [True, False])
def test_an_interrupted_command_goes_on(tmp_path, by_name):
    cut, whole = tmp_path / "cut", tmp_path / "whole"

    def stop(self, i, row):
        if i == 1:
            raise KeyboardInterrupt
        write(self, i, row)

    write = phase_rows.Rows.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phase_rows.Rows, "write", stop)
        assert command("--out", cut).exit_code != 0
    assert not (cut / "phase.npz").exists()
    result = command("--resume", cut, flags=()) if by_name else command("--out", cut)
    assert result.exit_code == 0, result.output
    assert "1 of the betas" in result.output
    assert command("--out", whole).exit_code == 0
    found, expected = arrays(cut), arrays(whole)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)
    for file in ("config.json", "metrics.jsonl"):
        assert (cut / file).read_text() == (whole / file).read_text()


@pytest.mark.slow
def test_the_command_refuses_a_folder_of_other_settings(tmp_path):
    assert command("--out", tmp_path / "run").exit_code == 0
    other = command("--out", tmp_path / "run", "--seed", 1)
    assert other.exit_code == 2 and "seed = 0, not 1" in " ".join(other.output.split())
    missing = command("--resume", tmp_path)
    assert missing.exit_code == 2 and "no config.json" in missing.output
    (tmp_path / "config.json").write_text("{}")
    assert command("--out", tmp_path).exit_code == 2
