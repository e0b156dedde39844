"""The command line, through its own parser. What it refuses: test_cli_refusals.py."""

import json
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

import jaxflow as jf
from jaxflow.cli import app, learning, main, simulate
from jaxflow.cli import train as training_command
from jaxflow.cli.sample import encoded
from jaxflow.cli.settings import Counts, counts
from jaxflow.cli.simulation import Simulation
from jaxflow.cli.systems import OBSERVABLES, initial_measure, make_field, whole_patches
from jaxflow.training.depths import MOST

pytest.importorskip("matplotlib")

# Every run of these has one shape, and so one program.
SMALL = ["--n", "12", "--t1", "2", "--frames", "5"]


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    """Tests leave nothing in the user's cache folder."""
    monkeypatch.setenv("JAXFLOW_CACHE", "")


def run(*args):
    return CliRunner().invoke(app, [str(a) for a in args], catch_exceptions=False)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_simulate_writes_a_run_folder(tmp_path):
    first, again = tmp_path / "first", tmp_path / "again"
    result = run("simulate", *SMALL, "--beta", 2, "--seed", 3, "--out", first)
    assert result.exit_code == 0, result.output
    assert "clusters" in result.output and "evaluations" in result.output
    config = json.loads((first / "config.json").read_text())
    assert config["n"] == 12 and config["beta"] == 2.0 and config["solver"] == "tsit5"
    rows = rows_of(first)
    assert [row["t"] for row in rows] == [0.0, 0.5, 1.0, 1.5, 2.0]
    energies = [row["energy"] for row in rows]
    assert energies == sorted(energies)
    assert (first / "summary.png").read_bytes().startswith(b"\x89PNG")
    assert f'{len(energies)}], "points"' in (first / "flow.html").read_text()
    assert {p.name for p in first.iterdir()} == {
        "config.json", "metrics.jsonl", "summary.png", "flow.html",
    }  # fmt: skip
    # The same again from its file, and in its place.
    for out in (again, again):
        assert run("simulate", "--config", first / "config.json", "--out", out).exit_code == 0
        for name in ("config.json", "metrics.jsonl"):
            assert (first / name).read_bytes() == (again / name).read_bytes()


@pytest.fixture
def bare(monkeypatch):
    """A machine without the optional libraries."""
    for name in ("matplotlib.figure", "matplotlib.animation"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)


def test_without_pictures_runs_say_so_first_and_go_on(tmp_path, bare):
    out, picture = tmp_path / "run", tmp_path / "compared.png"
    result = run("simulate", *SMALL, "--merges", "--out", out)
    assert result.exit_code == 0, result.output
    told, cost, *_ = (part for part in result.output.split("12 tokens in R^3"))
    assert 'need matplotlib: pip install "jaxflow[viz]". It goes on without summary.png' in told
    assert "ms an evaluation" in cost
    assert {p.name for p in out.iterdir()} == {
        "config.json",
        "flow.html",
        "metrics.jsonl",
        "merges.json",
    }
    result = run("compare", out, out, "--out", picture)
    assert result.exit_code == 0 and "last value" in result.output and not picture.exists()
    film = run("simulate", *SMALL, "--film", "--out", tmp_path / "film")
    assert film.exit_code == 2 and "pip install" in film.output
    assert not (tmp_path / "film").exists()


def test_segments_are_one_flow(tmp_path):
    """What is solved in pieces, each with its own steps, agrees with one solve to its tolerance."""
    assert run("simulate", *SMALL, "--out", tmp_path / "run").exit_code == 0
    s = Simulation(n=12, t1=2.0, frames=5)
    mu0, _ = initial_measure(s)
    field = make_field(s, 3)
    observe = {name: OBSERVABLES[name](s, field) for name in ("energy", "clusters")}
    saveat = diffrax.SaveAt(ts=jnp.zeros(1), t1=True)
    sol = jf.flow(field, mu0, t1=2.0, saveat=saveat, observe=observe, **simulate._steps(s))
    energy = float(sol.observed["energy"][-1])
    np.testing.assert_allclose(rows_of(tmp_path / "run")[-1]["energy"], energy, rtol=1e-4)


