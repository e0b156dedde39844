"""The check of the kernels on the device at hand, in a process of its own.

A kernel that was never run on a device may compute nonsense, wait for ever, or end its process. So
a child process runs every kernel (family, mode, dtype) that the platform's backends would take, on
the shapes of `CASES`, against the portable backend, and says what it does before it does it:

    python -m jaxflow.kernels.check    stdin   {"backends": names or null, "skip": numbers}
                                       stdout  {"about": ..., "kernels": [[name, mode, dtype], ...]}
                                               {"begin": number of a kernel}     it is compiled
                                               {"case": name} ...                it runs
                                               {"end": number, "failure": reason or null,
                                                "lost": whether the process ends with it} ...

Where it dies or does not go on, the kernel that it had begun has failed, and another child does the
rest. JAX is not used in the parent: a TPU serves one process at a time.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from .._cache import cache_folder
from . import proof
from .base import (
    MODES,
    Results,
    evaluate,
)
from .cases import TOLERANCE, Case, difference, line, portable
from .proof import About, Kernel, Verdicts
from .registry import OTHERWISE, PREFERENCE, default_platform, kernel_of, load

RUNS = 3  # of a case, for what is right by luck
THREADS = 8  # that compile the cases of a kernel
COMMAND = (sys.executable, "-m", "jaxflow.kernels.check")
Log = Callable[[str], Any]


class CheckError(RuntimeError):
    """The check itself could not run, which says nothing of the kernels."""


# ------------------------------------------------------------------ what is checked


# What a family refuses, another one of the backend takes: particles 3 and 16 channels in float32,
# Hopper 16, 32, ... channels in 16 bits, tensor cores the rest; cuDNN what has no weights.
CASES = (
    Case("particles, masked", 70, 301, 3, 2, batch=3, weighted=True),
    Case("particles, in segments", 1500, 2560, 16, 16),
    Case("heads, masked", 150, 333, 64, 64, batch=3, weighted=True),
    Case("heads, causal", 1000, 1000, 128, 128, batch=2, band=(None, 0), mean_only=True),
    Case("heads, window", 200, 200, 64, 64, batch=2, band=(40, 0)),
    Case("band, masked", 130, 150, 32, 64, batch=2, band=(20, 10), weighted=True),
    Case("odd, causal", 100, 170, 20, 20, band=(None, 0)),
    Case("wide", 100, 170, 256, 256, weighted=True, batch=2),
)


class Trial(NamedTuple):
    """A case, and the backend that runs a kernel on it."""

    backend: str
    case: Case


def plan(backends: Sequence[str] | None = None) -> dict[Kernel, list[Trial]]:
    """The kernels on the device at hand, and what each is tried on; those of all backends that the
    platform prefers to the portable one if None."""
    if backends is None:
        backends = [n for n in PREFERENCE.get(default_platform(), ()) if n not in OTHERWISE]
    trials: dict[Kernel, list[Trial]] = {}
    for dtype, name, mode, case in itertools.product(TOLERANCE, backends, MODES, CASES):
        shapes, problem = case.shapes(dtype), case.problem(dtype)
        if load(name).refusal(mode, shapes, problem) is None:
            kernel = kernel_of(name, mode, shapes, problem)
            trials.setdefault(kernel, []).append(Trial(name, case))
    return trials


# ------------------------------------------------------------------ one kernel


class LostError(Exception):
    """A program failed while it ran, and may have taken the device's context with it."""


class Ready(NamedTuple):
    """A compiled trial; `program` is the reason why there is none, if it is a string."""

    case: str
    program: Callable[[], Results] | str
    expected: Results


def judge(kernel: Kernel, trials: Sequence[Trial], begin: Callable[[str], Any]) -> str | None:
    """Why a kernel failed, or None; `begin` is told each case before it runs.

    **Raises:** `LostError` with the reason where nothing more should run in this process.
    """
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        ready = list(pool.map(functools.partial(_ready, kernel), trials))
    for case, program, expected in ready:
        if isinstance(program, str):
            return f"{case}: {program}"
        begin(case)
        try:
            reason = _fault(program, expected, TOLERANCE[kernel.dtype])
        except Exception as error:
            raise LostError(f"{case}: it did not run: {line(error)}") from error
        if reason is not None:
            return f"{case}: {reason}"
    return None


