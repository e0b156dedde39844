"""A program divided among several devices: each computes its share, and nothing is gathered."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # a process of its own, with thirty programs
SCRIPT = Path(__file__).parent / "several_devices.py"
DEVICES = "--xla_force_host_platform_device_count=8"


@pytest.fixture(scope="module")
def found():
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}",
        "PYTHONPATH": str(SCRIPT.parent.parent),
    }
    run = subprocess.run([sys.executable, SCRIPT], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


@pytest.mark.parametrize("band", ["plain", "causal", "by size"])
@pytest.mark.parametrize("mode", ["forward", "tangent", "cotangent"])
def test_batches_are_divided_without_communication(found, band, mode):
    case = found[band][mode]
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
