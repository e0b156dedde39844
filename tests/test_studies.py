"""The studies: what is kept run by run, and each command end to end at a tiny size."""

import json
import math
from typing import Any

import numpy as np
import pytest

from benchmarks.studies import adjoints, characters, images
from benchmarks.studies.__main__ import report
from benchmarks.studies.study import Case, Plan, Stopped, Study, run

LINE = "To be, or not to be, that is the question. "


def squares(*, scale=1.0, calls=None, stop_at=()):
    """A study that measures scale (case + seed)^2, and fails as told."""

    def measure(case, seed, place):
        if (case.name, seed) in stop_at:
            raise Stopped("SIGTERM after 3 steps.")
        if calls is not None:
            calls.append((case.name, seed))
        value = case.setting["scale"] * (int(case.name) + seed) ** 2
        return {"flops": case.flops, "value": value, "at": {"2": 2 * value}}

    cases = [Case(name, {"scale": scale}, 1e9) for name in ("1", "2")]
    return Study("squares", "what are squares?", cases, measure)


def plan(tmp_path, **options):
    given: dict[str, Any] = {"seeds": 2} | options
    return Plan(tmp_path / "results" / "squares.json", tmp_path / "runs", **given)


def test_rows_are_means_and_spreads_over_seeds(tmp_path):
    said = []
    record = run(squares(), plan(tmp_path), said.append)
    assert record == json.loads((tmp_path / "results" / "squares.json").read_text())
    assert [(r["case"], r["seed"], r["value"]) for r in record["runs"]] == [
        ("1", 0, 1.0), ("1", 1, 4.0), ("2", 0, 4.0), ("2", 1, 9.0)
    ]  # fmt: skip
    first, second = record["rows"]
    assert (first["n"], first["seeds"]) == (2, [0, 1])
    assert first["value"] == {"mean": 2.5, "spread": pytest.approx(3 / math.sqrt(2))}
    assert second["at"] == {"2": {"mean": 13.0, "spread": pytest.approx(10 / math.sqrt(2))}}
    assert {"device", "versions", "commit"} <= record.keys()
    assert "4.0e+09 floating-point operations to go" in said[2]


def test_one_seed_has_no_spread(tmp_path):
    record = run(squares(), plan(tmp_path, seeds=1), print)
    assert record["rows"][0]["value"] == {"mean": 1.0, "spread": None}


def test_what_is_kept_is_not_measured_again(tmp_path):
    calls = []
    run(squares(calls=calls), plan(tmp_path, seeds=1, only=("2",)), print)
    run(squares(calls=calls), plan(tmp_path), print)
    assert calls == [("2", 0), ("1", 0), ("1", 1), ("2", 1)]
    record = run(squares(scale=2.0, calls=calls), plan(tmp_path, seeds=1), print)
    assert calls[4:] == [("1", 0), ("2", 0)]  # another setting is another run
    assert [(r["seed"], r["value"]) for r in record["runs"]] == [
        (0, 2.0),
        (1, 4.0),
        (0, 8.0),
        (1, 9.0),
    ]


def test_a_stopped_study_goes_on(tmp_path):
    said, calls = [], []
    run(squares(stop_at=[("2", 0)], calls=calls), plan(tmp_path), said.append)
    assert calls == [("1", 0)] and "goes on from there" in said[-1]
    run(squares(calls=calls), plan(tmp_path, minutes=1e-9), said.append)
    assert len(calls) == 1 and "3 runs left" in said[-1]
    record = run(squares(calls=calls), plan(tmp_path), print)
    assert len(calls) == len(record["runs"]) == 4


@pytest.mark.parametrize("text, message", [("{", "damaged"), ('{"study": "other"}', "no record")])
def test_what_is_no_record_is_left_as_it_is(tmp_path, text, message):
    path = plan(tmp_path).json_file
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        run(squares(), plan(tmp_path), print)
    assert path.read_text() == text


def test_an_unknown_case_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no case 3; there are 1, 2"):
        run(squares(), plan(tmp_path, only=("3",)), print)


# ------------------------------------------------------------------ each command


