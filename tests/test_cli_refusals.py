"""What the command line refuses: one line, exit code 2, before any work and before any folder."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from jaxflow import FlowError, __version__, models
from jaxflow._folder import write_settings
from jaxflow.cli import app, choices, console, learning, phase, reading, settings, systems
from jaxflow.cli.boundary import Stopped, interruptible

# fmt: off
SIMULATE = """
    --n 0 | --n -5 | --n 1.5 | --n 1e8 | --n '' | --d 0 | --d -1 | --n 99999999999
    --law circle --d 3 | --law simplex --n 12 --d 3 | --law nope
    --beta nan | --beta inf | --beta 1e999 | --beta abc | --alpha nan
    --t1 nan | --t1 inf | --t1 0 | --t1 -1 | --t1 1e300
    --rtol -1 | --rtol 0 | --rtol nan | --rtol 2
    --dt 0 | --dt -1 | --dt nan | --dt 1e-12 | --solver euler | --solver rk4 | --solver magic
    --solver normalised-euler | --solver normalised-euler --dt 0.1 --geometry euclidean
    --solver normalised-euler --dt 0.1 --normalisation pre
    --kappa 0 --dt 0.1 | --kappa -1 --dt 0.1 | --kappa nan --dt 0.1 | --kappa 2 | --noise common
    --noise loud --kappa 2 --dt 0.1 | --kappa 2 --dt 0.1 --solver rk4
    --kappa 2 --dt 0.1 --solver kvaerno5 | --kappa 2 --dt 0.1 --geometry layer-norm
    --kappa 2 --dt 0.1 --merges | --kappa 2 --dt 0.1 --normalisation ngpt --solver dopri5
    --max-steps 0 | --max-steps 1.5
    --frames 1 | --frames 1e9 | --frames 2 --log-time
    --threshold 2 | --threshold 1 | --threshold nan
    --min-mass -1 | --min-mass 2 | --min-mass nan
    --clusters 0 | --speed 0 | --speed nan | --until then
    --seed -1 | --seed 12345678901234567890 | --seed 1.5
    --normalisation pre --geometry sphere | --normalisation ngpt --geometry euclidean
    --normalisation pre --observe rank | --observe nope | --observe | --interaction sotfmax
    --text absent | --text folder | --text pipe | --text /dev/zero | --text empty | --text latin.txt
    --text prose.txt --max-tokens 0 | --text prose.txt --image picture.png
    --points absent | --points header.npy | --points flat.npy | --points nan.npy
    --points prose.txt | --points matrix.npy --text prose.txt | --query flat.npy
    --value nan.npy | --key wide.npy
    --value matrix.npy --repulsive | --save points.txt | --save absent/points.npz | --format gif
    --image picture.png | --image header.npy | --image empty | --image pipe | --patch 0
    --config absent | --config damaged.json | --config list.json | --config colour.json
    --config fraction.json | --config flag.json | --config nan.json | --config solver.json
    --config text.json | --config observe.json | --config huge.json | --config deep.json
    --config bytes.json | --config folder | --config pipe | --config phase.json
    --out empty | --out empty/run | --out trained | --out edited | --nn 3 | extra
"""
PHASE = """
    --n 1 | --d 1 | --n 1 --out fresh | --systems 0 | --betas 0 | --times 1 | --beta-min nan
    --beta-min 5 --beta-max 1 | --beta-min 5 --beta-max 5 | --threshold 1 | --threshold 0.9999999
    --rank 2 | --matrices gaussian --d 3 --rank 4 | --matrices gaussian --rank 0 | --matrices nope
    --tolerance 0 | --tolerance nan | --t1 0 | --seed -1 | --interaction hardmax
    --resume absent | --resume folder | --resume trained | --resume simulated --out fresh
    --out trained | --out edited
