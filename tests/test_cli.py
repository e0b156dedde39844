"""The command line, through its own parser."""

import json

import pytest
from typer.testing import CliRunner

from jaxflow.cli import app, main

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
    result = run("train", "lm", *flags, *TINY, "--steps", 2, "--seed", 1, "--out", folder)
    assert result.exit_code == 0, result.output
    assert "validation loss" in result.output and "a sample" in result.output
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((folder / "config.json").read_text())
    assert config["settings"]["curve"] == config["model"]["curve"] == "smooth"
    assert config["model"]["depth"] == {
        "t1": 2.0, "steps": 2, "tolerance": None, "solver": "lie-trotter",
    }  # fmt: skip
    resumed = run("train", "lm", "--resume", folder, "--steps", 3)
    assert resumed.exit_code == 0 and "after 3 steps" in resumed.output
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    texts = [
        run("sample", folder, "--prompt", "the ", "--length", 6, *depth).output
        for depth in ([], ["--solver", "heun", "--steps", 1], [])
    ]
    assert texts[0].startswith("the ") and texts[0] == texts[2] and texts[1].startswith("the ")
    assert "already" in run("train", "lm", *flags, *TINY, "--out", folder).output


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
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["kinetic"] > 0


def test_train_refuses_what_it_does_not_know(tmp_path):
    assert "preset must be one of" in run("train", "lm", "--preset", "huge").output
    assert "no run" in run("train", "lm", "--resume", tmp_path).output