def measured(study, tmp_path, capsys) -> dict:
    """The runs of a command; a second call of it measures nothing."""
    path = tmp_path / "record.json"
    for _ in range(2):
        report(study, 1, None, None, path, tmp_path / "runs")
    out = capsys.readouterr().out
    count = len(study.cases)
    assert (
        f"{count} runs, of which 0 are in" in out and f"{count} runs, of which {count} are" in out
    )
    assert f"The record is {path}" in out
    return {r["case"]: r for r in json.loads(path.read_text())["runs"]}


def test_characters(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(LINE * 20)
    smooth = {"depth": {"t1": 1.0, "steps": 1}, "curve": "smooth", "layers": 2}
    heun = {"t1": 1.0, "steps": 1, "solver": "heun"}
    loose = {"Heun 9": {"t1": 1.0, "tolerance": 9.0, "solver": "heun"}}
    drawn = {"drawn": [1, heun], "after": 4, "adaptive": loose, "exits": [0.0, 1e9]}
    cases = {"elastic": (smooth, drawn)}
    small = {"dim": 8, "heads": 2, "context": 8, "steps": 4, "batch": 4}
    study = characters.study(text, cases, depths=(1, 2), **small)
    found = measured(study, tmp_path, capsys)["elastic"]
    assert found["evaluations"] == 1 and found["best"] <= found["last"] < math.log(16)
    assert found["losses"]["1"] == pytest.approx(found["last"], rel=1e-6)
    assert found["adaptive_evaluations"]["Heun 9"] > 2 and found["adaptive"]["Heun 9"] < math.log(
        16
    )
    assert found["exits"]["0"] == pytest.approx(found["losses"]["2"], rel=1e-6)
    assert found["exit_evaluations"]["0"] == 2 > found["exit_evaluations"]["1e+09"] >= 1
    assert found["parameters"] == 2 * (12 * 64 + 4 * 8 + 5 * 8) + (len(set(LINE)) + 8 + 2) * 8
    assert (tmp_path / "record.png").stat().st_size > 0


def test_the_cases_of_characters_are_what_they_say(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(LINE * 100)
    costs = {case.name: case.flops for case in characters.study(text).cases}
    assert costs["shared, equal compute"] == costs["plain"] == costs["continuous 4"]
    # d = 256 at 4 steps: one block has the matrices of four.
    assert costs["shared, equal parameters"] == pytest.approx(4 * costs["plain"], rel=0.02)
    assert costs["heun 4"] == pytest.approx(2 * costs["plain"], rel=0.02)
    half = (costs["continuous 4"] + costs["elastic"]) / 2
    assert costs["elastic, last half"] == pytest.approx(half, rel=1e-6)
    assert costs["elastic"] == pytest.approx(
        costs["plain"] * np.mean(characters.DEPTHS) / 4, rel=0.02
    )


def test_digits(tmp_path, capsys):
    file = tmp_path / "digits.npz"
    pixels = np.random.default_rng(0).integers(0, 256, (20, 28, 28), np.uint8)
    np.savez(file, images=pixels, labels=np.arange(20) % 10)
    study = images.digits(file, steps=2, batch=4)
    study = study._replace(cases=study.cases[:1])
    found = measured(study, tmp_path, capsys)["attention, transport"]
    assert 17_900 < found["parameters"] < 18_300
    assert 0 <= found["accuracy"] <= 1 and found["transport"] > 0


def test_transport(capsys, tmp_path):
    study = images.transport(steps=2)
    study = study._replace(cases=study.cases[3:4])
    found = measured(study, tmp_path, capsys)["weight 0.1"]
    assert 0 <= found["noisy"] <= 1 and found["transport"] > 0
    assert round(150 * found["training"], 9) % 1 == 0  # of 150 images


def test_adjoints(capsys, tmp_path):
    study = adjoints.study(steps=(4,), batch=1, tokens=4, dim=8, heads=2)
    names = ("BacksolveAdjoint, 4 steps", "ReversibleAdjoint, 4 steps")
    study = study._replace(cases=[case for case in study.cases if case.name in names])
    backwards, undone = measured(study, tmp_path, capsys).values()
    assert undone["error"] < 1e-4 < backwards["error"] < 2  # long steps are not those of the ODE
    assert min(backwards["ms"], undone["ms"], backwards["temp_mib"], undone["temp_mib"]) > 0
