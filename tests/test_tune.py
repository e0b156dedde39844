"""The tuner of the GPU kernels, on tiny shapes and made-up times, without a GPU."""

import importlib.util
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import typer

from benchmarks import shapes, timing, tune
from benchmarks.__main__ import tune_tiles
from benchmarks.report import failures, table
from jaxflow.kernels import pallas_gpu
from jaxflow.kernels.pallas_gpu import configs, hopper, particles, tensor_cores

PARTICLES = shapes.Shape("tiny-particles", 40, 3)
HEADS = shapes.Shape("tiny-heads", 40, 32, batch=2, causal=True, scale=0.2)
HOPPER = (9, 0)
OLDER = (8, 0)


def tuned_case(shape, mode, *candidates):
    case = tune.case(shape, mode, OLDER)
    return case._replace(candidates=(case.candidates[0], *candidates))


# ------------------------------------------------------------------ candidates


@pytest.mark.parametrize("mode", tune.MODES)
@pytest.mark.parametrize("capability", [HOPPER, OLDER], ids=str)
def test_every_shape_has_candidates_and_a_key_that_the_kernels_look_up(mode, capability):
    for shape in shapes.chosen("gpu"):
        case = tune.case(shape, mode, capability)
        sources = [tune.text(c) for c in case.candidates]
        assert len(set(sources)) == len(sources) >= 1
        entry = {"A device": {case.key: case.candidates[-1]}}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(configs, "TUNED", entry)
            found = configs.tuned("A device, 80GB", case.family, mode, shape.dtype, shape.d)
        assert found == case.candidates[-1]


def test_families_by_device():
    families = {c.shape.name: c.family for c in tune.cases(shapes.chosen("gpu"), HOPPER)}
    assert families["particles-65536-3"] == "particles"
    assert families["language-64-1024-64-bfloat16"] == "hopper"
    assert families["heads-16384-64"] == "tensor_cores"


# ------------------------------------------------------------------ one case


@pytest.mark.parametrize(
    "mode",
    [
        "forward",
        pytest.param("tangent", marks=pytest.mark.slow),
        pytest.param("cotangent", marks=pytest.mark.slow),
    ],
)
def test_right_candidates_are_timed_and_others_have_a_note(mode):
    case = tuned_case(PARTICLES, mode, particles.Config(64, 16), particles.Config(0))
    assert case.key == ("particles", mode, 4, 4)
    default, other, broken = tune.contest(case, timing.Samples(1, 1), interpret=True)
    assert default["rival"] == "jaxflow" and default["config"] == "None"
    assert default["vs_default"] == 1 and other["vs_default"] > 0
    assert other["config"] == "particles.Config(64, 16, 1, 2)"
    # Sums of 40 terms in float32.
    assert all(row["error"] < 40 * 6e-8 for row in (default, other))
    assert broken["note"].startswith("failed: ZeroDivisionError") and "ms" not in broken
    assert failures([{"rows": [default, other, broken]}]) == []
    headers = [c.header for c in table([default, other, broken]).columns]
    assert {"config", "ms", "vs_default", "note"} <= set(headers)


@pytest.mark.slow
def test_batches_of_causal_heads():
    case = tuned_case(HEADS, "cotangent", tensor_cores.Config(16, 32))
    for row in tune.contest(case, timing.Samples(1, 1), interpret=True):
        assert row["error"] < 40 * 6e-8 and row["vs_default"] > 0


def test_a_wrong_candidate_is_not_timed(monkeypatch):
    monkeypatch.setattr(tune, "truth", lambda case, operands: [np.ones((1, 40, 3))])
    rows = tune.contest(tuned_case(PARTICLES, "forward"), timing.Samples(1, 1), interpret=True)
    assert rows[0]["note"].startswith("wrong") and "vs_default" not in rows[0]
    assert tune.best(rows) == {}
    # The kernels' own choice, wrong, is a failure of the package.
    assert len(failures([{"rows": rows}])) == 1


# ------------------------------------------------------------------ the choice

KEY = ("particles", "forward", 4, 4)


def timed(key=KEY, **ratios):
    """Rows of configurations by name, each with its ratios to the default on shapes 0, 1, ..."""
    for config, values in ({"default": (1.0, 1.0)} | ratios).items():
        rival = "jaxflow" if config == "default" else f"candidate {config}"
        row = {"key": list(key), "rival": rival, "config": config}
        yield from (row | {"shape": str(i), "vs_default": x} for i, x in enumerate(values))


