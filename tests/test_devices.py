"""A program divided among several devices: each computes its share, and nothing is gathered."""

import json
import os
import shutil
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
    assert case["error"] < 2e-5


@pytest.mark.parametrize("mode", ["forward", "cotangent"])
def test_a_flow_of_a_batch_keeps_its_sharding(found, mode):
    # What is left is the sum of the error estimate over the batch, and of the checks.
    case = found["flow"][mode]
    assert set(case["collectives"]) == {"all-reduce"}
    assert case["spec"][0] == ["a", "b"]
    assert case["error"] < 1e-4


def test_a_mesh_with_explicit_axes(found):
    assert found["explicit"] == {"spec": ["a"], "devices": 8}


@pytest.mark.parametrize("how", ["manual", "partly manual"])
def test_a_manual_division_with_checked_types(found, how):
    assert found[how]["cotangent"]["error"] < 2e-5


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


def test_a_process_is_killed_the_others_end_and_the_run_goes_on(tmp_path):
    script = [sys.executable, SCRIPT.with_name("two_processes.py"), str(tmp_path)]
    start = lambda *args, **env: subprocess.Popen(
        [*script, *args],
        env=environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    both = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    first, second = (start("60", "2", JAX_PROCESS_ID=str(i), **both) for i in range(2))
    try:
        reached = lambda: len(list(tmp_path.glob("run/checkpoints/step-*"))) >= 2
        while first.poll() is None and second.poll() is None and not reached():
            time.sleep(0.2)
        assert first.poll() is None, first.communicate()[1][-2000:]
        second.kill()
        assert first.wait(timeout=60) != 0  # 10 s without a sign, in this test
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()
    out, error = start("8", "1", "resume").communicate(timeout=300)
    assert error.count("Traceback") == 0, error[-2000:]
    shutil.rmtree(tmp_path / "run")
    whole, _ = start("8", "1").communicate(timeout=300)
    assert len(json.loads(out)) == 8
    assert json.loads(out) == pytest.approx(json.loads(whole), rel=1e-6)
