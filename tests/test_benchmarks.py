"""The benchmarks on tiny shapes: the machinery, not the speed."""

import dataclasses
import importlib.util
import json

import numpy as np
import pytest

from benchmarks import kernels, shapes, timing
from benchmarks.__main__ import table

PARTICLES = shapes.Shape("tiny-particles", 48, 3)
LANGUAGE = shapes.Shape("tiny-language", 20, 4, batch=3, causal=True, scale=0.5, modes=shapes.MODES)
ONCE = (1, 1)
has_torch = importlib.util.find_spec("torch") is not None


@pytest.fixture(scope="module", autouse=True)
def ceilings():
    """Those of no machine: measuring them takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "ceilings", lambda: {"flops": 1e11, "exps": 1e9})
        yield


@pytest.fixture(scope="module")
def report():
    return kernels.run([PARTICLES, LANGUAGE], ["jaxflow", "jnp"], repeats=ONCE)


def test_report_is_json(report):
    assert json.loads(json.dumps(report)) == report
    assert {"suite", "device", "versions", "commit", "ceilings", "rows"} <= report.keys()
    measured = {"error", "compile_s", "ms", "ms_min", "vs_best", "vs_jnp", "of_floor"}
    assert {"shape", "mode", "rival"} | measured <= report["rows"][0].keys()


def test_a_row_for_each_shape_mode_and_rival(report):
    cases = [(r["shape"], r["mode"], r["rival"]) for r in report["rows"]]
    assert len(cases) == len(set(cases)) == (1 + 3) * 2


def test_rows_are_checked_then_timed(report):
    for row in report["rows"]:
        # float32 rounding of sums of 48 terms, with room for the exponentials.
        assert row["error"] < 48 * np.finfo(np.float32).eps
        assert 0 < row["ms_min"] <= row["ms"]
        assert row["rival"] != "jnp" or row["vs_jnp"] == 1


def test_table_has_a_line_for_each_row(report):
    assert table(report["rows"]).row_count == len(report["rows"])


def test_floor_is_the_slower_of_products_and_exponentials():
    rates = {"flops": 1e11, "exps": 1e9}
    # 4 d = 16 flops a pair are 0.16 ns, one exponential is 1 ns; 4 * 64 flops are 2.56 ns.
    assert kernels.floor_s(LANGUAGE, "forward", rates) == pytest.approx(LANGUAGE.pairs * 1e-9)
    assert kernels.floor_s(shapes.heads(16, 64), "forward", rates) == pytest.approx(256 * 2.56e-9)


def test_causal_shapes_count_half_the_pairs():
    assert LANGUAGE.pairs == 3 * (20 * 21 // 2)
    assert PARTICLES.pairs == 48 * 48


def test_names_of_shapes_are_unique():
    names = [s.name for s in shapes.FULL]
    assert len(names) == len(set(names))


def test_rivals_take_turns():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    times = timing.in_turn(runs, repeats=(3, 3))
    assert [len(ts) for ts in times.values()] == [3, 3]
    changes = [x for i, x in enumerate(order) if i == 0 or x != order[i - 1]]
    assert changes == ["a", "b"] * 4  # once to see how long they take


def test_wrong_answers_are_not_timed(monkeypatch):
    monkeypatch.setattr(kernels, "ours", lambda q, k, v, **_: 1.01 * v)
    (row,) = kernels.run([shapes.Shape("tiny", 16, 2)], ["jaxflow reference"], repeats=ONCE)["rows"]
    assert row["note"].startswith("wrong") and "ms" not in row


def test_naive_refuses_large_scores():
    shape = shapes.Shape("huge", 2**17, 3)
    with pytest.raises(kernels.UnavailableError, match="64 GiB"):
        kernels.prepare("jnp", shape, "forward", kernels.draw(shape))


@pytest.mark.slow
def test_ceilings_are_measured():
    assert all(rate > 1e6 for rate in timing.ceilings().values())


@pytest.mark.slow
def test_peak_memory_of_scores():
    case = [dataclasses.asdict(shapes.particles(4096, 2)), "forward", "jnp"]
    measured = timing.in_child("benchmarks.kernels", case, timeout_s=60)
    assert measured["peak_mib"] >= 4096**2 * 4 / 2**20


@pytest.mark.skipif(not has_torch, reason="torch is not installed")
def test_torch_agrees():
    rows = kernels.run([PARTICLES, LANGUAGE], ["torch"], repeats=ONCE)["rows"]
    assert [r["mode"] for r in rows] == ["forward", "forward", "gradient"]
    assert all(r["error"] < 1e-5 for r in rows)


@pytest.mark.skipif(has_torch, reason="torch is installed")
def test_absent_torch_is_reported():
    rows = kernels.run([shapes.Shape("tiny", 16, 2)], ["torch", "keops"], repeats=ONCE)["rows"]
    assert [r["note"] for r in rows] == ["not installed"] * 2