@pytest.mark.parametrize(
    "ratios, winner",
    [
        ({"a": (0.5, 1.0), "b": (0.8, 0.9)}, "a"),  # geometric means 0.71 and 0.85
        ({"a": (0.5, 3.0), "b": (0.8, 0.9)}, "b"),
        ({"a": (0.2,), "b": (0.8, 0.9)}, "b"),  # a failed on the other shape
        ({"a": (0.995, 0.99)}, None),  # within the noise
        ({"b": (0.9, 0.9), "a": (0.9, 0.9)}, "a"),  # the same whatever came first
    ],
)
def test_the_best_over_the_shapes_of_a_key(ratios, winner):
    other = ("hopper", "tangent", 2, 64)
    rows = [*timed(**ratios), *timed(other, c=(0.5, 0.5))]
    assert tune.best(rows) == {KEY: winner, other: "c"}


# ------------------------------------------------------------------ configs.py

FOUND = {
    KEY: particles.Config(192, 16, 2, 4),
    ("tensor_cores", "cotangent", 4, 128): tensor_cores.Config(128, 128, 8, 3),
    ("hopper", "cotangent", 2, 256): (hopper.Config(128, 3, 2), hopper.Config(128, 2, 3)),
}
H100, A100 = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"


@pytest.fixture
def read(tmp_path):
    """The table in a text of configs.py, as Python reads it."""

    def load(source):
        (tmp_path / "written.py").write_text(source)
        name = f"{pallas_gpu.__name__}.written"
        spec = importlib.util.spec_from_file_location(name, tmp_path / "written.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.TUNED

    return load


def test_round_trip_of_the_table(read):
    empty = tune.updated(tune.CONFIGS.read_text(), "none", {})
    start = read(empty)
    texts = {key: tune.text(config) for key, config in FOUND.items()}
    once = tune.updated(empty, H100, texts)
    assert read(once) == start | {H100: start.get(H100, {}) | FOUND}
    assert tune.updated(once, H100, dict(reversed(texts.items()))) == once
    # Another device is added, an entry replaced, one dropped because the default has won.
    more = tune.updated(once, A100, {KEY: "particles.Config(64, 8, 1, 2)"})
    more = tune.updated(more, H100, {KEY: None})
    kept = {key: config for key, config in FOUND.items() if key != KEY}
    expected = {A100: {KEY: particles.Config(64)}, H100: start.get(H100, {}) | kept}
    assert read(more) == start | expected
    assert sorted(read(more)) == list(read(more))


def test_the_table_is_formatted(tmp_path):
    pytest.importorskip("ruff")
    texts = {key: tune.text(config) for key, config in FOUND.items()}
    source = tune.updated(tune.CONFIGS.read_text(), H100, texts)
    (tmp_path / "configs.py").write_text(source)
    command = [sys.executable, "-m", "ruff", "format", "--check", "--line-length", "100"]
    subprocess.run([*command, str(tmp_path / "configs.py")], check=True, capture_output=True)


# ------------------------------------------------------------------ the command


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a device")
def test_without_a_gpu_the_command_says_what_is_needed(capsys):
    with pytest.raises(typer.Exit) as error:
        tune_tiles(quick=True)
    assert error.value.exit_code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "tune needs an NVIDIA GPU" in line and "jaxflow[cuda]" in line and "cpu only" in line


def test_the_command_writes_the_table_and_the_report(tmp_path, monkeypatch, capsys):
    copy = tmp_path / "configs.py"
    shutil.copy(tune.CONFIGS, copy)
    monkeypatch.setattr(tune, "CONFIGS", copy)
    monkeypatch.setattr(tune, "missing", lambda: None)
    rows = [row | {"mode": "forward"} for row in timed(**{"particles.Config(64)": (0.5, 0.5)})]
    monkeypatch.setattr(tune, "contest", lambda case, samples, **_: rows)
    tune_tiles(quick=True, only="heads", write=True, json_file=tmp_path / "r.json")
    shown = capsys.readouterr()
    assert "3 cases" in shown.err and "particles.Config(64)" in shown.out
    assert '("particles", "forward", 4, 4): particles.Config(64),' in copy.read_text()
    (report,) = json.loads((tmp_path / "r.json").read_text())
    assert report["suite"] == "tune" and report["rows"][-1]["vs_default"] == 0.5


def test_a_run_that_dies_leaves_what_it_found(tmp_path, monkeypatch):
    copy = tmp_path / "configs.py"
    shutil.copy(tune.CONFIGS, copy)
    monkeypatch.setattr(tune, "CONFIGS", copy)
    monkeypatch.setattr(tune, "missing", lambda: None)
    rows = [row | {"mode": "forward"} for row in timed(**{"particles.Config(64)": (0.5, 0.5)})]

    def contest(case, samples, *, cases=iter([rows]), **_):
        return next(cases)

    monkeypatch.setattr(tune, "contest", contest)
    with pytest.raises(StopIteration):
        tune_tiles(quick=True, only="heads", write=True, json_file=tmp_path / "r.json")
    assert '("particles", "forward", 4, 4): particles.Config(64),' in copy.read_text()
    (report,) = json.loads((tmp_path / "r.json").read_text())
    assert report["rows"] == json.loads(json.dumps(rows))
