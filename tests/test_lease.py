"""`python -m benchmarks lease`, with stages that a machine without a GPU can run."""

import json
import textwrap
from pathlib import Path

import jax
import pytest

from benchmarks import lease, shapes
from jaxflow.kernels import check, proof
from jaxflow.kernels.check import Report
from jaxflow.kernels.proof import Kernel

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="there is a device")

ABOUT = proof.software() | {"platform": "cuda", "device": "A B", "runtime": "", "driver": ""}
VERDICTS = {Kernel("pallas_gpu (particles)", "forward", "float32"): None}


def stage(name, code, seconds=20.0, **options):
    return lease.Stage(name, seconds, "a test", ("-c", code), **options)


def test_what_hangs_or_dies_costs_the_others_nothing(tmp_path):
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    hangs = f"""
        import subprocess, sys, time
        print(subprocess.Popen([sys.executable, "-c", {deaf!r}]).pid, flush=True)
        time.sleep(60)
    """
    said = []
    plan = [
        stage("dies", "import os; os.abort()"),
        stage("hangs", textwrap.dedent(hangs), seconds=2.0),
        stage("speaks", "import jaxflow, os; print(os.getcwd())"),
        stage("again", "raise SystemExit", after_tuning=True),
    ]
    found = lease.run(plan, tmp_path, 60.0, said.append, tuned=lambda: False)
    assert found == json.loads((tmp_path / "lease.json").read_text())
    assert [result["outcome"] for result in found] == [
        "ended with exit code -6: see dies.log",
        "stopped after 2 s",
        "done",
        "not needed: the tiles are the same",
    ]
    assert (tmp_path / "speaks.log").read_text().strip() == str(lease.ROOT)
    child, *rest = (tmp_path / "hangs.log").read_text().splitlines()
    assert rest[-1] == "KeyboardInterrupt"  # it could still speak
    assert not _runs(int(child))


def _runs(pid):
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


def test_what_there_is_no_time_for_is_left_out(tmp_path):
    plan = [stage("late", "raise SystemExit")]
    (result,) = lease.run(plan, tmp_path, 0.0, print, tuned=lambda: False)
    assert result["outcome"] == "left out: no time"


def test_a_suite_leaves_its_report(tmp_path):
    """The real commands, but for their cases."""
    *start, _, report = lease._suite("flow", 60, "solves", tmp_path).command
    plan = [
        lease.Stage("flow", 60, "", (*start, "--only", "no case", "--json", report)),
        lease.Stage("check", 60, "", ("-m", "benchmarks.lease", "30")),
    ]
    found = lease.run(plan, tmp_path, 120.0, print, tuned=lambda: False)
    assert [result["outcome"] for result in found] == ["done", "done"]
    assert json.loads((tmp_path / "flow.json").read_text())[0]["rows"] == []
    assert "0 of 0 kernels are right" in (tmp_path / "check.log").read_text()


@pytest.mark.parametrize("seen", [(None, "cpu"), ("cuda", "NVIDIA A B")])
def test_the_plan_is_said(tmp_path, monkeypatch, seen):
    monkeypatch.setattr(lease, "device", lambda: seen)
    monkeypatch.setattr(lease, "in_child", None)  # a call would raise
    said = []
    assert lease.main(tmp_path / "out", 7.5, True, said.append) == 0
    assert any("benchmarks kernels --quick" in line for line in said)
    assert not (tmp_path / "out").exists()
    if seen[0] is None:
        assert lease.main(None, 7.5, False, said.append) == 1
        assert "There is no GPU or TPU: JAX sees cpu." in said


def test_a_lease_from_its_check_to_its_commit(tmp_path, monkeypatch):
    """Of a GPU in words: the check finds a kernel right, and tuning new tiles."""
    configs, out, done, said = tmp_path / "configs.py", tmp_path / "out", [], []
    configs.write_text("old")

    def in_child(command, seconds, log):
        done.append(log.stem)
        if log.stem.startswith("check"):
            check.keep(
                Report(ABOUT, {Kernel("pallas_gpu (hopper)", "forward", "float16"): None}, [])
            )
        if log.stem.startswith("tune"):
            configs.write_text("new")
        return "done"

    monkeypatch.setenv("JAXFLOW_CACHE", "of the user")
    monkeypatch.setattr(lease, "device", lambda: ("cuda", "A B"))
    monkeypatch.setattr(lease, "CONFIGS", configs)
    monkeypatch.setattr(lease, "in_child", in_child)
    assert lease.main(out, 7.5, False, said.append) == 0
    assert done == [stage.name for stage in lease.stages(out)] and done[0] == "check"
    assert (out / "configs.py").read_text() == "new"
    (record,) = (out / "kernels").glob("A-B-*.json")
    assert f"  cp {record} jaxflow/kernels/proved/  # 1 of 1 kernels are right" in said


def test_the_plan_fits_into_its_time():
    """Without the last stage, which takes what is left; the tests of the plan exist."""
    plan = lease.stages(lease.RESULTS)
    assert sum(s.seconds for s in plan[:-1]) <= 450
    assert len({s.name for s in plan}) == len(plan)
    (tests,) = (s for s in plan if s.name == "tests")
    assert "tests/test_pallas_gpu.py" in tests.command
    assert set(lease.TUNED) <= {shape.name for shape in shapes.GPU_QUICK}


def test_the_device_is_found_by_a_process_of_its_own(monkeypatch):
    assert lease.device() == (None, "cpu")
    monkeypatch.setattr(lease, "PROBE", "raise SystemExit")
    assert lease.device()[0] is None


def test_what_to_commit(tmp_path, monkeypatch):
    advice = lambda tuned: "\n".join(lease.advice(tmp_path, "A B", tuned))
    assert "nothing to commit" in advice(False)
    monkeypatch.setenv("JAXFLOW_CACHE", str(tmp_path))
    path = check.keep(Report(ABOUT, VERDICTS, []))
    assert path is not None
    assert f"cp {path} jaxflow/kernels/proved/" in advice(False)
    assert "cp" in advice(True) and f"{tmp_path}/configs.py" in advice(True)
    check.keep(Report(ABOUT | {"kernels": "before tuning"}, VERDICTS, []))
    assert str(path) in advice(True) and len(list(path.parent.iterdir())) == 2
    path.unlink()
    assert "new tiles were not checked" in advice(True) and "configs.py jax" not in advice(True)