def _ready(kernel: Kernel, trial: Trial) -> Ready:
    (_, mode, dtype), case, backend = kernel, trial.case, load(trial.backend)
    problem, operands = case.problem(dtype), case.operands(mode, dtype)
    # Without weights their cotangent, the fourth, may be anything.
    expected = portable(operands, problem)[: None if case.weighted else 3]
    try:
        run = jax.jit(functools.partial(evaluate, backend, problem=problem))
        program = functools.partial(run.lower(operands).compile(), operands)
    except Exception as error:
        program = f"it did not compile: {line(error)}"
    return Ready(case.name, program, expected)


def _fault(program: Callable[[], Results], expected: Results, tolerance: float) -> str | None:
    for _ in range(RUNS):
        for f, e in zip(program(), expected, strict=False):
            f, e = np.asarray(f, np.float64), np.asarray(e, np.float64)
            if (reason := difference(f, e, tolerance)) is not None:
                return reason
    return None


# ------------------------------------------------------------------ the child


def child(request: Mapping[str, Any], say: Callable[[dict], Any]):
    """Judges the kernels that are not to be skipped, in their order."""
    platform = default_platform()
    kind, at_hand = proof.target(platform)  # JAX calls GPUs of other makes so, too
    trials = plan(request["backends"]) if at_hand else {}
    say({"about": proof.described(platform, kind, at_hand=at_hand), "kernels": list(trials)})
    for number, (kernel, some) in enumerate(trials.items()):
        if number in request["skip"]:
            continue
        say({"begin": number})
        failure, lost = None, False
        try:
            failure = judge(kernel, some, lambda case: say({"case": case}))
        except LostError as error:
            failure, lost = str(error), True
        say({"end": number, "failure": failure, "lost": lost})
        if lost:
            return


# ------------------------------------------------------------------ the parent


class Report(NamedTuple):
    """The verdicts, what they were found with, and the kernels that the time was too short for."""

    about: About
    verdicts: Verdicts
    unchecked: Sequence[Kernel]


class Limits(NamedTuple):
    """Seconds in which a child starts, compiles a kernel, runs a case; from `total` on, no other
    kernel begins."""

    start: float = 120.0
    compile: float = 300.0
    run: float = 30.0
    total: float = 1800.0


@dataclasses.dataclass
class _State:
    """What the children have said; `ended` has the reason of each kernel that failed."""

    about: About = dataclasses.field(default_factory=dict)
    kernels: list[Kernel] = dataclasses.field(default_factory=list)
    ended: dict[int, str | None] = dataclasses.field(default_factory=dict)

    def over(self, stop: float) -> bool:
        return len(self.ended) == len(self.kernels) or time.monotonic() > stop

    def report(self) -> Report:
        verdicts = {self.kernels[number]: reason for number, reason in self.ended.items()}
        return Report(self.about, verdicts, [k for k in self.kernels if k not in verdicts])


FIRST = Limits(total=180.0)  # of a check that nobody asked for


def check(
    log: Log,
    *,
    backends: Sequence[str] | None = None,
    command: Sequence[str] = COMMAND,
    limits: Limits = Limits(),
    save: Callable[[Report], Any] = lambda report: None,
) -> Report:
    """The verdicts on the kernels of the device at hand, by one child after the other.

    **Arguments:**

    - `log`: is told of each kernel that begins.
    - `backends`: names; those that the platform prefers to the portable one if `None`.
    - `command`: of the child.
    - `limits`: in seconds.
    - `save`: is given what is known after each kernel.

    **Raises:** `CheckError` where a child ends, or does not go on, without a kernel to blame.
    """
    state, stop = _State(), time.monotonic() + limits.total
    while not (state.about and state.over(stop)):
        with _Child(command, {"backends": backends, "skip": sorted(state.ended)}) as process:
            _follow(process, state, limits, stop, log, save)
    return state.report()