"""
TRAIN = """
    lm --preset huge | lm --tolerance 1e-3 --solver-steps 3 | lm --tolerance 1e-3
    lm --tolerance nan --solver tsit5 | lm --solver-steps 0 | lm --solver-steps 5 | lm --layers 0
    lm --elastic 2 | lm --elastic 0:4 | lm --elastic 4:2 | lm --elastic 2:8:0 | lm --elastic 2:a
    lm --elastic 1:99999999999 --curve smooth | lm --elastic 1:33 --curve smooth | lm --elastic 2:5
    lm --elastic-after 5 | lm --elastic 4:8 --elastic-after -1
    lm --jitter 0.5 | lm --elastic 4:8:4 --jitter 0.5 | lm --elastic 2:3:4:5 | lm --consistency -1
    lm --consistency 1 --tolerance 1e-3 --solver tsit5
    lm --dim 10 | lm --heads 0 | lm --width -1 | lm --curve nope | lm --curve fourier
    lm --curve linear --layers 1 | lm --t1 0 | lm --t1 nan | lm --placement post --bf16
    lm --kv-heads 2 | lm --block theory --width 3 | lm --block theory --bias
    lm --block llama --kv-heads 3 | lm --block attention --bf16 | lm --block gpt3
    lm --batch 0 | lm --batch 1.5 | lm --steps 0 | lm --steps 99999999999 | lm --learning-rate nan
    lm --learning-rate -1 | lm --weight-decay -1 | lm --kinetic nan | lm --entropy -1
    lm --devices 0 | lm --devices two | lm --devices 99 | lm --sharded
    lm --accumulate 0 | lm --evaluate-every 0 | lm --patience 0 | lm --budget 0 | lm --seed -1
    lm --context 0 | lm --tokens bpe --vocabulary 1000000000
    lm --text absent | lm --text empty | lm --text latin.txt | lm --text pipe | lm --text /dev/zero
    lm --text folder | lm --text prose.txt --context 4000
    lm --resume absent | lm --resume folder | lm --resume simulated | lm --resume edited
    lm --resume trained --dim 16 | lm --resume trained --out fresh | image --resume trained
    image --patch 0 | image --images absent | image --images pipe | image --labels absent
    image --preset demo | resnet --width 0 | resnet --heads 4 | resnet --tolerance 1e-3 | gpt
"""
READ = """
    compare simulated | compare simulated absent | compare simulated folder | compare simulated cut
    compare simulated edited | compare simulated trained | compare simulated empty
    compare simulated simulated --metric y | compare simulated simulated --out figure.docx
    compare simulated simulated --out folder | compare simulated simulated --out empty/a.png
    sample absent | sample folder | sample simulated --prompt '' | sample simulated --length -1
    sample simulated --length 1000000000 | sample simulated --temperature -1
    sample simulated --temperature nan | sample simulated --top-k 0 | sample simulated --top-p 2
    sample simulated --samples -1 | sample simulated --seed 12345678901234567890
    sample simulated --steps 0 | sample simulated --steps 2 --tolerance 0.1
    evaluate absent | evaluate folder | evaluate simulated --steps 0 | evaluate simulated --layers 0
    sample simulated --exit 2 | sample simulated --exit 0.1 --tolerance 0.1
    sample simulated --exit 0.1 --length 0 | evaluate simulated --exit -1
    evaluate simulated --tolerance nan | evaluate simulated --batches 0
    evaluate simulated --text absent | evaluate simulated --labels prose.txt
    info --n 0 | info --d 0 | info --dtype float8 | compare | sample | evaluate | simulat
"""
MEMORY = """
    simulate --n 1000000000 | simulate --d 1000000000 | simulate --frames 1000000000
    simulate --law simplex --n 200000 --d 200000 | simulate --repulsive --d 10000000 --n 1
    simulate --text prose.txt --d 1000000000
    phase-diagram --n 100000000 --d 10000 | phase-diagram --systems 2000000000
    phase-diagram --betas 2000000000 | phase-diagram --times 2000000000
    train lm --layers 100000000 | train lm --dim 1000000 | train lm --width 2147483647
    train lm --context 1000000000 | train lm --batch 1000000000 | train lm --accumulate 1000000000
