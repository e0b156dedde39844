"""Which kernels are defaults: verdicts, their records, and the check that finds them.

No GPU is needed: verdicts are written by hand, and the children of the check are scripts.
"""

import dataclasses
import functools
import json
import re
import sys
import textwrap

import jax
import jax.numpy as jnp
import pytest
from typer.testing import CliRunner

from jaxflow.cli import app
from jaxflow.kernels import (
    check,
    cudnn,
    describe_backend,
    expectation,
    explain_backend,
    proof,
    registry,
    select_backend,
    softmax_expectation,
)
from jaxflow.kernels.base import MODES, AbstractBackend, Problem, Shapes
from jaxflow.kernels.blocked import Blocked
from jaxflow.kernels.check import CheckError, Limits, Report
from jaxflow.kernels.proof import Kernel

on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="there is a device")
FEW = jax.ShapeDtypeStruct((64, 3), jnp.float32)
HEADS = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)
PARTICLES = "pallas_gpu (particles)"
ABOUT = proof.software() | {
    "platform": "cuda",
    "device": "NVIDIA Test",
    "runtime": "cuda 13000",
    "driver": "600.1",
}


def of(name, *modes, dtype="float32", failure=None):
    return {Kernel(name, mode, dtype): failure for mode in modes or MODES}


