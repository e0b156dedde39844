"""What every suite measures with: rivals checked, then timed in turn."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from . import machine

SAMPLE_S = 0.02  # short calls are repeated inside a sample until it takes this long
PAUSE_S = 0.005  # between rivals, so that thread pools that spin for work fall asleep
CASE_S = 2.0  # for the samples of one case, unless that leaves too few
CAP_S = 2.0  # a call that takes longer is made once, unless --cap says otherwise
NAIVE_LIMIT = 4 * 2**30  # bytes of one array of scores

# The largest difference over the largest entry that is still a right answer. In float32 a score
# of size 6 made of 64 products is off by at most 65 * 6e-8 * 6 = 2e-5, and the weight with it;
# 1e-4 accepts that and refuses products in TF32 (5e-4 each). In 16 bits the operands are exact as
# given; weights, their derivatives, the mean inside <g, mean> and the result are rounded once
# each, by u = 2^-8 or 2^-11, and <g, v> - <g, mean> cancels: ten roundings.
TOLERANCE = {"float64": 1e-12, "float32": 1e-4, "bfloat16": 10 * 2.0**-8, "float16": 10 * 2.0**-11}

Launch = Callable[[], Any]


class UnavailableError(Exception):
    """A rival cannot run a case; the message says why."""


class Runner(NamedTuple):
    """One case of one rival: `launch` starts it and returns its answer, `wait` waits for that.

    `memory` gives the MiB of a call at its peak, where this process can tell (not on a CPU).
    """

    launch: Launch
    wait: Callable[[Any], Any] = lambda out: out
    memory: Callable[[], float] | None = None

    def __call__(self):
        return self.wait(self.launch())


class Samples(NamedTuple):
    """The least and the most samples of a case, and the seconds beyond which one is enough."""

    least: int = 3
    most: int = 25
    cap_s: float = CAP_S


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line asks of a suite."""

    quick: bool = False
    only: str = ""  # cases whose name starts so
    backends: tuple[str, ...] = ()  # of jaxflow, beside the one it picks
    samples: Samples = Samples()


def compiled(fn: Callable, *operands: Any) -> Runner:
    """fn(*operands) as one compiled program."""
    operands = jax.device_put(operands)
    program = jax.jit(fn).lower(*operands).compile()
    if jax.default_backend() == "cpu":
        return Runner(lambda: jax.block_until_ready(program(*operands)))
    account = program.memory_analysis()
    if account is None:
        return Runner(lambda: program(*operands), jax.block_until_ready)
    used = (account.temp_size_in_bytes + account.output_size_in_bytes) / 2**20
    return Runner(lambda: program(*operands), jax.block_until_ready, lambda: used)


def refuse_scores(pairs: int):
    if (size := 4 * pairs) > NAIVE_LIMIT:
        raise UnavailableError(f"scores of {size / 2**30:.0f} GiB")


# ------------------------------------------------------------------ clocks


def seconds(run: Runner, calls: int = 1) -> float:
    """Wall-clock time of one of `calls` calls in a row."""
    start = time.perf_counter()
    for _ in range(calls):
        out = run.launch()
    run.wait(out)
    return (time.perf_counter() - start) / calls


def in_turn(runs: Mapping[str, Runner], *, samples: Samples) -> dict[str, list[float]]:
    """Seconds a call of the rivals A, B, C taken in turn, A B C C B A A B C ..., so that a change
    in the machine's state meets all alike, and none always comes after the same other one: threads
    that still spin and caches that were emptied cost the next 5 %."""
    calls = {name: math.ceil(SAMPLE_S / seconds(run)) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    stop = time.perf_counter() + CASE_S
    for i in range(samples.most):
        if i >= samples.least and time.perf_counter() > stop:
            break
        for name in list(runs)[:: -1 if i % 2 else 1]:
            time.sleep(PAUSE_S)
            times[name].append(seconds(runs[name], calls[name]))
    return times


def summary(times: list[float]) -> dict[str, float]:
    return {"ms": 1e3 * statistics.median(times), "ms_min": 1e3 * min(times)}


# ------------------------------------------------------------------ the contest


def library(rival: str) -> str:
    """Rivals of one library, such as two backends of jaxflow, share their first word."""
    return rival.split()[0]


def failure(error: Exception) -> str:
    """A note of one line: the reason that a rival gives, or that it failed."""
    cause = error.__cause__
    if isinstance(cause, type(error)):  # the words of the library, not those of its caller
        return failure(cause)
    if isinstance(error, UnavailableError | NotImplementedError):
        return str(error)
    lines = str(error).strip().splitlines() or [""]
    return f"failed: {type(error).__name__}: {lines[0][:120]}"


def compete(
    rows: Sequence[dict],
    prepare: Callable[[dict], Runner],
    error: Callable[[Any], float],
    tolerance: float,
    *,
    samples: Samples,
) -> dict[str, Runner]:
    """Fills the rows, one a rival: `prepare` compiles, the first answer is checked, and those that
    are right are timed in turn. Returns the runners that were timed."""
    runners: dict[str, Runner] = {}
    first_s: dict[str, float] = {}
    for row in rows:
        # A rival that fails, in whatever way, must not cost the others their rows.
        try:
            start = time.perf_counter()
            runner = prepare(row)
            row["compile_s"] = time.perf_counter() - start
            start = time.perf_counter()
            found = runner()
            first_s[row["rival"]] = time.perf_counter() - start
            row["error"] = error(found)
        except Exception as e:
            row["note"] = failure(e)
            continue
        if not row["error"] <= tolerance:
            row["note"] = f"wrong (over {tolerance:.0e}), not timed"
            continue
        runners[row["rival"]] = runner
    take_times(rows, runners, first_s, samples=samples)
    return runners


def take_times(
    rows: Sequence[dict],
    runners: Mapping[str, Runner],
    first_s: Mapping[str, float],
    *,
    samples: Samples,
):
    """Times the runners in turn into their rows, with the load of the machine; a call over the cap
    is not repeated, and its row says so."""
    slow = {name: [first_s[name]] for name in runners if first_s[name] > samples.cap_s}
    fast = {name: run for name, run in runners.items() if name not in slow}
    load = machine.load()
    times = slow | in_turn(fast, samples=samples)
    for row in rows:
        if row["rival"] in times:
            row |= summary(times[row["rival"]]) | {"load": load}
        if row["rival"] in slow:
            add_note(row, f"one sample, over the cap of {samples.cap_s:g} s")
    rank(rows)


def add_note(row: dict, text: str):
    row["note"] = f"{row['note']}; {text}" if row.get("note") else text


def rank(rows: Sequence[dict]):
    """`vs_best`: the time over that of the fastest other library; `vs_jnp`."""
    times = {row["rival"]: row["ms"] for row in rows if "ms" in row}
    for row in rows:
        if "ms" not in row:
            continue
        others = [ms for name, ms in times.items() if library(name) != library(row["rival"])]
        row["vs_best"] = row["ms"] / min(others) if others else None
        row["vs_jnp"] = row["ms"] / times["jnp"] if "jnp" in times else None


def relative_error(found: Iterable[Any], expected: Iterable[np.ndarray]) -> float:
    """The largest difference over the largest entry, worst over the outputs."""
    errors = []
    for f, e in zip(found, expected, strict=True):
        f = np.asarray(f, np.float64).reshape(e.shape)
        errors.append(np.abs(f - e).max() / np.abs(e).max())
    return float(np.max(errors))  # nan, not hidden, where an answer holds one
