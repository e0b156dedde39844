"""Runs suites within the time they get, and keeps what they find after each case."""

import contextlib
import dataclasses
import importlib
import json
import os
import sys
import threading
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
QUICK_S = 450.0  # of all suites: half a minute is left for the start and the end
RESERVE = 0.06  # of the time, for cases that take longer than expected
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


def plan(
    earlier: Mapping[str, dict], budgets: Mapping[str, float], total_s: float, slowdown: float
) -> str:
    """What the run will cost, and at most."""
    costs = {name: slowdown * pace.cost(earlier.get(name), s) for name, s in budgets.items()}
    each = ", ".join(f"{name} {cost:.0f} s" for name, cost in costs.items())
    return (
        f"About {sum(costs.values()) / 60:.1f} min ({each}), at most {total_s / 60:.1f} min: what "
        "does not fit is skipped and named. Ctrl-C keeps what was measured."
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
    current: tuple[str, pace.Watch] | None = None

    def all(self, budgets: Mapping[str, float], total_s: float, start: float) -> int:
        """Each suite within its share of what is left of `total_s` from `start` on; the exit
        code."""
        for name in budgets:
            left = total_s - (time.perf_counter() - start)
            if not self.suite(name, pace.share(budgets, name, left)):
                self._say(f"Interrupted: what was measured is kept{_in(self.output)}.")
                return INTERRUPTED
        return self.code()

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
            self.current = name, watch
            try:
                found = module.run(self.options, watch)
            except KeyboardInterrupt:
                whole, found = False, {"rows": watch.rows}
        self.current = None
        self._end(keep(found))  # so that a suite that dies costs no other
        for line in lines:
            self.shown.print(line, markup=False, soft_wrap=True)
        return whole

    @contextlib.contextmanager
    def ends_after(self, seconds: float):
        """Ends the process where the block takes longer, whatever it is at, with what was measured:
        a program that compiles cannot be interrupted otherwise."""
        timer = threading.Timer(seconds, self._exit)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()

    def code(self) -> int:
        """That of the process: 1 where jaxflow failed or was wrong."""
        if bad := report.failures(self.reports):
            self.progress.print("jaxflow is wrong or failed:", *bad, sep="\n  ", markup=False)
        return 1 if bad else 0

    def draw(self):
        """The pictures of the reports, beside them."""
        if self.output.json_file is not None:
            for line in plots.draw(self.output.json_file):
                self._say(line)

    def _exit(self):
        if self.current is not None:
            name, watch = self.current
            watch.skipped |= dict.fromkeys(watch.waiting, "the time was over before it ended")
            self._end(about(name, watch) | {"rows": watch.rows})
        measured = any(made["rows"] for made in self.reports)
        kept = (
            f"what was measured is kept{_in(self.output)}" if measured else "nothing was measured"
        )
        self._say(f"The time is over: {kept}.")
        code = self.code() if measured else 1
        sys.stdout.flush()
        os._exit(code)

    def _end(self, made: dict):
        self.reports.append(made)
        self.output.write(self.reports)
        report.show(self.shown, made)

    def _say(self, text: str):
        self.progress.print(text, markup=False, soft_wrap=True)


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
