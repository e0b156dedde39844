"""Runs suites within the time they get, and keeps what they find after each case."""

import dataclasses
import importlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console

from . import machine, pace, plots, report
from .device import provenance
from .timing import Options

CPU_FACTOR = 4.5  # a CPU gets so many times the seconds of a full suite
QUICK_S = 450.0  # of all suites: half a minute is left for a case that takes longer than expected
INTERRUPTED = 130  # the exit code

Say = Callable[[str], Any]


class Output(NamedTuple):
    """The files that reports are written to, if any."""

    json_file: Path | None = None
    csv_file: Path | None = None

    def write(self, reports: Sequence[Mapping]):
        if self.json_file is not None:
            self.json_file.parent.mkdir(parents=True, exist_ok=True)
            self.json_file.write_text(json.dumps(reports, indent=1) + "\n")
        if self.csv_file is not None:
            report.write_csv(self.csv_file, reports)

    def __str__(self) -> str:
        return " and ".join(str(path) for path in self if path is not None)


def budget(suite: str, quick: bool, patience: float) -> float:
    """The seconds that a suite gets by itself."""
    budget = importlib.import_module(f"benchmarks.{suite}").BUDGET_S
    factor = 1 if quick or jax.default_backend() != "cpu" else CPU_FACTOR
    return patience * factor * budget["quick" if quick else "full"]


def total(budgets: Mapping[str, float], quick: bool, minutes: float | None) -> float:
    """The seconds that all suites get."""
    if minutes is not None:
        return 60 * minutes
    whole = sum(budgets.values())
    return min(whole, QUICK_S) if quick and len(budgets) > 1 else whole


def plan(earlier: Mapping[str, dict], ends: Mapping[str, float], only: str, slowdown: float) -> str:
    """What the run will cost, as far as an earlier one tells, and at most."""
    begins, lines = 0.0, []
    for name, end in ends.items():
        known = pace.cost(earlier.get(name), only)
        about = "unknown" if known is None else f"about {known * slowdown:.0f} s"
        lines.append(f"{name} {about}, at most {end - begins:.0f} s")
        begins = end
    costs = [pace.cost(earlier.get(name), only) for name in ends]
    known = sum(cost for cost in costs if cost is not None) * slowdown
    about = f"About {known / 60:.1f} min" if all(c is not None for c in costs) else "Cost unknown"
    return (
        f"{about}, at most {begins / 60:.1f} min: what does not fit is skipped and named. "
        f"Ctrl-C keeps what was measured.\n  " + "; ".join(lines)
    )


@dataclasses.dataclass
class Run:
    """Suites one after the other; `reports` are those that have ended."""

    options: Options
    output: Output
    shown: Console
    progress: Console
    earlier: Mapping[str, dict] = dataclasses.field(default_factory=dict)
    clock: pace.Pace = dataclasses.field(default_factory=pace.of_machine)
    conclude: Callable[[dict], Iterable[str]] = lambda report: ()  # lines on what was found
    reports: list[dict] = dataclasses.field(default_factory=list)

    def all(self, ends: Mapping[str, float], start: float) -> int:
        """Each suite until the second after `start` that it should end at; the exit code."""
        for name, end in ends.items():
            if not self.suite(name, end - (time.perf_counter() - start)):
                said = f"Interrupted: what was measured is kept{_in(self.output)}."
                self.progress.print(said, markup=False, soft_wrap=True)
                return INTERRUPTED
        if bad := report.failures(self.reports):
            self.progress.print("jaxflow is wrong or failed:", *bad, sep="\n  ", markup=False)
            return 1
        return 0

    def suite(self, name: str, budget_s: float) -> bool:
        """One suite; False where it was interrupted, with what it had found."""
        module = importlib.import_module(f"benchmarks.{name}")
        lines: Sequence[str] = ()

        def keep(found: dict) -> dict:
            nonlocal lines
            made = about(name, watch) | found
            self.output.write([*self.reports, made])
            lines = tuple(self.conclude(made))
            return made

        whole = True
        with self.progress.status(name) as status:
            log = lambda text: status.update(f"{name}: {text}")
            known = pace.costs(self.earlier.get(name))
            watch = pace.Watch(budget_s, log, keep, known, self.clock)
            try:
                found = module.run(self.options, watch)
            except KeyboardInterrupt:
                whole, found = False, {"rows": watch.rows}
        self.reports.append(keep(found))  # so that a suite that dies costs no other
        report.show(self.shown, self.reports[-1])
        for line in lines:
            self.shown.print(line, markup=False, soft_wrap=True)
        return whole

    def draw(self):
        """The pictures of the reports, beside them."""
        if self.output.json_file is not None:
            for line in plots.draw(self.output.json_file):
                self.progress.print(line, markup=False, soft_wrap=True)


def about(name: str, watch: pace.Watch) -> dict:
    """A report without what was found."""
    return {
        "suite": name,
        "seconds": watch.spent,
        "skipped": watch.skipped,
        "cases": watch.cases,
        "cores": machine.cores(),
        "threads": machine.threads(),
    } | provenance()


def _in(output: Output) -> str:
    return f" in {output}" if str(output) else ", above"
