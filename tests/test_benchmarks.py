"""The benchmarks on tiny shapes: the machinery, not the speed."""

import importlib.util
import json
import math
import re
import subprocess
import sys
import threading
import time

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import typer
from rich.console import Console

import benchmarks
from benchmarks import (
    command,
    compile,
    derivatives,
    device,
    flow,
    generation,
    kernels,
    machine,
    observables,
    pace,
    peak,
    phase,
    plots,
    precision,
    rivals,
    scale,
    scaling,
    shapes,
    slopes,
    solvers,
    tables,
    timing,
    training,
    transformers,
)
from benchmarks.__main__ import run
from benchmarks.report import columns, failures, legend, table, write_csv
from jaxflow.kernels import registry

PARTICLES = shapes.Shape("tiny-particles", 48, 3)
LANGUAGE = shapes.Shape("tiny-language", 20, 4, batch=3, causal=True, scale=0.5, modes=shapes.MODES)
SINGLE = timing.Samples(1, 1, cap_s=np.inf)
ONCE = timing.Options(samples=SINGLE)
QUICK = timing.Options(quick=True, samples=SINGLE)
RATES = {"flops": 1e11, "exps": 1e9, "bytes": 1e12}
TRAINING = training.Case(batch=2, n=6, dim=8, heads=2, layers=2, mode="gradient")
has_torch = importlib.util.find_spec("torch") is not None