@pytest.mark.parametrize("frames, sizes", [(2, [2]), (10, [3] * 5), (121, [16] * 8)])
def test_segments_share_their_ends_and_their_length(frames, sizes):
    s = Simulation(frames=frames)
    ts = simulate._times(s)
    found = list(simulate._segments(s, ts))
    assert [len(times) for times in found] == sizes
    assert all(a[-1] == b[0] for a, b in zip(found, found[1:], strict=False))
    np.testing.assert_array_equal(np.unique(np.concatenate(found)), ts)
    assert [len(times) for times in simulate._segments(Simulation(dt=0.1, frames=frames), ts)] == [
        frames
    ]


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_what_an_interrupted_simulation_has_done_is_kept(tmp_path, monkeypatch, number, code):
    whole, segment, done = tmp_path / "whole", simulate._segment, []
    assert run("simulate", *SMALL, "--out", whole).exit_code == 0

    def interrupted(*args):
        done.append(args)
        if len(done) == 3:
            os.kill(os.getpid(), number)
        return segment(*args)

    monkeypatch.setattr(simulate, "_segment", interrupted)
    result = run("simulate", *SMALL, "--out", tmp_path / "part")
    assert result.exit_code == code, result.output
    assert "holds the flow up to t = " in result.output
    kept = (tmp_path / "part" / "metrics.jsonl").read_text()
    assert (whole / "metrics.jsonl").read_text().startswith(kept) and len(kept.splitlines()) >= 3
    assert {p.name for p in (tmp_path / "part").iterdir()} == {"config.json", "metrics.jsonl"}


def test_a_failed_solve_is_reported_with_its_remedy(tmp_path, monkeypatch, capsys):
    def failed(*args, **kwargs):
        raise jf.FlowError("the flow stopped at t = 0.1 [/x]. Raise max_steps.")

    monkeypatch.setattr(simulate, "flow", failed)
    args = ["simulate", *SMALL, "--out", str(tmp_path / "run")]
    monkeypatch.setattr("sys.argv", ["jaxflow", *args])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    told = "error: from t = 0 to 0.5 of 2: the flow stopped at t = 0.1 [/x]. Raise max_steps.\n"
    assert capsys.readouterr().err == told


def test_too_many_steps_are_an_error_with_its_remedy(tmp_path, monkeypatch):
    """Segments share the steps: each takes few, together they are too many."""
    monkeypatch.setattr(simulate, "_steps_of", lambda sol: 60_000)
    result = run("simulate", *SMALL, "--out", tmp_path / "run")
    assert result.exit_code == 1 and "--max-steps is 100000. Raise it" in result.output
    assert [row["t"] for row in rows_of(tmp_path / "run")] == [0.0, 0.5, 1.0]


def test_simulate_reads_a_text(tmp_path):
    text = tmp_path / "prompt.txt"
    text.write_bytes("\ufeffthe cat sat [/x] on a mat and naïve".encode())
    out = tmp_path / "run"
    result = run("simulate", "--text", text, *SMALL, "--out", out)
    assert result.exit_code == 0, result.output
    assert "12 in R^3" in result.output and "its words" in result.output
    assert "mat" in (out / "flow.html").read_text()
    _, words = initial_measure(Simulation(text=text))
    assert words == ["the", "cat", "sat", "[", "/", "x", "]", "on", "a", "mat", "and", "naïve"]


def test_simulate_reads_an_image(tmp_path):
    """The patches of a picture: 12 of one pixel, in three colours."""
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 3), np.uint8)
    image.fromarray(pixels).save(tmp_path / "noise.png")
    np.save(tmp_path / "noise.npy", pixels)
    for name in ("noise.png", "noise.npy"):
        flags = ["--image", tmp_path / name, "--patch", 1, *SMALL]
        result = run("simulate", *flags, "--out", tmp_path / f"run-{name}")
        assert result.exit_code == 0 and "12 in R^3" in result.output, result.output
    one, other = (rows_of(tmp_path / f"run-{name}") for name in ("noise.png", "noise.npy"))
    assert one == other
    large = run("simulate", "--image", tmp_path / "noise.npy", "--patch", 20)
    assert large.exit_code == 2 and "smaller than --patch 20" in large.output
    np.testing.assert_array_equal(whole_patches(pixels, 2), pixels[:4, :2])


