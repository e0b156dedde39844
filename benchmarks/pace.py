"""What a case will cost, before it starts, and an end to a suite. Nothing here imports JAX.

    seconds  =  CPU seconds of an earlier run  *  seconds that one of them takes now

CPU seconds are what a case costs on a busy machine, too. What one of them takes is the load a core
at first, and is learnt from each case that ends.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from . import machine

RESULTS = Path(__file__).parent / "results"
TRUST_S = 20.0  # CPU seconds of cases after which the load at the start counts for a half


class Pace:
    """The seconds that a CPU second takes, and with it what a case will take."""

    def __init__(self, slowdown: float = 1.0):
        self.costs, self.seconds = TRUST_S, TRUST_S * slowdown

    @property
    def slowdown(self) -> float:
        return self.seconds / self.costs

    def learn(self, cost: float, seconds: float):
        """What a case took whose CPU seconds were known."""
        self.costs += cost
        self.seconds += seconds


def of_machine() -> Pace:
    """By the load a core."""
    return Pace(max(1.0, (machine.load() or 0.0) / machine.cores()))


class Watch:
    """Progress, and an end to it: a case that is not expected to end within `budget_s` is skipped.

    `costs` are CPU seconds of cases, by name; one that is not among them is tried. `rows` is what a
    suite has found so far, and `save` keeps it after each case.
    """

    def __init__(
        self,
        budget_s: float = math.inf,
        log: Callable[[str], Any] = lambda text: None,
        save: Callable[[dict], Any] = lambda found: None,
        costs: Mapping[str, float] | None = None,
        pace: Pace | None = None,
    ):
        self.budget_s, self.log, self.save = budget_s, log, save
        self.known, self.pace = costs or {}, pace or Pace()
        self.start = time.perf_counter()
        self.rows: list[dict] = []
        self.skipped: dict[str, str] = {}  # and why
        self.waiting: list[str] = []  # cases that have not ended
        self.cases: dict[str, dict[str, float]] = {}  # seconds, and CPU seconds

    @property
    def spent(self) -> float:
        return time.perf_counter() - self.start

    def each(self, cases: Iterable, label: Callable[[Any], str] = str) -> Iterator:
        cases = list(cases)
        self.waiting = [label(case) for case in cases]
        for i, case in enumerate(cases, 1):
            name, left = label(case), self.budget_s - self.spent
            expected = self.pace.slowdown * self.known.get(name, 0.0)
            if left <= 0 or expected > left:
                self.skipped[name] = _reason(expected, left, self.budget_s)
                self.waiting.remove(name)
                continue
            about = f", about {expected:.0f} s" if expected else ""
            self.log(
                f"{name} ({i} of {len(cases)}{about}; {self.spent:.0f} of {self.budget_s:.0f} s)"
            )
            begin, cost = time.perf_counter(), cpu_seconds()
            yield case
            self.waiting.remove(name)
            self._keep(name, time.perf_counter() - begin, cpu_seconds() - cost)

    def _keep(self, name: str, seconds: float, cost: float):
        self.cases[name] = {"seconds": round(seconds, 2), "cpu_s": round(cost, 2)}
        if name in self.known:
            self.pace.learn(self.known[name], seconds)
        self.save({"rows": self.rows})


def _reason(expected: float, left: float, budget_s: float) -> str:
    if left <= 0:
        return f"the {max(budget_s, 0):.0f} s of the suite are spent"
    return f"about {expected:.0f} s, and {left:.0f} of {budget_s:.0f} s are left"


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    return sum(os.times()[:4])


# ------------------------------------------------------------------ earlier runs


def earlier(quick: bool, platform: str) -> dict[str, dict]:
    """The report of each suite in the results that are kept of a quick or a full run."""
    path = RESULTS / f"{platform}-quick.json" if quick else RESULTS / f"{platform}.json"
    reports = json.loads(path.read_text()) if path.exists() else []
    return {report["suite"]: report for report in reports}


def costs(report: dict | None) -> dict[str, float]:
    """CPU seconds of the cases of an earlier report."""
    cases = (report or {}).get("cases", {})
    return {name: case["cpu_s"] for name, case in cases.items()}


def cost(report: dict | None, budget_s: float) -> float:
    """CPU seconds of a suite: of its cases in an earlier report, a share of the budget for each
    that was skipped there; the budget where there is no report."""
    if report is None:
        return budget_s
    known, skipped = costs(report), report["skipped"]
    if not known:
        return report["seconds"]
    return sum(known.values()) + budget_s * len(skipped) / (len(known) + len(skipped))


def share(budgets: Mapping[str, float], name: str, left_s: float) -> float:
    """The seconds that a suite gets of what is left for it and the suites after it, in the
    proportion of their budgets."""
    names = list(budgets)
    after = sum(budgets[other] for other in names[names.index(name) :])
    return left_s * budgets[name] / after
