"""The examples print the numbers that their docstrings state."""

import importlib.util
import os
import pathlib
import runpy
import subprocess
import sys

import jax
import numpy as np
import pytest

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the `main` of an example in an empty folder; its choice of precision ends with it."""
    monkeypatch.chdir(tmp_path)
    wide = jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]
    yield lambda name, *args: runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](*args)
    jax.config.update("jax_enable_x64", wide)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_short_and_tested(path):
    assert len(path.read_text().splitlines()) < 100
    assert f'run("{path.stem}"' in pathlib.Path(__file__).read_text()


@pytest.mark.slow
def test_an_example_runs_as_a_script():
    script = EXAMPLES / "leaders_and_hardmax.py"
    out = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(EXAMPLES.parent)},
    ).stdout
    assert "5 leaders" in out and "0 changes of leader" in out
    assert out.count("0.666666666667 to 0.666666666667") == 10


def test_leaders_and_hardmax(run):
    result = run("leaders_and_hardmax")
    np.testing.assert_array_equal(result["leaders"], range(5))
    assert result["moved"] <= 1e-14 and result["changes"] == 0
    # The least gap is 0.02, a difference of numbers of size 4: 200 roundings of 2e-16 each way.
    np.testing.assert_allclose(result["factors"], 2 / 3, rtol=1e-13)


def test_own_interaction(run):
    result = run("own_interaction")
    assert result["error"] < 1e-12 and result["speed"] < 1e-14
    assert result["clusters"] == 4 and result["largest"] < -0.1


@pytest.mark.slow
def test_clustering_on_the_sphere(run):
    result = run("clustering_on_the_sphere")
    np.testing.assert_allclose(result["rho"], [0.035441, 0.118066, 0.952775], rtol=0, atol=5e-7)
    # The mean over pairs has the standard error sqrt(2) std(e^{b u}) / (2 b n) = 0.004, u = <x, y>.
    np.testing.assert_allclose(result["energy"][0], 0.866, rtol=0, atol=0.012)
    assert (np.diff(result["energy"]) > 0).all()
    np.testing.assert_allclose(result["energy"][-1], 3.4169, rtol=0, atol=5e-5)
    assert result["clusters"][-1] == 2


@pytest.mark.slow
def test_metastability(run):
    result = run("metastability")
    ts, clusters, tree = result["ts"], result["clusters"], result["tree"]
    assert (np.diff(clusters) <= 0).all() and clusters[-1] == 1
    assert (np.diff(result["energy"]) > -1e-9).all()
    assert len(tree.times) == 47
    # Steps are controlled to 1e-7 each; a time as long as this multiplies it.
    np.testing.assert_allclose(tree.times[-1], ts[-1], rtol=1e-3)
    np.testing.assert_allclose(tree.times[-2:], [822.648, 5.498e6], rtol=1e-3)
    assert set(clusters[(ts > 1000.1) & (ts < ts[-1])]) == {2}


@pytest.mark.slow
def test_coarsening(run, tmp_path):
    result = run("coarsening")
    tree = result["tree"]
    # Distances of 1e-3 fall at rate 1, and are right to some 1e-8.
    np.testing.assert_allclose(tree.times[-3:], [18.5497, 13195.2, 1.699581e9], rtol=1e-5)
    assert len(tree.times) == 15 and result["steps"] < 600 and not result["labels"].any()
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "runs" / "coarsening.png").exists()


@pytest.mark.slow
def test_normalisation_schemes(run):
    result = run("normalisation_schemes")
    expected = {"Post-LN": -2, "nGPT": -1, "sqrt-scaling": -4, "Pre-LN": -2, "Peri-LN": -2}
    for name, rate in expected.items():
        np.testing.assert_allclose(result["rates"][name], rate, rtol=1e-3)
    np.testing.assert_allclose(result["times"]["Post-LN"], 6.128, rtol=1e-3)
    np.testing.assert_allclose(result["times"]["Pre-LN"], 115.758, rtol=1e-3)


@pytest.mark.slow
def test_image_as_a_measure(run):
    result = run("image_as_a_measure")
    assert result["labels"].max() == 2
    assert result["agreement"] == [1.0, 1.0, 1.0]


@pytest.mark.slow
def test_sinkhorn_against_softmax(run):
    result = run("sinkhorn_against_softmax")
    for name, softmax, converged in (
        ("defects", 5.5, 1e-13),
        ("rate_errors", 0.58, 1e-13),
        ("return_errors", 2.2, 1e-7),
    ):
        values = result[name]
        np.testing.assert_allclose(values[0], softmax, rtol=0.05)
        assert values[0] > values[1] > values[2] and values[2] < converged


@pytest.mark.slow
def test_gradients_in_closed_form(run, capsys):
    errors = run("gradients_in_closed_form")
    assert len(errors) == 5
    # Steps are controlled to 1e-10; the adjoint equation of Backsolve as well.
    assert max(errors.values()) < 1e-9, errors
    assert capsys.readouterr().out.count("0.27828373") == 6


@pytest.mark.slow
def test_text_as_a_measure(run, tmp_path):
    result = run("text_as_a_measure")
    different, clusters, pairs = result["different"], result["clusters"], result["pairs"]
    # The text is that of the running Python: no two versions have quite the same.
    assert clusters[0] > 1.5 * different
    assert clusters[1] == pairs[1] == different
    assert different / 2 > clusters[2] > 2 * clusters[3] > 2
    assert "exception" in (tmp_path / "runs" / "text.html").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
def test_million_tokens(run, tmp_path):
    """Twenty thousand of them."""
    result = run("million_tokens", 20_000)
    assert result["clusters"] == result["fastest"] == 4
    # The law is linear as long as modes are small; by t = 3 second harmonics are some percent.
    np.testing.assert_allclose(result["rate"], 0.7045, rtol=0.06)
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "runs" / "tokens.png").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
def test_masks(run, tmp_path):
    result = run("masks")
    last = {name: counts[-1] for name, counts in result["counts"].items()}
    agreement = {name: shares[-1] for name, shares in result["agreement"].items()}
    for order in ("ordered", "shuffled"):
        assert last[order, "full attention"] == 3 and last[order, "top 16"] == 9
        assert all(0.75 < agreement[order, name] < 0.95 for name in ("strided", "BigBird"))
    assert last["ordered", "blocks"] == 4 and last["shuffled", "blocks"] > 10
    assert agreement["ordered", "hierarchical"] > 0.99 > 0.9 > agreement["shuffled", "hierarchical"]
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "runs" / "masks.png").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
def test_phase_diagram(run, tmp_path):
    result = run("phase_diagram")
    curve, boundaries = result["curve"], result["boundaries"]
    np.testing.assert_allclose(curve, [5.2703, 5.8976, 9.5443], rtol=0, atol=5e-5)
    betas = np.array([1.0, 3.0, 5.0])
    error = 0.1 + np.expm1(betas**2 / 2048) * curve
    assert (np.abs(boundaries[1024] - curve) < error).all()
    assert 3 < boundaries[8][-1] - curve[-1] < 5
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "runs" / "phase.png").exists()


@pytest.mark.slow
def test_log_density(run, tmp_path):
    errors = run("log_density")
    # Steps are controlled to 1e-8.
    assert max(errors.values()) < 3e-8, errors
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "runs" / "log_density.png").exists()


@pytest.mark.slow
def test_continuity_equation(run, tmp_path):
    assert list(run("continuity_equation").values()) == [3, 4, 4]
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "runs" / "continuity_equation.png").exists()


@pytest.mark.slow
def test_steering(run, tmp_path):
    """Thirty steps, with a learning rate that falls as fast."""
    with jax.numpy_dtype_promotion("standard"):  # optax promotes
        result = run("steering", 30)
    losses = result["losses"]
    assert losses[0] > 0.5 and losses[-1] < losses[0] / 5, losses
    assert result["heights"].mean() < 0.25  # at first 0.6
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "runs" / "steering.png").exists()


@pytest.mark.slow
def test_noise(run, tmp_path):
    result = run("noise")
    for way, expected in (("up", [0, 0, 0.8208]), ("down", [0, 0.7399, 0.8208])):
        found = [result[way][kappa] for kappa in (0.38, 0.40, 0.42)]
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)  # a tilt of 0.02 decays
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "runs" / "noise.png").exists()


@pytest.mark.slow
def test_layers_to_a_curve(run):
    """As many polynomials as layers have the loss of the layers, where these are read."""
    found = run("layers_to_a_curve", None, 1, 1, 8, [6])
    assert list(found) == ["layers", "6, smoothed", "6, trained on"]
    np.testing.assert_allclose(found["6, smoothed"][6], found["layers"][6], rtol=1e-5)
    assert found["6, trained on"][6] != found["6, smoothed"][6]


def test_elastic_depth(run):
    pytest.importorskip("matplotlib")
    depths = ["Lie-Trotter 2", "Heun 4", "Tsit5 0.01"]
    (losses,) = run("elastic_depth", None, 2, 8, ["Heun 4-12, bounded"], depths).values()
    assert list(losses) == depths
    assert all(np.isfinite(loss) for _, loss in losses.values())
    each = {"Lie-Trotter": 1, "Heun": 2}
    for label, (evaluations, _) in losses.items():
        solver, size = label.split()
        assert evaluations == each[solver] * int(size) if solver in each else evaluations > 12
    assert pathlib.Path("runs/elastic_depth.png").read_bytes().startswith(b"\x89PNG")
