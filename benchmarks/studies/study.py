"""What all studies do: say the cost, run what is missing, keep each run, sum up over seeds.

The record of a study is JSON, written anew after each run:

    study, question    what is asked
    device, platform, python, versions, commit, modified    of the last run
    runs    a line a run: case, seed, setting, commit, and its numbers
    rows    a line a case: case, n (how many seeds), seeds, and {number: {mean, spread}}

`spread` is the standard deviation over the seeds, sqrt(sum (x - mean)^2 / (n - 1)), null of one.
"""

import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..device import provenance

FIXED = ("case", "seed", "setting", "commit")  # of a run; the rest are its numbers
RATE = 3e10  # floating-point operations a second of a CPU's core, until runs have told
RESULTS = Path(__file__).parents[1] / "results" / "studies"


class Stopped(Exception):  # noqa: N818
    """A run was stopped before its end, by a signal or for want of time; it can go on."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing to measure. `setting` is JSON, all that its numbers depend on besides the seed;
    `flops` is what a run takes, for the estimate."""

    name: str
    setting: dict[str, Any]
    flops: float


class Place(NamedTuple):
    """Where a run keeps its state, and the minutes it has (`None`: all it wants)."""

    folder: Path
    minutes: float | None


class Study(NamedTuple):
    """`measure` makes the numbers of a run: floats, or a dictionary of floats."""

    name: str
    question: str
    cases: Sequence[Case]
    measure: Callable[[Case, int, Place], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which runs, and where they leave what they find."""

    json_file: Path
    folder: Path
    seeds: int = 3
    only: tuple[str, ...] = ()
    minutes: float | None = None


def run(study: Study, plan: Plan, say: Callable[[str], Any]) -> dict[str, Any]:
    """Measures what the record does not hold yet, in the order of the seeds, then of the cases."""
    cases = [case for case in study.cases if not plan.only or case.name in plan.only]
    if unknown := set(plan.only) - {case.name for case in cases}:
        names = ", ".join(case.name for case in study.cases)
        raise ValueError(f"no case {', '.join(sorted(unknown))}; there are {names}.")
    record = read(plan.json_file, study)
    asked = [(case, seed) for seed in range(plan.seeds) for case in cases]
    missing = [(case, seed) for case, seed in asked if not _held(record, case, seed)]
    say(f"{study.name}: {study.question}")
    say(f"{len(asked)} runs, of which {len(asked) - len(missing)} are in {plan.json_file}.")
    start, left = time.perf_counter(), sum(case.flops for case, _ in missing)
    say(f"{left:.1e} floating-point operations to go: {_duration(record, left)}.")
    for i, (case, seed) in enumerate(missing, 1):
        minutes = plan.minutes and plan.minutes - (time.perf_counter() - start) / 60
        if minutes is not None and minutes <= 0:
            say(f"The time is over: {len(missing) - i + 1} runs left, for the same command again.")
            break
        say(f"{case.name}, seed {seed} ({i} of {len(missing)}; {_duration(record, left)} to go)")
        began = time.perf_counter()
        place = Place(plan.folder / f"{case.name}-{seed}".replace(" ", "-"), minutes)
        try:
            found = study.measure(case, seed, place)
        except Stopped as stopped:
            say(f"Stopped: {stopped} The same command goes on from there.")
            break
        seconds = {"seconds": time.perf_counter() - began}
        record = _kept(plan.json_file, study, case, seed, seconds | found)
        left -= case.flops
        say(f"  {_line(found)}")
    return record


def read(path: Path, study: Study) -> dict[str, Any]:
    """The record, or an empty one.

    **Raises:** `ValueError` where the file is the record of no such study.
    """
    if not path.exists():
        return {"study": study.name, "question": study.question, "runs": [], "rows": []}
    try:
        record = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}. Move it away to begin anew.") from error
    if not isinstance(record, dict) or record.get("study") != study.name:
        raise ValueError(f"{path} is no record of the study {study.name}: take another --json.")
    return record


def _held(record: dict[str, Any], case: Case, seed: int) -> bool:
    wanted = case.name, seed, case.setting
    return any((r["case"], r["seed"], r["setting"]) == wanted for r in record["runs"])


def _kept(path: Path, study: Study, case: Case, seed: int, found: dict) -> dict[str, Any]:
    """The record with one run more, on disk; read anew, as another process may have added to it."""
    record, about = read(path, study), provenance()
    others = [r for r in record["runs"] if (r["case"], r["seed"]) != (case.name, seed)]
    own = {"case": case.name, "seed": seed, "setting": case.setting, "commit": about["commit"]}
    order = {case.name: i for i, case in enumerate(study.cases)}
    place = lambda r: (order.get(r["case"], len(order)), r["seed"])
    runs = sorted([*others, own | found], key=place)
    record = {"study": study.name, "question": study.question} | about
    record |= {"runs": runs, "rows": summed_up(runs)}
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(new, path)
    return record


def summed_up(runs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a case: the mean and the spread of each of its numbers."""
    cases: dict[str, list[dict]] = {}
    for each in runs:
        cases.setdefault(each["case"], []).append(each)
    return [
        {"case": name, "n": len(found), "seeds": [r["seed"] for r in found]}
        | {key: _spread([r[key] for r in found]) for key in found[0] if key not in FIXED}
        for name, found in cases.items()
    ]


def _spread(values: list[Any]) -> dict[str, Any]:
    """{mean, spread}, of each entry of dictionaries."""
    if isinstance(values[0], dict):
        return {key: _spread([v[key] for v in values]) for key in values[0]}
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "spread": spread}


def _duration(record: dict[str, Any], flops: float) -> str:
    """How long so many operations take at the speed of the runs that are there."""
    spent = [(r["flops"], r["seconds"]) for r in record["runs"]]
    known = sum(f for f, _ in spent) / sum(s for _, s in spent) if spent else RATE
    return f"{flops / known / 60:.3g} min at {known / 1e9:.2g} Gflop/s" + " (a guess)" * (not spent)


def _line(found: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v:.4g}" for k, v in found.items() if isinstance(v, int | float))