"""
# fmt: on


def cases(command, text):
    parts = (part.strip() for line in text.strip().splitlines() for part in line.split("|"))
    return [f"{command} {part}".strip() for part in parts]


REFUSED = [
    *cases("simulate", SIMULATE),
    *cases("phase-diagram", PHASE),
    *cases("train", TRAIN),
    *cases("", READ),
]


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    """Tests leave nothing in the user's cache folder."""
    monkeypatch.setenv("JAXFLOW_CACHE", "")


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A folder with files and runs that are not as they must be."""
    place = tmp_path_factory.mktemp("bad")
    files = {
        "empty": b"",
        "latin.txt": b"caf\xe9",
        "prose.txt": b"the quick brown fox jumps over the lazy dog. " * 30,
        "picture.png": b"\x89PNG\r\n\x1a\n123",
        "header.npy": b"\x93NUMPY\x01\x00",
        "damaged.json": b"{not json",
        "list.json": b"[1]",
        "colour.json": b'{"command": "simulate", "colour": "red"}',
        "fraction.json": b'{"frames": 5.5}',
        "flag.json": b'{"n": true}',
        "nan.json": b'{"beta": NaN}',
        "solver.json": b'{"solver": "magic"}',
        "text.json": b'{"text": "/absent/text"}',
        "observe.json": b'{"observe": "energy"}',
        "huge.json": b'{"beta": 1' + b"0" * 400 + b"}",
        "deep.json": b"[" * 100_000,
        "bytes.json": b"\x00\xff",
        "phase.json": b'{"command": "phase-diagram"}',
    }
    for name, content in files.items():
        (place / name).write_bytes(content)
    arrays = {"flat": [1.0], "nan": [[1, 2, float("nan")]] * 3, "matrix": np.eye(3)}
    for name, array in (arrays | {"wide": np.eye(3, 5)}).items():
        np.save(place / f"{name}.npy", np.asarray(array))
    os.mkfifo(place / "pipe")
    (place / "folder").mkdir()
    trained = {"settings": {"task": "lm"} | settings.to_json(learning.LanguageTraining())}
    run(place / "simulated", "simulate", {}, '{"t": 0, "x": 1}\n')
    run(place / "trained", "train", trained, '{"step": 1, "x": 1}\n')
    run(place / "edited", "simulate", {}, '{"t": 0, "x": 1}\n')
    config = place / "edited" / "config.json"
    config.write_text(config.read_text().replace("{", '{"n": 3,', 1))
    run(place / "cut", "simulate", {}, '{"t": 0, "x": 1}\n{"t": 1, "x"')
    return place


def run(folder, kind, about, log):
    folder.mkdir()
    write_settings(folder, kind, about)
    (folder / "metrics.jsonl").write_text(log)


def contents(folder):
    return {p: p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def invoke(command):
    return CliRunner().invoke(app, shlex.split(command), catch_exceptions=False)


def refused(command, place, monkeypatch):
    """The line that refuses a command, which changed nothing."""
    monkeypatch.chdir(place)
    before = contents(place)
    result = invoke(command)
    assert result.exit_code == 2, result.output
    assert result.output.startswith("error: ") and result.output.count("\n") == 1, result.output
    assert contents(place) == before
    return result.output


@pytest.mark.parametrize(
    "given, message",
    [
        ({"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1"}, "JAX_NUM_PROCESSES must be a whole number"),
        ({"SLURM_STEP_NUM_TASKS": "two"}, "SLURM_STEP_NUM_TASKS must be a whole number, got 'two'"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_JOB_ID must name the job"),
    ],
)
def test_processes_that_the_environment_names_in_part(tmp_path, monkeypatch, given, message):
    """A training without --devices would not be one of them."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    command = ["train", "resnet", "--steps", "1", "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2 and message in result.output and not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", REFUSED)
def test_refused(command, bad, monkeypatch):
    told = refused(command, bad, monkeypatch)
    words = [word.strip("-'") for word in command.split()]
    assert any(word in told.lower() for word in [*words, "argument"])


@pytest.mark.parametrize("command", cases("", MEMORY))
def test_refused_before_memory_is_gone(command, bad, monkeypatch):
    """Each needs more memory than any machine has, and is refused by its size alone."""
    told = refused(command, bad, monkeypatch)
    assert "GB are free" in told and "Take" in told


# ------------------------------------------------------------------ signals


