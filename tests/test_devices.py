"""A program divided among several devices: each computes its share, and nothing is gathered."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxflow import training

pytestmark = pytest.mark.slow  # a process of its own, with thirty programs
SCRIPT = Path(__file__).parent / "several_devices.py"
DEVICES = "--xla_force_host_platform_device_count=8"


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(SCRIPT.parent.parent)} | more


@pytest.fixture(scope="module")
def found():
    env = environment(XLA_FLAGS=f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}")
    run = subprocess.run([sys.executable, SCRIPT], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


@pytest.mark.parametrize("band", ["plain", "causal", "by size"])
def test_batches_are_divided_without_communication(found, band):
    for case in found[band].values():
        assert case["collectives"] == {}
        assert case["spec"][:2] == [["a"], ["b"]]
        assert case["error"] < 1e-5


@pytest.mark.parametrize("how", ["queries", "queries by size"])
@pytest.mark.parametrize("mode", ["forward", "tangent", "cotangent"])
def test_queries_are_divided_and_the_keys_derivatives_added_up(found, how, mode):
    case = found[how][mode]
    assert set(case["collectives"]) == ({"all-reduce"} if mode == "cotangent" else set())
    assert case["spec"][0] == (["a"] if how == "queries" else ["a", "b"])
    assert case["error"] < 1e-5


@pytest.mark.parametrize("mode", ["forward", "cotangent"])
def test_a_flow_of_a_batch_keeps_its_sharding(found, mode):
    # What is left is the sum of the error estimate over the batch, and of the checks.
    case = found["flow"][mode]
    assert set(case["collectives"]) == {"all-reduce"}
    assert case["spec"][0] == ["a", "b"]
    assert case["error"] < 1e-4


def test_a_mesh_with_explicit_axes(found):
    assert found["explicit"] == {"spec": ["a"], "devices": 8}
    assert found["explicit ring"] < 1e-5  # under jit, and its gradient


@pytest.mark.parametrize("how", ["manual", "partly manual"])
def test_a_manual_division_with_checked_types(found, how):
    assert found[how]["cotangent"]["error"] < 1e-5


# ------------------------------------------------------------------ tokens divided


@pytest.mark.parametrize("case", ["weighted", "causal"])
def test_the_ring_is_the_operation_with_both_derivatives(found, case):
    # 21 keys on 4 devices: three without weight are added. Sums of 24 numbers of size 10.
    assert found[f"ring {case}"] < 1e-13


@pytest.mark.parametrize("mode", ["forward", "cotangent"])
def test_a_flow_of_divided_tokens_sends_keys_and_gathers_nothing(found, mode):
    case = found[f"ring flow {mode}"]
    assert set(case["collectives"]) == {"all-reduce", "collective-permute"}  # the checks' sums
    assert case["spec"][0] == ["a"]
    assert case["error"] < 1e-14


def test_a_ring_sends_what_theory_says(found):
    for counted, theory in found["ring bytes"]:
        assert counted == {"collective-permute": theory}


# ------------------------------------------------------------------ trainings


def test_losses_are_the_same_on_any_number_of_devices(found):
    one, *others = found["losses"]
    # 4 and 8 devices; 8 that share the state, then 2. Means in float32 of 8 samples, in another
    # order.
    assert len(others) == 3 and len(one) == 4
    assert all(loss == pytest.approx(one, rel=1e-6) for loss in others)


def test_a_step_adds_up_gradients_and_gathers_nothing(found):
    assert found["step"]["collectives"] == ["all-reduce"]


def test_fully_sharded_state_takes_an_nth_of_the_memory(found):
    step = found["step"]
    assert 4 * step["divided"] == step["to divide"] > 50 * step["not divided"]


def test_idle_devices_are_named(found):
    assert "cpu:1, cpu:2" in found["warning"] and "devices=8" in found["warning"]


# (devices, what it raises)
REFUSED = [
    (3, "ValueError: the number of devices must divide the batch"),
    (16, "ValueError: devices=16 were asked for, and JAX has 8 (cpu)"),
    (0, "ValueError: devices must be at least 1"),
    (True, "TypeError: devices must be a whole number"),
    ("gpu", "TypeError: devices must be a number of devices or a list of them"),
    ([], "ValueError: devices must be at least one"),
    (["cpu:0"], "TypeError: devices must be JAX devices"),
]


def test_devices_that_cannot_be_are_refused(found):
    assert len(found["refused"]) == len(REFUSED)
    for (_, words), message in zip(REFUSED, found["refused"], strict=True):
        assert message.startswith(words)


# (environment, what it raises)
HALF = [
    ({"JAX_NUM_PROCESSES": "2"}, "JAX_PROCESS_ID must be a whole number"),
    ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID must be less"),
    ({"JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"}, "JAX_NUM_PROCESSES must be a whole"),
]


@pytest.mark.parametrize("half, words", HALF, ids=str)
def test_half_an_environment_is_refused(half, words, monkeypatch):
    for name, value in ({"JAX_COORDINATOR_ADDRESS": "localhost:1234"} | half).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        training.join()


SLURM_PORTS = range(61440, 65536)  # from which JAX takes one by the number of a job


def free_port(ports=(0,)) -> int:
    for port in ports:
        with contextlib.suppress(OSError), socket.socket() as free:
            free.bind(("127.0.0.1", port))
            return free.getsockname()[1]
    raise OSError("no port is free.")


def start(folder: Path, *args: str, **env: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, SCRIPT.with_name("two_processes.py"), str(folder), *args],
        env=environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextlib.contextmanager
def two_processes(folder: Path, step: int, environments: list[dict[str, str]], *args: str):
    """Both, from the checkpoint after this step on; killed in the end."""
    both = [start(folder, "60", "2", *args, **env) for env in environments]
    checkpoints = folder / "run" / "checkpoints"
    reached = lambda: any(int(p.name[5:13]) > step for p in checkpoints.glob("step-*"))
    stop = time.monotonic() + 300
    try:
        while all(process.poll() is None for process in both) and not reached():
            assert time.monotonic() < stop, "the processes wait for one another."
            time.sleep(0.2)
        for process in both:
            assert process.poll() is None, process.communicate()[1][-2000:]
        yield both
    finally:
        for process in both:
            process.kill()
            process.communicate()


def test_processes_end_together_and_the_run_goes_on(tmp_path):
    """SIGTERM to one of them ends both at one step, saved. The run goes on as a step of SLURM,
    where one is killed and the other ends; then in one process that is left."""
    explicit = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    by_hand = [explicit | {"JAX_PROCESS_ID": str(i)} for i in range(2)]
    with two_processes(tmp_path, 1, by_hand) as both:
        both[1].send_signal(signal.SIGTERM)
        ends = [process.communicate(timeout=300)[0].splitlines()[-1] for process in both]
        assert [process.returncode for process in both] == [143, 143]
    reason, done = ends[0].split()
    assert ends[0] == ends[1] and reason == "SIGTERM"
    done = int(done)
    assert (tmp_path / "run" / "checkpoints" / f"step-{done:08d}").exists()

    job = {
        "SLURM_JOB_ID": str(free_port(SLURM_PORTS) - SLURM_PORTS.start),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_NTASKS": "2",
    }
    tasks = [job | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2)]
    with two_processes(tmp_path, done, tasks, "resume") as (first, second):
        second.kill()
        assert first.wait(timeout=300) != 0  # 10 s without a sign, in this test
    out, error = start(tmp_path, "10", "1", "resume").communicate(timeout=300)
    assert error.count("Traceback") == 0, error[-2000:]
    shutil.rmtree(tmp_path / "run")
    whole, _ = start(tmp_path, "10", "1").communicate(timeout=300)
    assert len(json.loads(out)) == 10
    assert json.loads(out) == pytest.approx(json.loads(whole), rel=1e-6)