def test_simulate_with_points_and_matrices_of_files(tmp_path):
    """The tokens and Q, K, V of .npy files, the figure as .svg, and the tokens saved."""
    rng = np.random.default_rng(0)
    x, Q, K, V = rng.normal(size=(12, 3)), *rng.normal(size=(3, 3, 3))
    for name, array in {"x": x, "Q": Q[:2], "K": K[:2], "V": V}.items():
        np.save(tmp_path / f"{name}.npy", array)
    files = {name: tmp_path / f"{name}.npy" for name in "QKVx"}
    flags = ["--points", files["x"], "--query", files["Q"], "--key", files["K"]]
    flags += ["--value", files["V"], "--geometry", "euclidean", "--beta", 0.5, "--format", "svg"]
    saved, out = tmp_path / "points.npz", tmp_path / "run"
    short = ["--t1", 0.5, "--frames", 5, "--rtol", 1e-6]
    result = run("simulate", *flags, *short, "--save", saved, "--out", out)
    assert result.exit_code == 0, result.output
    assert (out / "summary.svg").read_text().startswith("<?xml")
    found = np.load(saved)
    assert found["points"].shape == (5, 12, 3) and found["points"].dtype == np.float32
    np.testing.assert_allclose(found["points"][0], x, rtol=1e-6)
    field = jf.SelfAttention(Q[:2], K[:2], V, beta=0.5, geometry=jf.Euclidean())
    sol = jf.flow(field, jf.Measure(np.asarray(x, np.float32)), t1=0.5)
    np.testing.assert_allclose(found["points"][-1], sol.last.points, rtol=1e-3, atol=1e-4)
    energy = jf.observables.interaction_energy(
        jf.Measure(found["points"][-1]), 0.5, query=Q[:2], key=K[:2]
    )
    np.testing.assert_allclose(rows_of(out)[-1]["energy"], energy, rtol=1e-4)
    assert json.loads((out / "config.json").read_text())["points"] == str(files["x"])


