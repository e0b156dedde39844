"""The command line, through its own parser."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import jaxflow as jf
from jaxflow.cli import app, main
from jaxflow.cli.systems import make_field

pytest.importorskip("matplotlib")
pytest.importorskip("plotly")

SMALL = ["--n", "12", "--t1", "2", "--frames", "5"]


def run(*args):
    return CliRunner().invoke(app, [str(a) for a in args], catch_exceptions=False)


def test_simulate_writes_a_run_folder(tmp_path):
    result = run(
        "simulate", *SMALL, "--beta", 2, "--solver", "dopri5", "--seed", 3, "--out", tmp_path
    )
    assert result.exit_code == 0, result.output
    assert "clusters" in result.output and "evaluations" in result.output
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["n"] == 12 and config["beta"] == 2.0 and config["solver"] == "dopri5"
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["t"] for row in rows] == [0.0, 0.5, 1.0, 1.5, 2.0]
    energies = [row["energy"] for row in rows]
    assert energies == sorted(energies)
    assert (tmp_path / "summary.png").read_bytes().startswith(b"\x89PNG")
    assert "Plotly.newPlot" in (tmp_path / "flow.html").read_text()


def test_simulate_reads_a_text(tmp_path):
    text = tmp_path / "prompt.txt"
    text.write_text("the cat sat on the mat and the dog sat on the cat.")
    result = run(
        "simulate", "--text", text, *SMALL, "--d", 8, "--repulsive", "--out", tmp_path / "run"
    )
    assert result.exit_code == 0, result.output
    assert "14 in R^8" in result.output and "words" in result.output
    assert "mat" in (tmp_path / "run" / "flow.html").read_text()


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
    rows = [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()]
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
        ("--normalisation pre --law gaussian", "12 in R^3"),
        ("--normalisation peri", "12 in R^3"),
        ("--normalisation ngpt --alpha 0.5 --solver geodesic", "12 in R^3"),
        ("--normalisation sqrt --geometry layer-norm --d 4", "12 in R^4"),
        ("--geometry rms-norm --law simplex --d 12 --solver rk4", "12 in R^12"),
        ("--law cap --until steady --speed 10", "12 in R^3"),
    ],
)
def test_simulate_elsewhere(tmp_path, flags, shape):
    result = run("simulate", *SMALL, *flags.split(), "--observe", "entropy", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert shape in result.output
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
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
    attention = {"beta": 3.0, "interaction": "unnormalised", "causal": True}
    field: Any = make_field(SimpleNamespace(**plain | attention | flags), 4)
    assert type(field) is kind and type(field.geometry) is place
    assert kind is not jf.NGPT or field.alpha == 0.5
    while not isinstance(field, jf.SelfAttention):
        field = field.field
    assert field.beta == 3 and field.causal and isinstance(field.interaction, jf.Unnormalised)
    np.testing.assert_array_equal(field.value, -np.eye(4))


def test_simulate_reads_an_image(tmp_path):
    """The patches of a picture, cropped to whole ones: 3 x 2 of 4 x 4 pixels."""
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (13, 9), np.uint8)
    image.fromarray(pixels).save(tmp_path / "noise.png")
    np.save(tmp_path / "noise.npy", pixels)
    folders = []
    for name in ("noise.png", "noise.npy"):
        folders.append(tmp_path / f"run-{name}")
        flags = ["--image", tmp_path / name, "--patch", 4, "--t1", 1, "--frames", 3]
        result = run("simulate", *flags, "--out", folders[-1])
        assert result.exit_code == 0, result.output
        assert "6 in R^16" in result.output
    one, other = ((folder / "metrics.jsonl").read_text() for folder in folders)
    assert one == other
    assert run("simulate", "--image", tmp_path / "noise.npy", "--patch", 20).exit_code == 2


def test_compare_refuses_what_it_cannot_compare(tmp_path):
    for name, rows in (("a", [{"t": 0, "x": 1}]), ("b", [{"step": 0, "x": 1}])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name / "metrics.jsonl").write_text(lines)
    a, b = tmp_path / "a", tmp_path / "b"
    assert "two or more" in run("compare", a).output
    assert "no run" in run("compare", a, tmp_path).output
    assert "different commands" in run("compare", a, b).output
    assert "not measured by all" in run("compare", a, a, "--metric", "y").output


def test_completion_knows_the_commands():
    environment = {
        "_JAXFLOW_COMPLETE": "complete_bash",
        "COMP_WORDS": "jaxflow ",
        "COMP_CWORD": "1",
    }
    result = CliRunner().invoke(app, [], env=environment, prog_name="jaxflow")
    assert {"simulate", "compare", "phase-diagram", "train"} <= set(result.output.split())


def test_info():
    result = run("info", "--n", 1000, "--d", 64)
    assert result.exit_code == 0
    assert "diffrax" in result.output and "blocked" in result.output


def test_errors_are_shown_with_their_remedy(monkeypatch, capsys, tmp_path):
    args = ["simulate", *SMALL, "--t1", "50", "--max-steps", "3", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["jaxflow", *args])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    assert "Raise" in capsys.readouterr().out


def test_bad_options_are_refused(tmp_path):
    assert run("simulate", "--interaction", "sotfmax").exit_code == 2
    assert run("simulate", "--frames", 1).exit_code == 2
    assert run("simulate", "--text", tmp_path / "absent.txt").exit_code == 2
    pre = run("simulate", "--normalisation", "pre", "--geometry", "sphere")
    assert pre.exit_code == 2 and "euclidean" in pre.output
    assert run("simulate", "--law", "circle", "--d", 3).exit_code == 2
    (tmp_path / "other.json").write_text('{"command": "simulate", "colour": "red"}')
    assert "not known" in run("simulate", "--config", tmp_path / "other.json").output


TINY = ["--dim", "8", "--heads", "2", "--layers", "2", "--batch", "2", "--evaluate-every", "2"]


@pytest.fixture
def prose(tmp_path):
    path = tmp_path / "prose.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 30)
    return path


def test_train_resume_and_sample(tmp_path, prose):
    pytest.importorskip("orbax.checkpoint")
    folder = tmp_path / "run"
    flags = ["--text", prose, "--tokens", "chars", "--context", 8, "--curve", "smooth"]
    flags += ["--cache", tmp_path / "cache", "--checkpoint-every", 1, "--evaluation-batches", 1]
    result = run("train", "lm", *flags, *TINY, "--steps", 2, "--seed", 1, "--out", folder)
    assert result.exit_code == 0, result.output
    assert [path.name[-1] for path in sorted((folder / "checkpoints").glob("step-*"))] == ["1", "2"]
    assert any((tmp_path / "cache").iterdir())
    assert "validation loss" in result.output and "a sample" in result.output
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((folder / "config.json").read_text())
    assert config["settings"]["curve"] == config["model"]["curve"] == "smooth"
    assert config["model"]["depth"] == {
        "t1": 2.0, "steps": 2, "tolerance": None, "solver": "lie-trotter",
    }  # fmt: skip
    other = run("train", "lm", "--resume", folder, "--dim", 16)
    assert other.exit_code and "--dim" in other.output
    resumed = run("train", "lm", "--resume", folder, "--steps", 3)
    assert resumed.exit_code == 0 and "after 3 steps" in resumed.output
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    texts = [
        run("sample", folder, "--prompt", "the ", "--length", 6, *depth).output
        for depth in ([], ["--solver", "heun", "--steps", 1], [])
    ]
    assert run("sample", folder, "--length", 2).output.startswith(" ")
    assert texts[0].startswith("the ") and texts[0] == texts[2] and texts[1].startswith("the ")
    spent = run("train", "lm", "--resume", folder, "--steps", 9, "--budget", 1)
    assert spent.exit_code == 0 and "budget, after 3 steps" in spent.output
    assert "already" in run("train", "lm", *flags, *TINY, "--out", folder).output
    both = run("sample", folder, "--steps", 2, "--tolerance", 0.1)
    assert both.exit_code and "tolerance" in both.output


@pytest.mark.slow
def test_evaluate_at_other_depths(tmp_path, prose):
    """Its own depth has the loss of the training; a fine one agrees with another method."""
    pytest.importorskip("orbax.checkpoint")
    folder = tmp_path / "run"
    flags = ["--text", prose, "--tokens", "chars", "--context", 8, "--curve", "linear"]
    flags += [*TINY, "--steps", 2, "--learning-rate", 0.05, "--solver", "euler"]
    assert run("train", "lm", *flags, "--out", folder).exit_code == 0
    mixed = run("evaluate", folder, "--tolerance", 1e-3, "--layers", 4, "--layers", 64)
    assert mixed.exit_code == 0 and "takes fixed steps" in " ".join(mixed.output.split())
    lines = (folder / "evaluate.jsonl").read_text().splitlines()
    own, few, many = (json.loads(line) for line in lines)
    assert (few["layers"], few["num_evaluations"]) == (4, 4)
    result = run("evaluate", folder, *("--steps", 1, "--steps", 32), "--solver", "bosh3")
    assert result.exit_code == 0, result.output
    assert "validation" in result.output and "evaluations" in result.output
    assert (folder / "evaluate.png").read_bytes().startswith(b"\x89PNG")
    lines = (folder / "evaluate.jsonl").read_text().splitlines()
    own, coarse, fine = (json.loads(line) for line in lines)
    assert (own["solver"], own["steps"], own["num_evaluations"]) == ("euler", 2, 2)
    assert (fine["solver"], fine["steps"]) == ("bosh3", 32)
    trained = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert own["loss"] == pytest.approx(trained["validation_loss"], rel=1e-6)
    result = run("evaluate", folder, "--solver", "tsit5", "--tolerance", 1e-5)
    exact = json.loads((folder / "evaluate.jsonl").read_text().splitlines()[-1])["loss"]
    assert abs(fine["loss"] - exact) < 1e-5 < abs(own["loss"] - exact)
    assert abs(many["loss"] - exact) < abs(few["loss"] - exact) / 4


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


def test_train_refuses_what_it_does_not_know(tmp_path):
    assert "preset must be one of" in run("train", "lm", "--preset", "huge").output
    both = run("train", "lm", "--tolerance", 1e-3, "--solver-steps", 3)
    assert both.exit_code and "give one of" in both.output
    assert "no run" in run("train", "lm", "--resume", tmp_path).output