@pytest.fixture
def device(tmp_path, monkeypatch):
    """A device at hand, in words; `device(verdicts)` writes its record and returns the path."""
    monkeypatch.setenv(proof.SWITCH, "proved")
    monkeypatch.setenv("JAXFLOW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(proof, "target", lambda platform: (ABOUT["device"], True))
    monkeypatch.setattr(proof, "_advised", [])
    described = lambda platform, kind, at_hand: ABOUT | {"platform": platform}
    monkeypatch.setattr(proof, "described", described)
    proof.forget()

    def keep(verdicts, platform="cuda"):
        path = check.keep(Report(ABOUT | {"platform": platform}, verdicts, []))
        assert path is not None
        return path

    yield keep
    proof.forget()


# ------------------------------------------------------------------ the choice


def test_without_a_record_the_portable_backend_runs_and_one_warning_says_so(device):
    with pytest.warns(UserWarning, match=r"particles\), forward, float32.*jaxflow info --check"):
        assert select_backend(FEW, FEW, FEW, platform="cuda") == "blocked"
    # Warnings are errors here: there is no second one.
    assert select_backend(FEW, FEW, FEW, platform="tpu") == "blocked"
    text = jax.jit(softmax_expectation).trace(FEW, FEW, FEW).lower(lowering_platforms=("cuda",))
    assert "mosaic" not in text.as_text()


def test_what_has_passed_is_a_default(device):
    device(of(PARTICLES, "forward"))
    assert describe_backend(FEW, FEW, FEW, platform="cuda") == PARTICLES
    *_, best = explain_backend(FEW, FEW, FEW, platform="cuda")
    assert best.kernel.name == PARTICLES and best.verdict == "runs: proved"
    with pytest.warns(UserWarning, match="tangent"):
        assert select_backend(FEW, FEW, FEW, platform="cuda", mode="tangent") == "blocked"


def test_what_has_failed_never_runs(device):
    """The next backend does, without a warning; by name it is refused, mode by mode."""
    device(of(PARTICLES) | of(PARTICLES, "tangent", failure="masked: it gave NaN"))
    named = functools.partial(select_backend, platform="cuda", backend="pallas_gpu")
    assert select_backend(FEW, FEW, FEW, platform="cuda", mode="tangent") == "blocked"
    assert named(FEW, FEW, FEW, mode="cotangent") == "pallas_gpu"
    with pytest.raises(NotImplementedError, match=r"tangent, float32.*masked: it gave NaN.*None"):
        named(FEW, FEW, FEW, mode="tangent")
    found = [c.verdict for c in explain_backend(FEW, FEW, FEW, platform="cuda", mode="tangent")]
    assert "masked: it gave NaN" in found[-2] and found[-1] == "runs: portable"


def test_by_name_no_proof_is_needed(device):
    assert select_backend(FEW, FEW, FEW, platform="cuda", backend="pallas_gpu") == "pallas_gpu"
    assert select_backend(FEW, FEW, FEW, backend="pallas_gpu:interpret") == "pallas_gpu:interpret"


def test_cudnn_is_a_default_but_not_what_it_hands_on(device, monkeypatch):
    monkeypatch.setattr(cudnn, "_absent", lambda head_dimension: None)
    choose = lambda mode, **settings: registry.choose(
        mode, "cuda", Shapes(HEADS, HEADS, HEADS),
        Problem(weighted=False, constant_scale=0.1, **settings), None,
    )  # fmt: skip
    assert choose("forward") == choose("cotangent", mean_only=True) == "cudnn"
    with pytest.warns(UserWarning, match="cudnn .pallas_gpu's hopper"):
        assert choose("tangent") == "blocked"
    assert choose("cotangent") == "blocked"
    device(of("cudnn (pallas_gpu's hopper)", "tangent", dtype="bfloat16"))
    assert choose("tangent") == "cudnn" and choose("cotangent") == "blocked"
    device(of("cudnn (its fused attention)", "forward", dtype="bfloat16", failure="wrong"))
    with pytest.warns(UserWarning, match="pallas_gpu .hopper"):
        proof._advised.clear()
        assert choose("forward") == "blocked"


def test_tpus_are_no_exception(device):
    name = describe_backend(FEW, FEW, FEW, platform="tpu", backend="pallas_tpu")
    device(of(name), "tpu")
    assert select_backend(FEW, FEW, FEW, platform="tpu") == "pallas_tpu"


def test_the_switch(device, monkeypatch):
    device(of(PARTICLES, failure="wrong"))
    monkeypatch.setenv(proof.SWITCH, "all")
    assert select_backend(FEW, FEW, FEW, platform="cuda") == "pallas_gpu"
    assert "all" in explain_backend(FEW, FEW, FEW, platform="cuda")[-1].verdict
    monkeypatch.setenv(proof.SWITCH, "some")
    with pytest.raises(ValueError, match="JAXFLOW_KERNELS must be all or proved, got 'some'"):
        select_backend(FEW, FEW, FEW, platform="cuda")


# ------------------------------------------------------------------ records


@pytest.mark.parametrize(
    "damage", [lambda text: text[:-9], lambda text: text.replace("null", '"x"'), lambda text: "{}"]
)
def test_a_damaged_record_is_named_and_made_anew(device, damage):
    path = device(of(PARTICLES))
    assert proof.has_record(ABOUT) and proof.software_has_record("cuda")
    path.write_text(damage(path.read_text()))
    proof.forget()
    with pytest.warns(UserWarning, match=f"{path.name}.*`jaxflow info --check` writes it anew"):
        assert select_backend(FEW, FEW, FEW, platform="cuda") == "blocked"
    assert not proof.has_record(ABOUT) and not proof.software_has_record("cuda")


def test_a_record_is_of_one_device_and_set_of_versions(device, monkeypatch):
    device(of(PARTICLES))
    for name in ABOUT:
        about = ABOUT | {name: "another"}
        assert not proof.has_record(about)
    other = ABOUT | {"driver": "600.2"}
    monkeypatch.setattr(proof, "described", lambda platform, kind, at_hand: other)
    proof.forget()
    assert (
        "not checked" in (proof.doubt("cuda", Kernel(PARTICLES, "forward", "float32")) or [""])[0]
    )


def test_records_of_the_package_hold_for_a_kind_of_device(tmp_path, monkeypatch, abstract_device):
    """Also where it is not at hand; its driver may be another one, its jaxlib may not."""
    monkeypatch.setenv(proof.SWITCH, "proved")
    monkeypatch.setattr(proof, "_advised", [Kernel("", "forward", "")])
    monkeypatch.setattr(proof, "PROVED", tmp_path)
    proof.write_record(tmp_path / "a.json", ABOUT | {"device": "NVIDIA A"}, of(PARTICLES))
    proof.write_record(
        tmp_path / "b.json", ABOUT | {"device": "NVIDIA B", "jaxlib": "0"}, of(PARTICLES)
    )
    proof.forget()
    for kind, backend in {"NVIDIA A": "pallas_gpu", "NVIDIA B": "blocked"}.items():
        with abstract_device(kind):
            assert select_backend(FEW, FEW, FEW, platform="cuda") == backend
    proof.forget()


def test_records_of_the_package_are_sound():
    for path in proof.PROVED.glob("*.json"):
        about, verdicts = proof.read_record(path)
        assert set(proof.SHARED) <= set(about) and verdicts


def test_what_a_device_is_described_by(tmp_path, monkeypatch):
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue Sep 23\n")
    monkeypatch.setattr(proof, "DRIVER", driver)
    about = proof.described("cpu", "cpu", at_hand=True)
    assert about["driver"] == "580.95.05" and about["jaxlib"] == ABOUT["jaxlib"]
    assert about.keys() == ABOUT.keys()
    assert proof.described("cuda", "NVIDIA A", at_hand=False).keys() == ABOUT.keys() - {
        "driver", "runtime",
    }  # fmt: skip


# ------------------------------------------------------------------ the parent

SCRIPT = """
import json, os, signal, sys, time
request = json.loads(sys.stdin.read())
say = lambda message: print(json.dumps(message), flush=True)
print("a line of a library")
names = sys.argv[1:]
if names == ["no start"]:
    sys.exit("there is no device")
say({"about": {"device": "test"}, "kernels": [[name, "forward", "float32"] for name in names]})
for i, name in enumerate(names):
    if i in request["skip"]:
        continue
    say({"begin": i})
    if name == "compiler crash":
        os.kill(os.getpid(), signal.SIGABRT)
    say({"case": "masked"})
    if name == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if name == "hang":
        time.sleep(60)
    if name == "exit":
        sys.exit("a last word")
    say({"end": i, "failure": {"wrong": "off", "lost": "gone"}.get(name), "lost": name == "lost"})
    if name == "lost":
        break
    if name == "late":
        os.kill(os.getpid(), signal.SIGBUS)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "child.py"
    path.write_text(textwrap.dedent(SCRIPT))
    return lambda *names: (sys.executable, str(path), *names)


def test_a_kernel_that_ends_its_process_costs_no_other(script):
    names = [
        "right",
        "crash",
        "compiler crash",
        "hang",
        "wrong",
        "exit",
        "lost",
        "late",
        "also right",
    ]
    told = []
    limits = Limits(run=1.0)
    report = check.check(told.append, command=script(*names), limits=limits)
    found = {kernel.name: reason for kernel, reason in report.verdicts.items()}
    assert found == {
        "right": None,
        "crash": "masked: its process ended by signal SIGSEGV",
        "compiler crash": "compiling: its process ended by signal SIGABRT",
        "hang": "masked: its process did not go on for 1 s",
        "wrong": "off",
        "exit": "masked: its process ended by exit code 1: a last word",
        "lost": "gone",
        "late": "masked: its process ended by signal SIGBUS",
        "also right": None,
    }
    assert report.about == {"device": "test"} and not report.unchecked
    assert len(told) == len(names) and told[1] == "crash, forward, float32 (2 of 9)"
    assert check.summary(report) == "2 of 9 kernels are right here."


def test_a_check_that_cannot_start_blames_no_kernel(script):
    with pytest.raises(CheckError, match="ended by exit code 1: there is no device"):
        check.check(print, command=script("no start"))


def test_what_the_time_is_too_short_for_is_not_proved(script):
    report = check.check(print, command=script("right", "late"), limits=Limits(total=0.0))
    assert not report.verdicts and [k.name for k in report.unchecked] == ["right", "late"]
    assert "the time was too short for 2" in check.summary(report)


@pytest.mark.slow
def test_a_real_child():
    """All cases of the first kernel."""

    class EnoughError(Exception):
        pass

    def stop(report):
        raise EnoughError(report)

    with pytest.raises(EnoughError) as enough:
        check.check(print, backends=["reference"], save=stop)
    (report,) = enough.value.args
    assert list(report.verdicts.values()) == [None] and len(report.unchecked) == 8


# ------------------------------------------------------------------ the child


@dataclasses.dataclass(frozen=True)
class Faulty(AbstractBackend):
    """The portable backend with a fault."""

    fault: str

    def forward(self, operands, problem):
        mean, lse = Blocked().forward(operands, problem)
        if self.fault == "no compile":
            raise ValueError("no such instruction")
        if self.fault == "no run":
            fail = lambda x: 1 / 0
            mean = jax.pure_callback(fail, mean, mean)
        if self.fault == "unmasked":
            lse = jnp.where(jnp.isneginf(lse), 0.0, lse)
        return mean + {"wrong": 1e-2, "nan": jnp.nan}.get(self.fault, 0.0), lse

    def tangent(self, operands, problem):
        return Blocked().tangent(operands, problem)

    def cotangent(self, operands, problem):
        return Blocked().cotangent(operands, problem)

    def refusal(self, mode, shapes, problem):
        return None if mode == "forward" or self.fault == "none" else "it has not"

    def kernel(self, mode, shapes, problem):
        return self.fault


FAULTS = {
    "none": None,
    "wrong": "masked: it is off by .* of the largest entry, over 1e-04",
    "nan": "masked: it gave numbers that are not finite",
    "unmasked": "masked: a query that sees no key",
    "no compile": "masked: it did not compile: no such instruction",
    "no run": "masked: it did not run: ",
}


def test_the_child_judges(monkeypatch):
    case = check.Case("masked", 5, 9, 3, 2, batch=2, weighted=True)
    monkeypatch.setattr(check, "CASES", [case])
    monkeypatch.setattr(check, "TOLERANCE", {"float32": 1e-4})
    for fault in FAULTS:
        entry = registry.Entry(lambda fault=fault: Faulty(fault))
        monkeypatch.setitem(registry.REGISTRY, fault, entry)
    said = []
    check.child(
        {"backends": list(FAULTS), "skip": []}, lambda m: said.append(json.loads(json.dumps(m)))
    )
    kernels = [Kernel(*k) for k in said[0]["kernels"]]
    assert [k.mode for k in kernels if k.name == "none (none)"] == list(MODES)
    ended = [m for m in said if "end" in m]
    assert len(ended) == len(FAULTS) + 2 and {"case": "masked"} in said
    for message in ended:
        pattern = FAULTS[kernels[message["end"]].name.split(" (")[0]]
        found = message["failure"]
        assert found is None if pattern is None else re.search(pattern, found)
    assert [m["lost"] for m in ended] == [False] * (len(ended) - 1) + [True]


def test_every_kernel_is_tried_on_a_gpu(monkeypatch):
    """What the backends of a Hopper GPU would take, each family in each mode and dtype it has."""
    monkeypatch.setattr(cudnn, "_absent", lambda head_dimension: None)
    trials = check.plan(["cudnn", "pallas_gpu"])
    for mode in MODES:
        names = {k.name for k in trials if k.mode == mode and k.dtype == "bfloat16"}
        assert {"pallas_gpu (hopper)", "pallas_gpu (tensor_cores)"} <= names
        assert Kernel(PARTICLES, mode, "float32") in trials
    for kernel, some in trials.items():
        if kernel.name.startswith("pallas_gpu"):
            assert any(trial.case.weighted for trial in some), kernel
    assert {"cudnn (its fused attention)", "cudnn (pallas_gpu's hopper)"} <= {
        k.name for k in trials
    }


# ------------------------------------------------------------------ the command line


@on_cpu
def test_info_finds_nothing_to_check_on_a_cpu():
    result = CliRunner().invoke(app, ["info", "--check"])
    assert result.exit_code == 0 and "on cpu the portable backend runs" in result.stdout


def test_info_prints_and_keeps_what_the_check_finds(device, monkeypatch):
    """And what runs now, mode by mode."""
    found = of(PARTICLES, "forward") | of(PARTICLES, "tangent", failure="masked: it is off")
    late = Kernel(PARTICLES, "cotangent", "float32")
    monkeypatch.setattr(check, "check", lambda log: Report(ABOUT, found, [late]))
    monkeypatch.setattr(expectation, "default_platform", lambda: "cuda")
    result = CliRunner().invoke(app, ["info", "--check"])
    assert result.exit_code == 0, result.output
    lines = {" ".join(line.split()) for line in result.stdout.splitlines()}
    assert f"{PARTICLES} forward float32 right" in lines
    assert f"{PARTICLES} tangent float32 masked: it is off" in lines
    assert f"{PARTICLES} cotangent float32 not checked" in lines
    assert f"forward {PARTICLES} runs: proved" in lines
    assert f"tangent {PARTICLES} no: it failed the check here: masked: it is off" in lines
    assert f"cotangent {PARTICLES} no: it was not checked on this device yet" in lines
    assert proof.has_record(ABOUT)


def test_a_check_that_cannot_run_is_one_line(monkeypatch):
    def fails(log):
        raise CheckError("its process ended by exit code 1: no device")

    monkeypatch.setattr(check, "check", fails)
    result = CliRunner().invoke(app, ["info", "--check"])
    assert result.exit_code == 1 and "error: its process ended by exit code 1" in result.output


@on_cpu
def test_a_gpu_that_is_not_of_cuda_is_left_alone(monkeypatch):
    monkeypatch.setenv(proof.SWITCH, "proved")
    monkeypatch.setattr(check, "default_platform", lambda: "cuda")
    said = []
    check.child({"backends": None, "skip": []}, said.append)
    check.once(said.append)
    assert [message["kernels"] for message in said] == [[]]


def test_a_command_checks_once(device, monkeypatch):
    report = Report(ABOUT, of(PARTICLES) | of("other", failure="wrong"), [])
    calls, said = [], []
    monkeypatch.setattr(check, "default_platform", lambda: "cuda")
    monkeypatch.setattr(check, "check", lambda log, limits: calls.append(log) or report)
    for _ in range(2):
        check.once(said.append)
    assert len(calls) == 1 and "3 of 6 kernels are right" in said[-1]
    assert select_backend(FEW, FEW, FEW, platform="cuda") == "pallas_gpu"


def test_a_check_that_fails_stops_no_command(device, monkeypatch):
    def fails(log, limits):
        raise CheckError("its process ended by signal SIGKILL")

    said = []
    monkeypatch.setattr(check, "default_platform", lambda: "cuda")
    monkeypatch.setattr(check, "check", fails)
    check.once(said.append)
    assert "SIGKILL. The portable backend serves." in said[-1]


@on_cpu
def test_where_nothing_is_to_be_checked(device, monkeypatch):
    monkeypatch.setattr(check, "check", None)  # a call would raise
    check.once(pytest.fail)  # on a CPU
    monkeypatch.setattr(check, "default_platform", lambda: "cuda")
    monkeypatch.setenv("JAXFLOW_CACHE", "")
    check.once(pytest.fail)  # nothing can be kept
    monkeypatch.setenv(proof.SWITCH, "all")
    check.once(pytest.fail)


def test_a_tpu_is_not_taken_before_it_is_checked(device, monkeypatch):
    """Its chips serve one process: whether there is a record is seen without JAX."""
    monkeypatch.setattr(check, "_tpu_is_free", lambda: True)
    monkeypatch.setattr(check, "default_platform", lambda: pytest.fail("it was taken"))
    assert check._due()
    device(of("pallas_tpu (on Mosaic TPU)"), "tpu")
    assert not check._due()