def test_simulate_with_noise(tmp_path):
    """Common noise moves far tokens of R^d by one path, which is that of the seed."""
    flags = "--n 3 --d 2 --beta 0 --law gaussian --geometry euclidean --kappa 0.5 --noise common"
    steps = "--dt 0.25 --t1 0.5 --frames 3 --solver euler".split()
    saved = tmp_path / "points.npz"
    result = run("simulate", *flags.split(), *steps, "--save", saved, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    x = np.load(saved)["points"]
    # Euler's steps of attention at beta = 0, x <- x + h m, keep differences.
    np.testing.assert_allclose(np.diff(x[-1], axis=0), np.diff(x[0], axis=0), atol=1e-5)
    noise = jf.Noise(0.5, key=jax.random.fold_in(jax.random.key(0), 1), common=True)
    field = jf.SelfAttention(beta=0.0, geometry=jf.Euclidean())
    mu0 = jf.measure.gaussian(3, 2, key=jax.random.key(0))
    sol = jf.flow(field, mu0, t1=0.5, dt0=0.25, solver=diffrax.Euler(), noise=noise)
    np.testing.assert_allclose(x[-1], sol.last.points, atol=1e-5)
    assert np.linalg.norm(x[-1].mean(axis=0) - 1.25**2 * x[0].mean(axis=0)) > 0.1


@pytest.mark.slow
def test_simulate_with_everything(tmp_path):
    """An event, log times, every observable, merges and a film; the same again from its file."""
    pytest.importorskip("PIL")
    first, again, other = (tmp_path / name for name in ("first", "again", "other"))
    flags = "--n 6 --d 2 --law circle --beta 1 --t1 40 --until clustered --log-time --frames 12"
    names = "diameter", "order", "hull-area", "kinetic", "entropy", "rank"
    observed = [flag for name in names for flag in ("--observe", name)]
    law = [*flags.replace("--law circle", "--law uniform").split(), *observed, "--double"]
    result = run("simulate", *law, "--merges", "--film", "--out", first)
    assert result.exit_code == 0, result.output
    assert "stopped by --until clustered" in result.output
    rows = rows_of(first)
    assert set(rows[0]) == {"t", "energy", "clusters", *names}
    assert rows[-1]["clusters"] == 1 and rows[-2]["clusters"] > 1 and rows[-1]["t"] < 40
    assert rows[-1]["hull-area"] < rows[0]["hull-area"] and rows[-1]["order"] > 0.99
    merges = json.loads((first / "merges.json").read_text())
    assert len(merges) == 5 and merges[-1]["size"] == 6
    # The event looks at clusters of one time, as the merges do here.
    np.testing.assert_allclose(merges[-1]["t"], rows[-1]["t"], rtol=1e-4)
    assert (first / "merges.png").exists() and list(first.glob("film.*"))
    result = run("simulate", "--config", first / "config.json", "--out", again)
    assert result.exit_code == 0, result.output
    for name in ("metrics.jsonl", "merges.json", "config.json"):
        assert (first / name).read_bytes() == (again / name).read_bytes()
    changed = ["--config", first / "config.json", "--seed", 4, "--out", other]
    assert run("simulate", *changed).exit_code == 0
    assert json.loads((other / "config.json").read_text())["seed"] == 4
    compared = run("compare", first, other, "--metric", "order", "--out", tmp_path / "two.png")
    assert compared.exit_code == 0, compared.output
    assert "seed" in compared.output and "rtol" not in compared.output
    assert (tmp_path / "two.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, shape",
    [
        ("--normalisation pre --law gaussian --solver dopri5", "12 in R^3"),
        ("--normalisation ngpt --alpha 0.5 --solver geodesic --law cap", "12 in R^3"),
        ("--normalisation sqrt --geometry layer-norm --d 4", "12 in R^4"),
        (
            "--geometry rms-norm --law simplex --d 12 --solver rk4 --dt 0.25 --until steady "
            "--speed 1e-6",
            "12 in R^12",
        ),
    ],
)
def test_simulate_elsewhere(tmp_path, flags, shape):
    result = run("simulate", *SMALL, *flags.split(), "--observe", "entropy", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert shape in result.output
    rows = rows_of(tmp_path)
    assert all(0 <= row["entropy"] <= np.log(12) + 1e-5 for row in rows)


@pytest.mark.parametrize(
    "flags, kind, place",
    [
        ({}, jf.SelfAttention, jf.Sphere),
        ({"geometry": "euclidean"}, jf.SelfAttention, jf.Euclidean),
        ({"geometry": "layer-norm"}, jf.SelfAttention, jf.Ellipsoid),
        ({"normalisation": "sqrt"}, jf.SqrtScaling, jf.Sphere),
        ({"normalisation": "pre"}, jf.PreNorm, jf.Euclidean),
        ({"normalisation": "peri"}, jf.PeriNorm, jf.Euclidean),
        ({"normalisation": "ngpt", "alpha": 0.5}, jf.NGPT, jf.Sphere),
    ],
)
def test_flags_choose_the_field(flags, kind, place):
    plain = {"normalisation": "post", "geometry": None, "alpha": 1.0, "repulsive": True}
    plain |= {"query": None, "key": None, "value": None}
    attention = {"beta": 3.0, "interaction": "unnormalised", "causal": True}
    field: Any = make_field(SimpleNamespace(**plain | attention | flags), 4)
    assert type(field) is kind and type(field.geometry) is place
    assert kind is not jf.NGPT or field.alpha == 0.5
    while not isinstance(field, jf.SelfAttention):
        field = field.field
    assert field.beta == 3 and field.causal and isinstance(field.interaction, jf.Unnormalised)
    np.testing.assert_array_equal(field.value, -np.eye(4))


def test_info():
    result = run("info", "--n", 1000, "--d", 64)
    assert result.exit_code == 0
    assert "diffrax" in result.output and "blocked" in result.output


# ------------------------------------------------------------------ training

TINY = ["--dim", "8", "--heads", "2", "--layers", "2", "--batch", "2", "--evaluate-every", "2"]
FLAGS = ["--tokens", "chars", "--context", "8", "--curve", "smooth", "--checkpoint-every", "1"]
FLAGS += ["--evaluation-batches", "1", "--seed", "1", *TINY]


@pytest.fixture(scope="module")
def prose(tmp_path_factory):
    path = tmp_path_factory.mktemp("prose") / "prose.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 30)
    return path


@pytest.fixture(scope="module")
def two_steps(prose):
    """A run of two steps."""
    pytest.importorskip("orbax.checkpoint")
    flags = ["--text", prose, "--cache", prose.parent / "cache", "--steps", 2]
    result = run("train", "lm", *FLAGS, *flags, "--out", prose.parent / "run")
    assert result.exit_code == 0, result.output
    assert "validation loss" in result.output and "a sample" in result.output
    assert any((prose.parent / "cache").iterdir())
    return prose.parent / "run"


@pytest.fixture
def trained(two_steps, tmp_path):
    """The same run, for a test to change."""
    return shutil.copytree(two_steps, tmp_path / "run")


def test_training_without_checkpoints_says_so_first_and_goes_on(prose, tmp_path, bare):
    out = tmp_path / "run"
    result = run("train", "lm", *FLAGS, "--text", prose, "--steps", 2, "--out", out)
    assert result.exit_code == 0, result.output
    told = result.output.partition("step 1 of 2")[0]
    assert "without loss.png" in told and 'pip install "jaxflow[train]"' in told
    assert "cannot be resumed, and its model is lost" in told and "a sample" in result.output
    assert {p.name for p in out.iterdir()} == {"config.json", "metrics.jsonl"}
    assert [row["step"] for row in rows_of(out)] == [1, 2]
    before = (out / "metrics.jsonl").read_bytes()
    for refused in ("train lm --resume", "sample", f"inspect --text {prose}"):
        assert run(*refused.split(), out).exit_code == 2
    assert (out / "metrics.jsonl").read_bytes() == before


def test_train_and_resume(trained, prose, tmp_path):
    names = [path.name[-1] for path in sorted((trained / "checkpoints").glob("step-*"))]
    assert names == ["1", "2"]
    assert (trained / "loss.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((trained / "config.json").read_text())
    assert config["settings"]["curve"] == config["model"]["curve"] == "smooth"
    assert config["model"]["depth"] == {
        "t1": 2.0, "steps": 2, "tolerance": None, "solver": "lie-trotter",
    }  # fmt: skip
    # What is refused changes nothing, so that a plain resume goes on.
    before = {p: p.read_bytes() for p in trained.rglob("*") if p.is_file()}
    other = tmp_path / "other.txt"
    other.write_text("pack my box with five dozen liquor jugs. " * 40)
    for flags, told in (
        (["--dim", 16], "--dim"),
        (["--text", other], "other data"),
        (["--steps", 0], "--steps must be at least 1"),
        (["--learning-rate", "nan"], "--learning-rate"),
        (["--out", tmp_path / "new"], "--out"),
    ):
        result = run("train", "lm", "--resume", trained, *flags)
        assert result.exit_code == 2 and told in result.output, result.output
    again = run("train", "lm", *FLAGS, "--text", prose, "--steps", 2, "--out", trained)
    assert again.exit_code == 2 and "already" in again.output
    assert run("simulate", *SMALL, "--out", trained).exit_code == 2
    assert {p: p.read_bytes() for p in trained.rglob("*") if p.is_file()} == before
    resumed = run("train", "lm", "--resume", trained, "--steps", 9, "--minutes", 1e-9)
    assert resumed.exit_code == 0 and "time, after 3 steps" in resumed.output, resumed.output
    assert "step 3 of 9: loss " in resumed.output  # a line a log where there is no terminal
    assert [row["step"] for row in rows_of(trained)] == [1, 2, 3]
    spent = run("train", "lm", "--resume", trained, "--steps", 9, "--budget", 1)
    assert spent.exit_code == 0 and "budget, after 3 steps" in spent.output


@pytest.mark.parametrize(
    "number, code", [pytest.param("SIGINT", 130, marks=pytest.mark.slow), ("SIGTERM", 143)]
)
def test_a_signal_ends_training_with_a_checkpoint(tmp_path, prose, monkeypatch, number, code):
    pytest.importorskip("orbax.checkpoint")
    batch = jf.training.Text.batch

    def interrupted(self, step):
        if step == 1:
            os.kill(os.getpid(), signal.Signals[number])
        return batch(self, step)

    monkeypatch.setattr(jf.training.Text, "batch", interrupted)
    flags = [*FLAGS, "--checkpoint-every", 9, "--text", prose, "--steps", 3]
    result = run("train", "lm", *flags, "--out", tmp_path / "run")
    assert result.exit_code == code, result.output
    assert f"{number} after 2 steps: --resume" in result.output
    assert "a sample" not in result.output and "Traceback" not in result.output
    saved = [path.name[-1] for path in (tmp_path / "run" / "checkpoints").glob("step-*")]
    assert max(saved) == "2" and not (tmp_path / "run" / "loss.png").exists()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_depths_of_a_training(tmp_path, prose, monkeypatch):
    """As `fit` receives them; the model's own, of its evaluations, is that of --solver-steps."""
    asked = {}

    def fit(model, data, **options):
        asked.update(options, depth=model.depth)
        raise ValueError("that is all")

    monkeypatch.setattr(jf.training, "fit", fit)
    flags = [*FLAGS, "--text", prose, "--elastic", "2:12:5", "--elastic-after", 9]
    flags += ["--jitter", 0.25, "--consistency", 2]
    result = run("train", "lm", *flags, "--out", tmp_path / "run")
    assert result.exit_code == 2 and "that is all" in result.output
    assert asked["depths"] == jf.training.Elastic((2, 7, 12), 0.25, after=9)
    assert asked["loss"].consistency == 2.0 and asked["depth"].steps == 2
    assert [list(counts(text)) for text in ("2:4", "4:12:4")] == [[2, 3, 4], [4, 8, 12]]
    # What the flag allows is what a training takes.
    assert Counts().allows(f"1:{MOST}") and not Counts().allows(f"1:{MOST + 1}")


@pytest.mark.slow
def test_sample(trained):
    other = ["--solver", "heun", "--steps", 1]
    texts = [
        run("sample", trained, "--prompt", "the ", "--length", 6, *depth).output
        for depth in ([], other, [])
    ]
    assert texts[0].startswith("the ") and texts[0] == texts[2] and texts[1].startswith("the ")
    tokenizer = jf.training.tokenizer(trained)
    assert tokenizer.decode(encoded(tokenizer, None)) == " "
    assert encoded(jf.training.Chars("ab"), None).tolist() == [0]
    with jax.enable_x64(True):  # the precision is that of the run
        assert run("sample", trained, "--prompt", "the ", "--length", 6).output == texts[0]
    early = run("sample", trained, "--prompt", "the ", "--length", 4, "--exit", 1).output
    assert early.startswith("the ") and "1 of 2 evaluations a token" in early
    foreign = run("sample", trained, "--prompt", "[/x]")
    assert foreign.exit_code == 2 and "alphabet" in foreign.output


def test_evaluate_on_another_text(trained, prose, tmp_path, monkeypatch):
    """Of the run's own text the row has the loss of the training; another text is named."""
    with monkeypatch.context() as bare:
        bare.setitem(sys.modules, "matplotlib.figure", None)
        assert "without evaluate.png" in run("evaluate", trained, "--batches", 1).output
        assert not (trained / "evaluate.png").exists()
    own = run("evaluate", trained, "--batches", 1, "--exit", 0, "--exit", 1)
    assert own.exit_code == 0 and "not its own data" not in own.output, own.output
    lines = (trained / "evaluate.jsonl").read_text().splitlines()
    row, whole, one = (json.loads(line) for line in lines)
    assert row["loss"] == pytest.approx(rows_of(trained)[-1]["validation_loss"], rel=1e-6)
    # Tokens that exit: none of them before all steps, and each after the first.
    assert whole["loss"] == pytest.approx(row["loss"], rel=1e-6) and "exit at 1" in own.output
    found = [(r["exit"], r["num_evaluations"]) for r in (whole, one)]
    assert found == [(0, row["num_evaluations"]), (1, 1)] and one["loss"] != row["loss"]
    other = tmp_path / "other.txt"
    other.write_text("lazy dog and quick fox: the brown one jumps over the hole. ".replace(":", ""))
    other.write_text(other.read_text() * 30)
    result = run("evaluate", trained, "--batches", 1, "--text", other)
    assert result.exit_code == 0 and f"validation on {other}, not its own data" in result.output
    (row,) = (json.loads(line) for line in (trained / "evaluate.jsonl").read_text().splitlines())
    assert row["data"] == str(other)
    same = run("evaluate", trained, "--batches", 1, "--text", prose)
    assert same.exit_code == 0 and "not its own data" not in same.output
    wrong = run("evaluate", trained, "--images", prose)
    assert wrong.exit_code == 2 and "give --text, not --images" in wrong.output
    before = prose.read_text()
    try:
        prose.write_text(other.read_text())
        changed = run("evaluate", trained)
    finally:
        prose.write_text(before)
    assert changed.exit_code == 2 and "is not what" in changed.output and "--text" in changed.output


@pytest.mark.slow
def test_evaluate_at_other_depths(tmp_path, prose):
    """Its own depth has the loss of the training; a fine one agrees with another method."""
    pytest.importorskip("orbax.checkpoint")
    folder = tmp_path / "run"
    flags = ["--text", prose, "--tokens", "chars", "--context", 8, "--curve", "linear"]
    flags += [*TINY, "--steps", 2, "--learning-rate", 0.05, "--solver", "euler"]
    assert run("train", "lm", *flags, "--out", folder).exit_code == 0
    mixed = run("evaluate", folder, "--tolerance", 1e-3, "--layers", 4, "--layers", 64)
    assert mixed.exit_code == 0 and "takes fixed steps" in mixed.output
    lines = (folder / "evaluate.jsonl").read_text().splitlines()
    own, few, many = (json.loads(line) for line in lines)
    assert (few["layers"], few["num_evaluations"]) == (4, 4)
    result = run("evaluate", folder, "--steps", 32, "--solver", "bosh3")
    assert result.exit_code == 0, result.output
    assert "validation" in result.output and "evaluations" in result.output
    assert (folder / "evaluate.png").read_bytes().startswith(b"\x89PNG")
    lines = (folder / "evaluate.jsonl").read_text().splitlines()
    own, fine = (json.loads(line) for line in lines)
    assert (own["solver"], own["steps"], own["num_evaluations"]) == ("euler", 2, 2)
    assert (fine["solver"], fine["steps"]) == ("bosh3", 32)
    trained = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert own["loss"] == pytest.approx(trained["validation_loss"], rel=1e-6)
    result = run("evaluate", folder, "--solver", "tsit5", "--tolerance", 1e-5)
    exact = json.loads((folder / "evaluate.jsonl").read_text().splitlines()[-1])["loss"]
    assert abs(fine["loss"] - exact) < 1e-5 < abs(own["loss"] - exact)
    assert abs(many["loss"] - exact) < abs(few["loss"] - exact) / 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["image", "--preset", "attention", "--patch", "4"],
        ["resnet", "--preset", "neural-ode", "--width", "8"],
    ],
)
def test_train_on_digits(tmp_path, flags):
    pytest.importorskip("sklearn")
    pytest.importorskip("orbax.checkpoint")
    sizes = ["--dim", "8", "--steps", "2", "--batch", "16", "--kinetic", "0.01"]
    result = run("train", *flags, *sizes, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "validation accuracy" in result.output
    assert "accuracy" in run("evaluate", tmp_path / "run", "--batches", 1).output
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["kinetic"] > 0


@pytest.mark.parametrize(
    "command, given, kind, about",
    [
        ("lm", {"preset": "continuous-cpu"}, "LanguageModel", {"curve": "linear", "dim": 128}),
        ("lm", {"preset": "any-depth-cpu"}, "LanguageModel", {"tied": False, "placement": "peri"}),
        ("lm", {"block": learning.Block.llama, "bf16": True}, "LanguageModel", {"norm": "rms"}),
        ("image", {"preset": "attention"}, "ImageClassifier", {"width": 0, "patch": 2}),
        ("resnet", {"preset": "neural-ode"}, "ResidualNetwork", {"inputs": 64, "outputs": 10}),
    ],
)
def test_settings_say_what_the_model_is(command, given, kind, about):
    task = learning.TASKS[command]
    s = task(**given)
    s = task(**given | learning.base(s, frozenset(given)))
    data = SimpleNamespace(vocab_size=11, shape=(8, 8, 1), classes=10)
    config = training_command._model_config(s, data)
    assert config["model"] == kind and about.items() <= config.items()
    model = eqx.filter_eval_shape(jf.models.build, config)
    assert type(model).__name__ == kind
    steps = {"neural-ode": None, "any-depth-cpu": 8}.get(given.get("preset"), 4)
    assert (model.depth.tolerance, model.depth.steps) == (None if steps else 1e-3, steps)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_long_solve(tmp_path, number):
    """A process in the middle of a compiled solve of minutes ends at once, and whole."""
    args = "--n 6000 --d 3 --t1 1e4 --dt 1e-3 --max-steps 100000000 --frames 2".split()
    command = [sys.executable, "-m", "jaxflow", "simulate", *args, "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert "evaluation of the field" in process.stdout.readline()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(4)
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 128 + number and "Traceback" not in errors
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["config.json"]