def _follow(process: "_Child", state: _State, limits: Limits, stop: float, log: Log, save):
    """Reads what one child says, until it ends, does not go on, or there is no time."""
    opening = process.read(limits.start)
    state.about = opening["about"]
    state.kernels = [Kernel(*kernel) for kernel in opening["kernels"]]
    number, doing, limit, busy = -1, "", limits.compile, False
    while busy or not state.over(stop):
        try:
            message = process.read(limit)
        except CheckError as error:
            if number < 0:
                raise
            # Also where it had ended: what went wrong on a device may show later.
            state.ended[number] = f"{doing}: {error}"
            save(state.report())
            return
        if "begin" in message:
            number, doing, limit, busy = int(message["begin"]), "compiling", limits.compile, True
            log(f"{state.kernels[number]} ({number + 1} of {len(state.kernels)})")
        elif "case" in message:
            doing, limit = str(message["case"]), limits.run
        else:
            state.ended[number], busy = message["failure"], False
            save(state.report())
            if message["lost"]:
                return


class _Child:
    """A process of the check, and what it says; it is ended with the context."""

    def __init__(self, command: Sequence[str], request: dict):
        self.errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=_environment(),
        )
        self.lines: queue.Queue[bytes | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        with contextlib.suppress(BrokenPipeError):  # it has died: that is what `read` says
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(request).encode())
            self.process.stdin.close()

    def __enter__(self) -> "_Child":
        return self

    def __exit__(self, *_):
        self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # the driver has not let go of it yet
            self.process.wait(10)
        self.errors.close()

    def _listen(self):
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                if line.startswith(b"{"):  # not of a library
                    self.lines.put(line)
        self.lines.put(None)

    def read(self, seconds: float) -> dict[str, Any]:
        """The next message.

        **Raises:** `CheckError` where the process ends before, or says nothing for so long.
        """
        try:
            line = self.lines.get(timeout=seconds)
        except queue.Empty:
            raise CheckError(f"its process did not go on for {seconds:g} s") from None
        if line is None:
            raise CheckError(self._end())
        return json.loads(line)

    def _end(self) -> str:
        code = self.process.wait()
        by = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        self.errors.seek(0)
        words = self.errors.read().decode(errors="replace").strip().splitlines()
        return f"its process ended by {by}" + (f": {words[-1][:200]}" if words else "")


def _environment() -> dict[str, str]:
    """That of a child: this very package, a small share of the device, all kernels allowed."""
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    own = {"PYTHONPATH": path, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", proof.SWITCH: "all"}
    return os.environ | own


# ------------------------------------------------------------------ for the command line


def keep(report: Report) -> Path | None:
    """Writes the user's record, which programs that are lowered from now on go by; None where the
    environment says that nothing is kept.

    **Raises:** `OSError` if it cannot be written.
    """
    path = proof.record_path(report.about)
    if path is not None:
        proof.write_record(path, report.about, report.verdicts)
    proof.forget()
    return path


def once(say: Log):
    """Checks the kernels of the device at hand if they have no record yet, and keeps one.

    Whatever goes wrong is said and raises nothing: the portable backend runs without a record.
    """
    if not _due():
        return
    say(
        "The kernels are checked on this device, once for it and these versions, which takes a "
        f"minute or two ({proof.COMMAND})."
    )
    try:
        report = check(lambda text: None, limits=FIRST)
        keep(report)
    except (CheckError, OSError) as error:
        say(f"The check of the kernels did not run: {error}. The portable backend serves.")
        return
    say(summary(report))


def summary(report: Report) -> str:
    """How many passed, and how many did not."""
    right = sum(reason is None for reason in report.verdicts.values())
    text = f"{right} of {len(report.verdicts)} kernels are right here"
    if (late := len(report.unchecked)) > 0:
        text += f"; the time was too short for {late}: {proof.COMMAND} takes what it needs"
    return f"{text}."


def _due() -> bool:
    if proof.all_allowed() or cache_folder() is None:
        return False
    if _tpu_is_free():
        return not proof.software_has_record("tpu")
    platform = default_platform()
    kind, at_hand = proof.target(platform)
    if platform not in proof.PLATFORMS or not at_hand:
        return False
    return not proof.has_record(proof.described(platform, kind, at_hand=True))


def _tpu_is_free() -> bool:
    """Whether a TPU is here, by what does not take it: it serves one process at a time."""
    wanted = os.environ.get("JAX_PLATFORMS", "tpu")
    files = itertools.chain(Path("/dev").glob("accel*"), Path("/dev").glob("vfio/[0-9]*"))
    return "tpu" in wanted and importlib.util.find_spec("libtpu") is not None and any(files)


if __name__ == "__main__":
    child(json.loads(sys.stdin.read()), lambda message: print(json.dumps(message), flush=True))