@pytest.mark.parametrize(
    "number, error", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Stopped)]
)
def test_a_signal_ends_work_that_hears_none(number, error):
    """As a compiled solve does, the work here holds no place where Python looks for signals."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: (_ for _ in ()).throw(Stopped(15)))
    released, start = threading.Event(), time.monotonic()
    threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
    try:
        with pytest.raises(error):
            interruptible(released.wait, 60)
    finally:
        released.set()
        signal.signal(signal.SIGTERM, before)
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_the_exit_code(number, code, bad, monkeypatch):
    monkeypatch.setattr(systems, "initial_measure", lambda s: os.kill(os.getpid(), number))
    monkeypatch.setattr("jaxflow.cli.simulate.initial_measure", systems.initial_measure)
    monkeypatch.chdir(bad)
    before = contents(bad)
    result = invoke("simulate")
    assert result.exit_code == code and not result.output
    assert contents(bad) == before and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_work_passes_on_its_result_its_error_and_the_precision(x64):
    assert interruptible(lambda a, b: a + b, 1, 2) == 3
    assert interruptible(lambda: jnp.zeros(()).dtype) == jnp.float64
    with pytest.raises(FlowError, match="where"):
        interruptible(lambda: (_ for _ in ()).throw(FlowError("where")))


@pytest.mark.parametrize(
    "error, code, told",
    [
        (FlowError("at t = 1:\n max_steps"), 1, "at t = 1: max_steps"),
        (ValueError("rule [/x] [red]"), 2, "rule [/x] [red]"),
        (ImportError('pip install "jaxflow[viz]"'), 2, "jaxflow[viz]"),
        (PermissionError(13, "Permission denied", "[/a]/b"), 2, "[/a]/b cannot be"),
        (MemoryError(), 2, "not enough memory"),
    ],
)
def test_expected_errors_are_one_line(error, code, told, monkeypatch):
    monkeypatch.setattr("jaxflow.cli.info.info", lambda s: (_ for _ in ()).throw(error))
    result = invoke("info")
    assert result.exit_code == code and told in result.output
    assert result.output.startswith("error: ") and result.output.count("\n") == 1


def test_an_unexpected_error_is_not_hidden(monkeypatch):
    monkeypatch.setattr(
        "jaxflow.cli.info.info", lambda s: (_ for _ in ()).throw(RuntimeError("bug"))
    )
    with pytest.raises(RuntimeError, match="bug"):
        invoke("info")


# ------------------------------------------------------------------ what is printed


def test_printed_text_is_text(capsys):
    console.say("[red]a[/red] [/x] :smile: X_t[mu] \x1b[31mred\x07\n\tb")
    console.table("runs [x]", [("a[viz]", "b"), ("c", "[/d]")])
    assert capsys.readouterr().out == (
        "[red]a[/red] [/x] :smile: X_t[mu] \\x1b[31mred\\x07\n\tb\n\n"
        "runs [x]\n  a[viz]  b\n  c       [/d]\n"
    )


@pytest.mark.parametrize("columns", ["40", "200"])
def test_no_line_is_wrapped(columns, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", columns)
    folder = tmp_path / ("long " * 40)
    folder.mkdir()
    result = invoke(f"train lm --resume '{folder}'")
    assert result.output == f"error: {folder} is no run to go on with: it has no config.json.\n"


def test_compare_prints_names_and_settings_as_they_are(tmp_path):
    """Two runs whose names and settings look like markup, and one of them twice."""
    for name, beta in (("[b]", 1), ("_[r]$x$", "[/red]")):
        run(tmp_path / name, "simulate", {"beta": beta}, '{"t": 0, "X_t[mu]": 1}\n')
    one, other = tmp_path / "[b]", tmp_path / "_[r]$x$"
    out = tmp_path / "made" / "a.svg"
    result = CliRunner().invoke(app, ["compare", str(one), str(other), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "beta     1    [/red]" in result.output and "X_t[mu]  1    1" in result.output
    assert "[b]" in out.read_text() and f"Figure: {out}" in result.output
    twice = CliRunner().invoke(app, ["compare", str(one), str(one), "--out", str(out)])
    assert twice.exit_code == 0 and "[b] (2)" in twice.output


def test_compare_where_all_runs_had_come_to(tmp_path):
    """At a step that all have; of times, which none share, up to the least of the last ones."""
    logs = {
        "a": [(10, 1.0, 3.0), (20, 2.0, 2.5), (30, 3.0, 2.25)],
        "b": [(10, 2.5, 2.75), (20, 5.0, 2.125)],
    }
    for name, rows in logs.items():
        lines = (json.dumps({"step": k, "seconds": s, "loss": loss}) + "\n" for k, s, loss in rows)
        run(tmp_path / name, "train", {}, "".join(lines))
    args = ["compare", *(str(tmp_path / name) for name in logs), "--metric", "loss"]
    for at, told in {
        "step": ("at the largest common step", "loss    20    2.5  2.125"),
        "time": ("at the largest common seconds", "loss    3        2.25  2.75"),
    }.items():
        flags = ["--at", at, "--out", str(tmp_path / "a.svg")]
        result = CliRunner().invoke(app, args + flags)
        assert result.exit_code == 0, result.output
        assert all(text in result.output for text in told), result.output
    without = CliRunner().invoke(app, [*args, "--at", "evaluations"])
    assert without.exit_code == 2 and "does not say its total evaluations" in without.output


def test_a_refusal_names_the_value_once():
    for value in ("--geometry torus", "--d x"):
        output = CliRunner().invoke(app, ["simulate", *value.split()]).output
        assert output.count(repr(value.split()[1])) == 1, output


# ------------------------------------------------------------------ help and completion


def test_the_version():
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0 and result.output == f"jaxflow {__version__}\n"


def test_help_imports_little():
    """Half of a second of the processor's time is the most that a shell should wait for."""
    code = (
        "import sys; from typer.testing import CliRunner; from jaxflow.cli import app; "
        "run = lambda *a: CliRunner().invoke(app, a); "
        "assert run('--version').exit_code == run('--help').exit_code == 0; "
        "assert 'kvaerno5' in run('simulate', '--help').output; "
        "assert run('train', '--help').exit_code == run('train', 'lm', '--help').exit_code == 0; "
        "print({'jax', 'numpy', 'rich', 'pydantic'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_help_and_completion_import_no_jax():
    code = (
        "import sys; from typer.testing import CliRunner; from jaxflow.cli import app; "
        "run = lambda *a, **k: CliRunner().invoke(app, a, **k); "
        "assert run('--help').exit_code == 0 and run('train', 'lm', '--help').exit_code == 0; "
        "assert 'kvaerno5' in run('simulate', '--help').output.replace(chr(10), ''); "
        "assert run('simulate', '--n', '0').exit_code == 2; "
        "words = {'_JAXFLOW_COMPLETE': 'complete_bash', 'COMP_CWORD': '3', "
        "'COMP_WORDS': 'jaxflow simulate --solver k'}; "
        "print(*run(env=words, prog_name='jaxflow').output.split()); "
        "print({'jax', 'diffrax', 'equinox', 'numpy', 'rich.progress'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["kvaerno3 kvaerno5", "set()"]


def test_completion_knows_the_commands():
    environment = {
        "_JAXFLOW_COMPLETE": "complete_bash",
        "COMP_WORDS": "jaxflow ",
        "COMP_CWORD": "1",
    }
    result = CliRunner().invoke(app, [], env=environment, prog_name="jaxflow")
    assert {"simulate", "compare", "phase-diagram", "train"} <= set(result.output.split())


def test_the_names_of_flags_are_those_of_the_tables():
    tables = {
        choices.Interaction: systems.INTERACTIONS,
        choices.Law: systems.LAWS,
        choices.Geometry: systems.GEOMETRIES,
        choices.Observable: systems.OBSERVABLES,
        choices.Until: systems.EVENTS,
        choices.Solver: models.SOLVERS,
        choices.Curve: models.CURVES,
        choices.Block: models.BLOCKS,
        choices.PhaseInteraction: phase.INTERACTIONS,
        choices.Matrices: phase.MATRICES,
    }
    for names, table in tables.items():
        assert set(map(str, names)) == set(map(str, table)), names


def test_every_number_has_a_rule():
    """A flag that takes a number or a path to read says which ones."""
    from jaxflow.cli import simulation

    kinds = [simulation.Simulation, simulation.Phase, *learning.TASKS.values()]
    kinds += [reading.Evaluation, reading.Sampling, reading.Information]
    for kind in kinds:
        for name, field in kind.__dataclass_fields__.items():
            if {"int", "float"} & set(str(field.type).replace("[", " ").replace("]", " ").split()):
                assert field.metadata["rule"] is not None, (kind, name)
            if field.type in (int, float):
                assert field.metadata["rule"] is not None, (kind, name)
