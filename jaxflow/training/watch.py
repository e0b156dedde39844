"""How a training is watched and stopped: its lines or bar on the terminal, signals, a trace."""

import math
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .processes import agreed

TRACED = 5  # steps


class Signals:
    """Notes SIGTERM and SIGINT, so that a step ends before the loop does.

    `evaluating`: whether the first Ctrl-C leaves evaluations their time.
    """

    def __init__(self, *, evaluating: bool = False):
        self.caught = self.noted = ""
        self.alone = jax.process_count() == 1  # or the processes have to agree
        self.evaluating = evaluating
        self.before: dict[int, Any] = {}

    @property
    def cut(self) -> bool:
        """Whether an evaluation ends now, too."""
        return bool(self.caught) and not (self.caught == "SIGINT" and self.evaluating)

    @property
    def evaluates(self) -> bool:
        """Whether what was caught asks for an evaluation."""
        return bool(self.caught) and not self.cut

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number, frame):
        if self.noted == "SIGINT" and number == signal.SIGINT:  # asked twice
            if not self.evaluating:
                raise KeyboardInterrupt
            self.evaluating = False
        self.noted = signal.Signals(number).name
        if self.alone:
            self.caught = self.noted

    def agree(self):
        """What one process noted, all have caught."""
        [number] = agreed(signal.Signals[self.noted] if self.noted else 0)
        self.caught = signal.Signals(number).name if number else ""

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Clock:
    """Seconds of training, those before a run went on included, and targets a second."""

    def __init__(self, before: float, minutes: float | None):
        self.start = time.perf_counter()
        self.before, self.minutes = before, minutes
        self.alone, self.agreed = jax.process_count() == 1, False
        self.lap()

    @property
    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.start

    @property
    def over(self) -> bool:
        """Whether the minutes of this call are, and all processes say so."""
        return self._late if self.alone else self.agreed

    @property
    def _late(self) -> bool:
        return self.minutes is not None and time.perf_counter() - self.start >= 60 * self.minutes

    def agree(self):
        """Where the minutes of one process are over, those of all are."""
        [late] = agreed(int(self._late))
        self.agreed = bool(late)

    def lap(self):
        """Targets are counted from now on."""
        self.since, self.targets = time.perf_counter(), 0

    def rate(self, targets: int) -> float:
        """Targets a second since the last lap, with so many more."""
        self.targets += targets
        return self.targets / (time.perf_counter() - self.since)


class Display:
    """The last numbers: behind a progress bar on a terminal, a line a log where there is none."""

    def __init__(self, steps: int, start: int, shown: bool, cost: str):
        console = Console(stderr=True, quiet=not shown)
        live = shown and (console.is_interactive or console.is_jupyter)
        self.steps, self.lines = steps, shown and not live
        self.validation = math.nan
        columns = [
            TextColumn("training"),
            BarColumn(),
            TextColumn("step {task.completed:,.0f} of {task.total:,.0f}  {task.fields[numbers]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        ]
        self.bar = Progress(*columns, console=console, disable=not live)
        self.task = self.bar.add_task("training", total=steps, completed=start, numbers="compiling")
        if shown:
            print(cost, file=sys.stderr, flush=True)

    def __enter__(self):
        self.bar.start()
        return self

    def show(self, step: int, numbers: dict[str, Any], *, logged: bool):
        self.validation = numbers.get("validation_loss", self.validation)
        text = f"loss {numbers['loss']:.4f}, "
        if not math.isnan(self.validation):  # none before the first evaluation
            text += f"validation {self.validation:.4f}, "
        text += f"{numbers['targets_per_second']:,.0f} targets/s"
        if "num_evaluations" in numbers:
            text += f", {numbers['num_evaluations']:.0f} evaluations"
        self.bar.update(self.task, completed=step, numbers=text)
        if logged and self.lines:
            line = f"step {step:,} of {self.steps:,}: {text}, {numbers['seconds']:,.0f} s"
            print(line, file=sys.stderr, flush=True)

    def __exit__(self, *_):
        self.bar.stop()


class Trace:
    """What the device and the host do in a few steps after the first, which compiles; nothing where
    there is no folder.

    TensorBoard and https://ui.perfetto.dev show what `jax.profiler` writes.
    """

    def __init__(self, folder: Path | None, done: int):
        self.folder, self.done = folder, done
        self.running = False

    def turns(self, step: int) -> bool:
        """Whether tracing begins or ends after this step."""
        return self.folder is not None and step - self.done in (1, 1 + TRACED)

    def after(self, step: int):
        if not self.turns(step):
            return
        if self.running:
            self.stop()
        else:
            jax.profiler.start_trace(str(self.folder))
            self.running = True

    def stop(self):
        """Writes what was traced, as far as it came."""
        if self.running:
            jax.profiler.stop_trace()
            self.running = False