@pytest.fixture(scope="module", autouse=True)
def ceilings():
    """Those of no machine: measuring them takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "ceilings", lambda: RATES)
        yield


def contest(named, names):
    return kernels.contest(named, names, ONCE, pace.Watch())


@pytest.fixture(scope="module")
def report():
    return contest([PARTICLES, LANGUAGE], ["jaxflow", "jnp"])


# ------------------------------------------------------------------ timing


def test_rivals_take_turns():
    order = []
    runs = {name: timing.Runner(lambda name=name: order.append(name)) for name in "abc"}
    times = timing.in_turn(runs, samples=timing.Samples(3, 3))
    assert [len(ts) for ts in times.values()] == [3, 3, 3]
    changes = [x for i, x in enumerate(order) if i == 0 or x != order[i - 1]]
    # Once to see how long they take, then there, back and there.
    assert "".join(changes) == "abc" + "abc" + "ba" + "bc"


def test_a_failing_rival_costs_the_others_nothing():
    def prepare(row):
        if row["rival"] == "bad":
            raise RuntimeError("out of registers\nand a page of more")
        return timing.Runner(lambda: 0.5)

    rows: list[dict] = [{"rival": name} for name in ("bad", "good", "wrong")]
    answers = iter([0.0, 1.0])
    timing.compete(rows, prepare, lambda found: next(answers), 1e-3, samples=SINGLE)
    assert rows[0] == {"rival": "bad", "note": "failed: RuntimeError: out of registers"}
    assert rows[1]["ms"] > 0 and rows[1]["vs_best"] is None
    assert rows[2]["note"].startswith("wrong") and "ms" not in rows[2]


def test_an_answer_that_is_not_finite_is_wrong():
    error = timing.relative_error([np.array([np.nan, 1.0])], [np.ones(2)])
    rows = [{"rival": "a"}]
    timing.compete(rows, lambda row: timing.Runner(lambda: 0), lambda _: error, 1.0, samples=SINGLE)
    assert rows[0]["note"].startswith("wrong")


def test_rank_compares_with_other_libraries():
    rows = [{"rival": name, "ms": ms} for name, ms in (("a", 2.0), ("a x", 1.0), ("jnp", 4.0))]
    timing.rank(rows)
    assert [row["vs_best"] for row in rows] == [0.5, 0.25, 4.0]
    assert [row["vs_jnp"] for row in rows] == [0.5, 0.25, 1.0]


def test_a_call_over_the_cap_is_not_repeated():
    calls = {"slow": 0, "fast": 0}

    def prepare(row):
        def call():
            calls[row["rival"]] += 1
            time.sleep(0.3 if row["rival"] == "slow" else 0)

        return timing.Runner(call)

    rows: list[dict] = [{"rival": name} for name in calls]
    samples = timing.Samples(3, 3, cap_s=0.2)
    timing.compete(rows, prepare, lambda found: 0.0, 1.0, samples=samples)
    assert calls["slow"] == 1 < calls["fast"]
    assert rows[0]["note"] == "one sample, over the cap of 0.2 s" and rows[0]["ms"] >= 300
    assert "note" not in rows[1] and rows[1]["load"] == rows[0]["load"]


# ------------------------------------------------------------------ pace and machine


def test_a_case_that_does_not_fit_is_skipped_and_named():
    watch = pace.Watch(100.0, costs={"dear": 60.0, "cheap": 1.0}, pace=pace.Pace(2.0))
    assert list(watch.each(["dear", "cheap", "new"])) == ["cheap", "new"]
    assert watch.skipped == {"dear": "about 120 s, and 100 of 100 s are left"}
    assert watch.cases.keys() == {"cheap", "new"}
    spent = pace.Watch(budget_s=-1.0)
    assert list(spent.each(["a"])) == [] and spent.skipped == {
        "a": "the 0 s of the suite are spent"
    }
    assert list(pace.Watch().each(["a", "b"])) == ["a", "b"]


def test_a_slow_machine_is_learnt_of():
    clock = pace.Pace()
    clock.learn(pace.TRUST_S, 9 * pace.TRUST_S)
    assert clock.slowdown == 5
    watch = pace.Watch(60.0, costs={"known": 2.0, "dear": 15.0}, pace=clock)
    assert list(watch.each(["known", "dear", "new"])) == ["known", "new"]
    assert watch.skipped == {"dear": "about 71 s, and 60 of 60 s are left"}


def test_suites_share_the_time():
    """What one leaves or overruns, those after it have more or less."""
    budgets = {"a": 60.0, "b": 30.0, "c": 10.0}
    assert pace.share(budgets, "a", 50.0) == 30 and pace.share(budgets, "b", 20.0) == 15
    assert pace.share(budgets, "c", -5.0) == -5
    budgets = {name: command.budget(name, True, 1.0) for name in benchmarks.SUITES}
    assert command.total(budgets, quick=True, minutes=None) == command.QUICK_S < 8 * 60
    assert command.total(budgets, quick=True, minutes=3.0) == 180
    assert command.total({"a": 90.0}, quick=True, minutes=None) == 90


def test_the_cost_is_said():
    """Of a full run, of cases and a skipped one, of what no run has told."""
    cases = {"cases": {"x": {"cpu_s": 4.0}}, "skipped": {"y": ""}}
    earlier = {"a": {"seconds": 30.0, "skipped": []}, "b": {"seconds": 9.0} | cases}
    said = command.plan(earlier, {"a": 60.0, "b": 90.0, "c": 20.0}, 90.0, 2.0)
    assert said.startswith("About 3.3 min (a 60 s, b 98 s, c 40 s), at most 1.5 min: what does not")


def test_a_run_ends_when_its_time_is_over(tmp_path, monkeypatch, capsys):
    """Whatever it is at, with what it has found."""
    codes = []
    monkeypatch.setattr(command.os, "_exit", codes.append)
    output = command.Output(tmp_path / "r.json")
    out, err = Console(file=sys.stdout), Console(file=sys.stderr)
    job = command.Run(ONCE, output, out, err, current=("scaling", pace.Watch()))
    assert job.current is not None
    job.current[1].rows.append({"shape": "first", "rival": "jaxflow", "ms": 1.0})
    next(job.current[1].each(["second", "third"]))
    with job.ends_after(0.0):
        while not codes:
            time.sleep(0.01)
    assert codes == [0]
    (report,) = json.loads((tmp_path / "r.json").read_text())
    assert [row["shape"] for row in report["rows"]] == ["first"]
    assert report["skipped"].keys() == {"second", "third"}
    shown = capsys.readouterr()
    assert "first" in shown.out and "The time is over: what was measured is kept" in shown.err


def test_a_run_that_measured_nothing_says_so(monkeypatch, capsys):
    codes = []
    monkeypatch.setattr(command.os, "_exit", codes.append)
    out, err = Console(file=sys.stdout), Console(file=sys.stderr)
    job = command.Run(ONCE, command.Output(), out, err, current=("scaling", pace.Watch()))
    with job.ends_after(0.0):
        while not codes:
            time.sleep(0.01)
    assert codes == [1] and "nothing was measured" in capsys.readouterr().err


def test_threads_are_limited(monkeypatch):
    kept = []
    at_hand, keep = lambda pid: {0, 2, 5}, lambda pid, cores: kept.append(cores)
    monkeypatch.setattr(machine.os, "sched_getaffinity", at_hand, raising=False)
    monkeypatch.setattr(machine.os, "sched_setaffinity", keep, raising=False)
    for name in machine.POOLS:
        monkeypatch.setenv(name, "")
    machine.limit_threads(2)
    assert kept == [[0, 2]] and {machine.os.environ[name] for name in machine.POOLS} == {"2"}
    with pytest.raises(typer.BadParameter, match="between 1 and 3, .* got 4"):
        run("kernels", threads=4)
    assert rivals.distinct(["torch", "torch 1 thread"]) == ["torch", "torch 1 thread"]
    monkeypatch.setattr(machine, "threads", lambda: 1)
    assert rivals.distinct(["torch", "torch 1 thread"]) == ["torch"]


def test_a_crowded_machine_is_warned_of(monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: 2)
    assert machine.warning(2.0) is None is machine.warning(None)
    assert "load average is 3.5 on 2 cores" in str(machine.warning(3.5))


# ------------------------------------------------------------------ kernels


@pytest.mark.slow
def test_report_is_json(report):
    assert json.loads(json.dumps(report | device.provenance())).keys() >= {"rows", "versions"}
    measured = {"error", "compile_s", "ms", "ms_min", "vs_best", "vs_jnp", "of_floor", "floor"}
    assert {"shape", "mode", "rival", "dtype"} | measured <= report["rows"][0].keys()


def test_a_row_for_each_shape_mode_and_rival(report):
    cases = [(r["shape"], r["mode"], r["rival"]) for r in report["rows"]]
    assert len(cases) == len(set(cases)) == (1 + 3) * 2


def test_rows_are_checked_then_timed(report):
    for row in report["rows"]:
        # float32 rounding of sums of 48 terms, with room for the exponentials.
        assert row["error"] < 48 * np.finfo(np.float32).eps
        assert 0 < row["ms_min"] <= row["ms"]
        assert row["rival"] != "jnp" or row["vs_jnp"] == 1
        assert row["mode"] != "forward" or row["vs_forward"] == 1


@pytest.mark.slow
def test_narrow_dtypes_and_windows_are_checked_too():
    window = shapes.language(2, 24, 4, "gradient", window=3, dtype="bfloat16")
    half = shapes.heads(40, 4, dtype="float16")
    for row in contest([window, half], ["jaxflow"])["rows"]:
        # No better than one rounding of the result, and within the tolerance.
        rounding = {"bfloat16": 2.0**-9, "float16": 2.0**-12}[row["dtype"]]
        assert rounding / 8 < row["error"] < timing.TOLERANCE[row["dtype"]]
        assert row["ms"] > 0


def test_wrong_answers_are_not_timed(monkeypatch):
    monkeypatch.setattr(rivals, "ours", lambda q, k, v, **_: 1.01 * v)
    rows = contest([shapes.Shape("tiny", 16, 2)], ["jaxflow reference"])["rows"]
    assert rows[0]["note"].startswith("wrong") and "ms" not in rows[0]
    assert failures([{"rows": rows}]) == [f"tiny forward jaxflow reference: {rows[0]['note']}"]


def test_floor_is_the_slowest_of_products_exponentials_and_memory():
    # 4 d + 2 = 18 flops a pair are 0.18 ns, one exponential is 1 ns.
    assert kernels.floor_s(LANGUAGE, "forward", RATES) == (
        "exps",
        pytest.approx(LANGUAGE.pairs * 1e-9),
    )
    # 4 * 64 + 2 flops are 2.58 ns.
    wide = kernels.floor_s(shapes.heads(16, 64), "forward", RATES)
    assert wide == ("flops", pytest.approx(256 * 2.58e-9))
    # On tensor cores the gradient is 14 d flops: 64 * 14 / 1e12 = 0.9 ns; two exponentials 2 ns.
    half = shapes.heads(16, 64, dtype="bfloat16")
    tensor = RATES | {"tensor_flops": 1e12}
    assert kernels.floor_s(half, "gradient", tensor) == ("exps", pytest.approx(256 * 2e-9))
    # Four arrays of 16 * 64 numbers of two bytes.
    slow = kernels.floor_s(half, "forward", tensor | {"bytes": 1e9})
    assert slow == ("bytes", pytest.approx(4 * 16 * 64 * 2 / 1e9))


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("window", (None, 0, 3, 30))
def test_pairs_are_those_of_the_mask(causal, window):
    shape = shapes.Shape("tiny", 20, 4, batch=3, causal=causal, window=window)
    mask = rivals.visible(np.arange(20), np.arange(20), shape)
    assert shape.pairs == 3 * (400 if mask is None else mask.sum())


@pytest.mark.parametrize("platform", ("cpu", "gpu"))
@pytest.mark.parametrize("quick", (False, True))
def test_names_of_shapes_are_unique(platform, quick):
    names = [s.name for s in shapes.chosen(platform, quick=quick)]
    assert len(names) == len(set(names)) > 0
    assert all(s.dtype in timing.TOLERANCE for s in shapes.chosen(platform, quick=quick))


def test_naive_refuses_large_scores():
    shape = shapes.Shape("huge", 2**17, 3)
    with pytest.raises(timing.UnavailableError, match="64 GiB"):
        kernels.prepare("jnp", shape, "forward", kernels.draw(shape))


def test_extra_rivals_of_jax_agree():
    operands = kernels.draw(LANGUAGE)
    expected = kernels.exact(LANGUAGE, "forward", operands)
    found = kernels.prepare("jax.nn xla", LANGUAGE, "forward", operands)()
    assert kernels.error(LANGUAGE, "forward", expected, found) < 1e-5
    with pytest.raises(timing.UnavailableError, match="16-bit"):
        kernels.prepare("jax.nn cudnn", LANGUAGE, "forward", operands)


@pytest.mark.slow
def test_ceilings_are_measured():
    assert all(rate > 1e6 for rate in device.ceilings().values())


@pytest.mark.parametrize("fn", [device.gpu_exponentials, device.gpu_multiply_adds])
def test_ceilings_of_a_gpu_lower(fn, abstract_device):
    x = jax.ShapeDtypeStruct((2 * device.BLOCK,), jnp.float32)
    with abstract_device("NVIDIA A100-SXM4-80GB"):
        text = jax.jit(fn).trace(x).lower(lowering_platforms=("cuda",)).as_text()
    assert "triton" in text


@pytest.mark.slow
def test_peak_memory_of_scores():
    case = {"shape": "particles-4096-2", "mode": "forward", "name": "jnp"}
    measured = peak.in_child("kernels", case, timeout_s=60)
    assert measured["peak_mib"] >= 4096**2 * 4 / 2**20


@pytest.mark.skipif(not has_torch, reason="torch is not installed")
def test_torch_agrees():
    half = shapes.language(2, 24, 8, "forward", window=3, dtype="bfloat16")
    rows = contest([PARTICLES, LANGUAGE, half], ["torch", "torch 1 thread"])["rows"]
    assert [r["mode"] for r in rows[::2]] == ["forward", "forward", "gradient", "forward"]
    assert all(r["error"] < timing.TOLERANCE[r["dtype"]] for r in rows)


@pytest.mark.skipif(not has_torch, reason="torch is not installed")
def test_threads_of_torch_are_put_back():
    torch = rivals.module("torch")
    usual = torch.get_num_threads()
    assert rivals.with_threads(1, torch.get_num_threads) == 1
    assert torch.get_num_threads() == usual


@pytest.mark.skipif(has_torch, reason="torch is installed")
def test_absent_torch_is_reported():
    rows = contest([shapes.Shape("tiny", 16, 2)], ["torch", "keops"])["rows"]
    assert [r["note"] for r in rows] == ["not installed"] * 2


# ------------------------------------------------------------------ flow


def test_each_rival_takes_its_cheapest_setting_within_the_target():
    rival = flow.Rival(lambda x0: lambda dt: (np.full((2, 3), dt), 7), "dt", (0.4, 0.2, 0.1))
    reached, _ = flow.descend(rival.make(np.zeros(0)), rival, np.zeros((2, 3)), 0.25)
    assert reached == {"setting": "dt 0.2", "value": 0.2, "error": 0.2, "evaluations": 7}
    missed, _ = flow.descend(rival.make(np.zeros(0)), rival, np.zeros((2, 3)), 0.01)
    assert missed["value"] == 0.1 and missed["note"] == "the target is out of reach"


@pytest.mark.slow
def test_a_flow_at_equal_error(monkeypatch):
    monkeypatch.setattr(flow, "T1", 1.0)
    monkeypatch.setattr(flow, "exact", flow.exact.__wrapped__)
    case = flow.Case("tiny", 16, 1e-3)
    names = ("jaxflow fixed", "numpy", "torchdiffeq")
    rows = flow.contest(case, {name: flow.RIVALS[name] for name in names}, SINGLE)
    rows = {row["rival"]: row for row in rows}
    assert all(rows[name]["error"] <= 1e-3 and rows[name]["ms"] > 0 for name in names[:2])
    # Euler is of order one: fewer evaluations would not do.
    assert rows["numpy"]["evaluations"] > rows["jaxflow fixed"]["evaluations"]
    assert ("ms" in rows["torchdiffeq"]) == (importlib.util.find_spec("torchdiffeq") is not None)


# ------------------------------------------------------------------ derivatives


def test_blocks_of_rows_agree_with_the_definition():
    n = 2 * derivatives.ROWS
    x, _, g = (a.astype(np.float32) for a in derivatives.draw(derivatives.Case("", n, "")))
    found = jax.vjp(derivatives.reverse_only, x, x, x)
    expected = jax.vjp(derivatives.naive, x, x, x)
    # Sums of 512 terms in float32.
    np.testing.assert_allclose(found[0], expected[0], atol=1e-5)
    for a, b in zip(found[1](g), expected[1](g), strict=True):
        np.testing.assert_allclose(a, b, atol=512 * 6e-8 * np.abs(b).max())


@pytest.mark.parametrize(
    "mode", ["gradient", "tangent", pytest.param("hessian", marks=pytest.mark.slow)]
)
def test_derivatives_of_the_operation(mode):
    case = derivatives.Case("operation", 32, mode)
    rows = derivatives.contest(case, tuple(derivatives.RIVALS), SINGLE)
    rows = {row["rival"]: row for row in rows}
    assert all(rows[name]["error"] < 1e-5 and rows[name]["ms"] > 0 for name in ("jaxflow", "jnp"))
    refused = "custom_vjp" in rows["custom_vjp"].get("note", "")
    assert refused == (mode == "tangent")


@pytest.mark.slow
def test_derivative_of_a_flow():
    case = derivatives.Case("flow", 16, "tangent")
    (row,) = derivatives.contest(case, ("jaxflow",), SINGLE)
    assert row["error"] < 1e-5 and row["ms"] > 0


# ------------------------------------------------------------------ scaling


def test_exponents_are_those_of_a_power_law():
    """From the largest sizes that are four and span a decade."""
    rows = [
        {"mode": "forward", "rival": "a", "n": n, "ms": 3 * n**2 if n > 100 else 1.0, "peak_mib": n}
        for n in (10, 100, 1000, 2000, 4000, 10000)
    ]
    (fit,) = slopes.fits([*rows, {"mode": "forward", "rival": "b", "n": 10, "note": "absent"}])
    assert fit["from_n"] == 1000 and "note" not in fit
    assert fit["time_exponent"] == pytest.approx(2) and fit["memory_exponent"] == pytest.approx(1)


@pytest.mark.parametrize(
    "values, reason",
    [
        ({10: 1.0, 100: 99.0, 1000: 9801.0}, "3 of 4 sizes"),
        ({1: 1.0, 2: 4.0, 4: 16.0, 8: 64.0}, "sizes span a factor 8, below 10"),
        ({1: 1.0, 2: 8.0, 4: 10.0, 16: 250.0}, "points are 40% off the line, over 15%"),
    ],
)
def test_no_slope_is_given_where_points_carry_none(values, reason):
    assert slopes.slope(values) == slopes.Slope(None, reason)


def test_scaling_measures_every_size(monkeypatch):
    monkeypatch.setattr(scaling, "sizes", lambda platform, quick: {"forward": (32, 64)})
    monkeypatch.setattr(scaling, "peak", lambda suite, case, run: {"peak_mib": 2.0 * case["n"]})
    monkeypatch.setattr(scaling, "RIVALS", ("jaxflow",))
    report = scaling.run(ONCE, pace.Watch())
    assert [(row["n"], row["peak_mib"]) for row in report["rows"]] == [(32, 64.0), (64, 128.0)]
    assert all(row["error"] < 1e-5 and row["ms"] > 0 for row in report["rows"])
    assert report["fits"][0]["note"].startswith("no slope of time: 2 of 4 sizes")


# ------------------------------------------------------------------ scale


@pytest.fixture
def few_cases(monkeypatch):
    sizes = 100, 200
    tiny = [*(scale.Ball(2, 3.0, n) for n in sizes), scale.Blobs("sphere", 4, 0.05, 16.0, 300)]
    monkeypatch.setattr(scale, "cases", lambda quick: tiny)
    monkeypatch.setattr(scale, "CHECKED", 50)
    monkeypatch.setattr(scale, "PAIRS", 50 * 200)


@pytest.mark.slow
@pytest.mark.usefixtures("few_cases")
def test_many_tokens_against_all_pairs():
    report = scale.run(QUICK, pace.Watch())
    mine = [row for row in report["rows"] if row["rival"].startswith("jaxflow")]
    assert {row["rival"] for row in mine} > {"jaxflow blocked", "jaxflow compressed"}
    for row in mine:
        # The tolerance of compressed measures; scores of size 16 are rounded at 1e-6.
        assert row["ms"] > 0 and row["error"] < 2e-5
    [fit] = report["fits"]
    assert fit["from_n"] == 100 and fit["note"] == "no slope of time: 2 of 4 sizes"
    # All pairs of so few queries, as if there were n / 50 as many.
    assert next(row for row in mine if row["n"] == 200)["note"] == "of 50 queries"
    shares = next(row for row in mine if "pruned" in row["rival"])
    assert 0 <= shares["asked"] + shares["skipped"] <= 1 + 1e-12
    assert plots.scale(report | {"device": "a device"}).axes


# ------------------------------------------------------------------ compile


@pytest.mark.parametrize(
    "fn", [compile.operation, pytest.param(compile.flow, marks=pytest.mark.slow)]
)
def test_new_numbers_are_no_new_program(fn, monkeypatch):
    monkeypatch.setattr(compile, "N", 16)
    row = compile.stages(fn)
    assert row["traces"] == 1 and row["programs_again"] == 0
    assert all(row[name] > 0 for name in ("trace_s", "lower_s", "compile_s"))


def test_a_baked_in_number_is_a_new_program(monkeypatch):
    monkeypatch.setattr(compile, "N", 16)
    baked = lambda x, *values: jax.jit(lambda x: sum(values) * x)(x)
    assert compile.later(baked, compile.points())["programs_again"] == len(compile.VALUES) - 1


def test_every_case_to_compile_has_a_rival():
    cases = compile.cases(("blocked",))
    assert len(cases) == 4 * 3 + 1
    x = jnp.ones((2, 3))
    named = {(case.what, case.rival): case.fn for case in cases}
    values = compile.VALUES[0]
    ours = named["operation", "jaxflow blocked"](x, *values)
    np.testing.assert_allclose(ours, named["operation", "jnp"](x, *values), atol=1e-6)


# ------------------------------------------------------------------ training


@pytest.mark.slow
@pytest.mark.parametrize("mode", ("gradient", "update"))
def test_steps_of_training_agree(mode):
    case = TRAINING._replace(mode=mode)
    with jax.numpy_dtype_promotion("standard"):  # optax promotes
        rows = training.contest(case, training.RIVALS[mode], QUICK)
    rows = {row["rival"]: row for row in rows}
    for name, row in rows.items():
        if "torch" in name and not has_torch:
            assert row["note"] == "not installed"
            continue
        # Rounding of sums over 12 tokens and 256 logits, through two layers.
        assert row["error"] < 1e-5 and row["ms"] > 0 and row["vs_scan"] > 0
    assert rows["scan jaxflow"]["vs_scan"] == 1 == rows["scan jaxflow"]["compile_vs_scan"]
    assert 0 < rows["jaxflow"]["trace_s"] < rows["jaxflow"]["compile_s"]


@pytest.mark.slow
def test_adaptive_training_agrees(monkeypatch):
    """jaxflow's gradient is diffrax's: the same steps of the same solver, one program each."""
    case = TRAINING._replace(mode="adaptive", layers=1, heads=1)
    right = training.prepare(case, "diffrax", {})()
    monkeypatch.setattr(training, "exact", lambda case: training.leaves(right))
    rows = training.contest(case, ("jaxflow", "torchdiffeq"), QUICK)
    rows = {row["rival"]: row for row in rows}
    # Rounding of sums over 12 tokens and 256 logits, through some ten steps.
    assert rows["jaxflow"]["error"] < 1e-5
    assert rows["jaxflow"]["evaluations"] > 3 + 6
    assert ("ms" in rows["torchdiffeq"]) == (importlib.util.find_spec("torchdiffeq") is not None)


@pytest.mark.slow
def test_a_wrong_gradient_is_not_timed(monkeypatch):
    right = transformers.naive
    monkeypatch.setitem(training.SCANS, "scan naive", lambda q, k, v: 1.1 * right(q, k, v))
    rows = training.contest(TRAINING, ("scan naive",), QUICK)
    assert rows[0]["note"].startswith("wrong") and "ms" not in rows[0]


@pytest.mark.slow
def test_memory_of_training_grows_as_the_root_of_the_steps(monkeypatch):
    rows = [
        training.temporaries(training.Solve("jaxflow", steps)) for steps in (6, 96, 256, 512, 1024)
    ]
    assert rows[0]["peak_mib"] < rows[1]["peak_mib"]
    (fit,) = training.fits(rows)
    assert 0.4 < fit["memory_exponent"] < 0.6


# ------------------------------------------------------------------ observables


def test_without_its_rival_jaxflow_has_no_error_to_show(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.spatial", None)
    ours, scipy = observables.contest(observables.Sample("hull", 60), SINGLE, with_memory=False)
    assert "error" not in ours and "ms" in ours
    assert "ModuleNotFoundError" in scipy["note"]


def test_a_library_that_does_not_load_is_named(monkeypatch):
    def load(name):
        raise OSError("libcudart.so: undefined symbol")

    monkeypatch.setattr(importlib, "import_module", load)
    with pytest.raises(timing.UnavailableError, match="does not load: libcudart.so"):
        rivals.module("torch")


@pytest.mark.parametrize("what", observables.OPERATIONS)
def test_functions_of_a_measure_agree_with_their_rivals(what):
    rows = observables.contest(observables.Sample(what, 600), SINGLE, with_memory=False)
    assert [row["rival"] for row in rows] == ["jaxflow", observables.OPERATIONS[what].rival]
    # float32 and sums of 600 terms; W_2 has an integral of squares, at 600 cumulated weights.
    assert rows[0]["error"] < 600 * 6e-8 and all(row["ms"] > 0 for row in rows)


def test_tokens_in_blobs_have_one_cluster_each():
    (x,) = observables.blobs(3000)
    labels = observables.components(x)
    assert labels.max() + 1 == len(np.unique(np.random.default_rng(3000).integers(0, 1000, 3000)))


@pytest.mark.slow
def test_a_phase_diagram_at_equal_error(monkeypatch):
    for name, value in (("N", 6), ("D", 12), ("TIMES", np.linspace(0, 8, 41)), ("TARGET", 0.05)):
        monkeypatch.setattr(phase, name, value)
    monkeypatch.setattr(phase, "exact", phase.exact.__wrapped__)
    rows = phase.contest(phase.Phase(1.0, 4), phase.RIVALS, SINGLE)
    rows = {row["rival"]: row for row in rows}
    assert all(rows[name]["error"] <= 0.05 and rows[name]["ms"] > 0 for name in phase.RIVALS)
    assert rows["numpy"]["vs_numpy"] == 1 and rows["jaxflow"]["vs_numpy"] > 0
    script = rows["numpy as published"]
    assert script["evaluations"] == 80 and script["error"] >= rows["numpy"]["error"]
    assert (script["note"] is None) == (script["error"] <= 0.05)


# ------------------------------------------------------------------ solvers


@pytest.mark.slow
def test_solvers_wait_for_clusters(monkeypatch):
    """The quadrature gives the published times; a solver that stops short says how far it came."""
    for beta, when in ((1.0, 1.917028), (4.0, 8.390296), (8.0, 194.134994)):
        np.testing.assert_allclose(solvers.exact_time(beta), when, rtol=0, atol=5e-7)
    monkeypatch.setattr(solvers, "SOLVERS", {"Tsit5": diffrax.Tsit5()})
    with jax.enable_x64(True):
        (row,) = solvers.contest(solvers.Wait("two", 1.0), SINGLE)
        monkeypatch.setattr(solvers, "MAX_STEPS", 5)
        (short,) = solvers.contest(solvers.Wait("two", 8.0), SINGLE)
    assert row["error"] < 1e-7 and row["evaluations"] == 6 * row["steps"] + 3 and row["ms"] > 0
    assert short["note"].endswith("after 5 steps") and "ms" not in short


# ------------------------------------------------------------------ the command


def test_table_has_a_line_for_each_row(report):
    shown = table(report["rows"])
    assert shown.row_count == len(report["rows"])
    assert "vs_best" in [c.header for c in shown.columns]
    assert "evaluations" not in [c.header for c in shown.columns]


def test_texts_are_written_by_all_alike(monkeypatch):
    monkeypatch.setattr(generation, "cases", lambda quick: [generation.Case(2, 8, 2, 1, 4)])
    found = generation.run(QUICK, pace.Watch())["rows"]
    rows = {row["rival"]: row for row in found}
    cached, again = rows["jaxflow"], rows["jaxflow without cache"]
    assert cached["error"] == again["error"] == 0 and "note" not in cached
    assert cached["tokens_per_s"] == pytest.approx(1e3 * 2 * 3 / cached["ms"])
    assert rows["torch"].get("error", 0.0) == 0


def test_two_precisions_are_trained_side_by_side(monkeypatch):
    case = precision.Case(3, 2, 8, 8, 2, 1)
    monkeypatch.setattr(precision, "cases", lambda quick: [case])
    wide, narrow = precision.run(QUICK, pace.Watch())["rows"]
    assert [wide["rival"], narrow["rival"]] == ["jaxflow float32", "jaxflow bfloat16"]
    assert 0 < abs(wide["last_loss"] - narrow["last_loss"]) < 1e-2
    assert wide["validation_loss"] == pytest.approx(math.log(256), rel=0.05)
    assert wide["tokens_per_s"] == pytest.approx(1e3 * 16 / wide["ms"])


def test_a_rival_on_one_thread_is_the_other_with_less(monkeypatch):
    monkeypatch.setattr(machine, "threads", lambda: 2)
    named = flow.competitors(["blocked"])
    alone = named["torchdiffeq 1 thread"]
    assert alone.make.keywords == {"threads": 1} and alone.make.func is flow.with_torchdiffeq
    assert named.keys() == {*flow.RIVALS, "torchdiffeq 1 thread", "jaxflow adaptive blocked"}
    monkeypatch.setattr(machine, "threads", lambda: 1)
    assert flow.competitors([]).keys() == flow.RIVALS.keys()


def test_every_suite_has_a_budget():
    for name in benchmarks.SUITES:
        module = importlib.import_module(f"benchmarks.{name}")
        assert module.BUDGET_S.keys() == {"quick", "full"} and callable(module.run)


def test_command_writes_reports(tmp_path, capsys):
    json_file, csv_file = tmp_path / "runs" / "r.json", tmp_path / "runs" / "r.csv"
    run("scaling", quick=True, only="no such case", json_file=json_file, csv_file=csv_file)
    (report,) = json.loads(json_file.read_text())
    assert report["suite"] == "scaling" and report["rows"] == [] and report["skipped"] == {}
    assert {"device", "versions", "commit", "cores", "threads", "cases"} <= report.keys()
    assert csv_file.read_text() == "suite,device,commit\n"
    assert not any(isinstance(thread, threading.Timer) for thread in threading.enumerate())
    shown = capsys.readouterr()
    assert "scaling" in shown.out and "at most 1.0 min" in shown.err


def test_an_interrupted_run_keeps_what_was_measured(tmp_path, monkeypatch, capsys):
    def contest(n, *_):
        if n > 1024:
            raise KeyboardInterrupt
        return [{"shape": "first", "mode": "forward", "rival": "jaxflow", "n": n, "ms": 1.0}]

    monkeypatch.setattr(scaling, "contest", contest)
    json_file, csv_file = tmp_path / "r.json", tmp_path / "r.csv"
    with pytest.raises(typer.Exit) as end:
        run("scaling", minutes=9.0, json_file=json_file, csv_file=csv_file)
    assert end.value.exit_code == 130
    (report,) = json.loads(json_file.read_text())
    assert [row["shape"] for row in report["rows"]] == ["first"]
    assert csv_file.read_text().splitlines()[1].endswith(",first,1024,forward,jaxflow,1.0")
    shown = capsys.readouterr()
    assert "first" in shown.out and "Interrupted: what was measured is kept in" in shown.err


def test_command_refuses_other_suites():
    with pytest.raises(typer.BadParameter, match="kernels"):
        run("speed")


def test_help_comes_without_jax():
    """For it should come at once; and with the questions of the suites."""
    code = (
        "import sys, benchmarks.__main__ as cli\n"
        "try: cli.main(['kernels', '--help'])\n"
        "finally: print(sorted({'jax', 'numpy', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert all(f"{name}: " in done.stdout for name in benchmarks.SUITES)


def test_columns_are_explained(report):
    words = legend(report["rows"])
    assert [line.split()[0] for line in words.splitlines()] == list(columns(report["rows"]))


def test_rows_as_one_table(tmp_path):
    about = {"device": "d", "commit": "c"}
    first = about | {"suite": "a", "rows": [{"rival": "x", "ms": 1.5, "value": 3}]}
    second = about | {"suite": "b", "rows": [{"rival": "y", "note": "one, two"}]}
    write_csv(tmp_path / "r.csv", [first, second])
    lines = (tmp_path / "r.csv").read_text().splitlines()
    assert lines[0] == "suite,device,commit,rival,ms,note,value"
    assert lines[1:] == ["a,d,c,x,1.5,,3", 'b,d,c,y,,"one, two",']


# ------------------------------------------------------------------ the documents

README = (tables.ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")


def test_tables_are_those_of_the_results():
    """`python -m benchmarks tables` writes them."""
    assert tables.update(write=False) == []
    assert {*tables.TABLES, *tables.WORDS} == {m[2] for m in tables.MARKED.finditer(README)}
    changed = README.replace("| flow-512-3 to 1e-03 | 33", "| flow-512-3 to 1e-03 | 11")
    assert changed != README == tables.updated(changed)


@pytest.mark.parametrize("section", ["Add a rival", "Add a backend"])
def test_what_the_readme_adds(section, capsys):
    [text] = re.findall(rf"^## {section}$(.*?)^## ", README, re.MULTILINE | re.DOTALL)
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    owners = kernels.RIVALS, registry.REGISTRY
    before = [set(names) for names in owners]
    try:
        exec("\n".join(snippets), {})
    finally:
        for names, kept in zip(owners, before, strict=True):
            for name in names.keys() - kept:
                names.pop(name)
    assert "mine" in capsys.readouterr().out


def test_plots(tmp_path, report):
    pytest.importorskip("matplotlib")
    grown = [
        {"mode": "forward", "rival": rival, "n": n, "ms": n**2 / 1e6, "peak_mib": n / 1e3}
        for rival in ("jaxflow", "torch")
        for n in (1024, 4096)
    ]
    reports = [
        device.provenance() | {"suite": "kernels"} | report,
        device.provenance() | {"suite": "scaling", "rows": grown, "fits": slopes.fits(grown)},
    ]
    (tmp_path / "r.json").write_text(json.dumps(reports))
    assert len(plots.draw(tmp_path / "r.json")) == 2
    for name in ("r-roofline.png", "r-scaling.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
