"""`python -m benchmarks lease`: the most of a short time on a GPU machine that is lent.

What is worth most comes first, each stage in a process of its own that may hang or die, with a cap
on its seconds, and what it finds is on the disk at once:

    OUT/kernels/*.json   verdicts on the kernels, written after each one: a record for the package
    OUT/NAME.log         what a stage printed
    OUT/NAME.json        the report of a suite
    OUT/configs.py       the tiles that tuning found, where it found any
    OUT/lease.json       the stages, how they ended, and their seconds

    python -m benchmarks.lease SECONDS    the stage that checks the kernels
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxflow._cache import cache_folder
from jaxflow.kernels import check, proof
from jaxflow.kernels.pallas_gpu import configs

from .peak import ROOT

RESULTS = ROOT / "benchmarks" / "results"
CONFIGS = Path(configs.__file__)
TILES, PACKAGED = "jaxflow/kernels/pallas_gpu/configs.py", "jaxflow/kernels/proved"
PROGRAMS = "programs"  # that the check has compiled, until the end
LEAST_S = 15.0  # in less no stage is worth its start
GRACE_S = 10.0  # after an interrupt, in which a stage prints what it has
PROBE_S = 120.0
PROBE = "import jax; print(jax.default_backend(), jax.local_devices()[0].device_kind, sep='|')"
TUNED = ("particles-16384-3", "language-64-1024-64-bfloat16")  # the shapes that are used most
PLATFORM = {"gpu": "cuda", "tpu": "tpu"}

Say = Callable[[str], Any]


class Stage(NamedTuple):
    """A command of Python, the most seconds that it gets, and what it is for."""

    name: str
    seconds: float
    purpose: str
    command: tuple[str, ...]
    platforms: tuple[str, ...] = ("cuda", "tpu")
    after_tuning: bool = False  # it runs only where the tiles have changed


def stages(out: Path) -> list[Stage]:
    """The plan, what is worth most first."""
    return [
        _check("check", 140, "every kernel against the portable backend"),
        _tests(75),
        _suite("kernels", 75, "the operation against its rivals and the floor", out),
        *(_tuning(shape, 45, out) for shape in TUNED),
        _check("check-again", 70, "the same with the new tiles")._replace(after_tuning=True),
        _suite("flow", 60, "whole solves at equal error", out),
    ]


def _check(name: str, seconds: float, purpose: str) -> Stage:
    # It ends by itself before its cap: no kernel begins in the last third.
    return Stage(name, seconds, purpose, ("-m", "benchmarks.lease", f"{2 * seconds / 3:.0f}"))


def _tests(seconds: float) -> Stage:
    paths = sorted((ROOT / "tests").glob("test_*.py"))
    wanted = (path for path in paths if "pytest.mark.gpu" in path.read_text(encoding="utf-8"))
    files = (str(path.relative_to(ROOT)) for path in wanted)
    command = ("-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider", *files)
    return Stage("tests", seconds, "the tests marked gpu", command, ("cuda",))


def _suite(name: str, seconds: float, purpose: str, out: Path) -> Stage:
    report = str(out / f"{name}.json")
    return Stage(name, seconds, purpose, ("-m", "benchmarks", name, "--quick", "--json", report))


def _tuning(shape: str, seconds: float, out: Path) -> Stage:
    name = f"tune-{shape}"
    options = ("--quick", "--only", shape, "--write", "--json", str(out / f"{name}.json"))
    command = ("-m", "benchmarks", "tune", *options)
    return Stage(name, seconds, f"the best tiles for {shape}", command, ("cuda",))


# ------------------------------------------------------------------ the command


def main(out: Path | None, minutes: float, dry_run: bool, say: Say) -> int:
    """Runs the plan on the device at hand; the exit code."""
    platform, kind = device()
    out = (out or RESULTS / (_slug(kind) if platform else "device")).absolute()
    plan = [stage for stage in stages(out) if platform is None or platform in stage.platforms]
    if platform is None or dry_run:
        say(f"There is no GPU or TPU: JAX sees {kind}." if platform is None else f"On {kind}:")
        for line in described(plan, minutes, out):
            say(line)
        return 0 if dry_run else 1
    os.environ["JAXFLOW_CACHE"] = str(out)  # so that the suites go by the verdicts of the check
    before = CONFIGS.read_text()
    run(plan, out, 60 * minutes, say, lambda: CONFIGS.read_text() != before)
    shutil.rmtree(out / PROGRAMS, ignore_errors=True)
    for line in advice(out, kind, CONFIGS.read_text() != before):
        say(line)
    return 0


def device() -> tuple[str | None, str]:
    """The platform of kernels at hand and the kind of device, or None and what JAX sees; by a
    process that lets go of it."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=PROBE_S
        )
        backend, kind = done.stdout.strip().splitlines()[-1].split("|")
    except (subprocess.TimeoutExpired, IndexError, ValueError):
        return None, "nothing, as its start fails or hangs"
    return PLATFORM.get(backend), kind


def described(plan: Sequence[Stage], minutes: float, out: Path) -> Iterator[str]:
    """What would be done."""
    yield f"In at most {minutes:g} minutes, each stage if as much time is left, into {out}:"
    for stage in plan:
        changed = " (if tuning changed them)" if stage.after_tuning else ""
        yield f"  {stage.name}, at most {stage.seconds:.0f} s: {stage.purpose}{changed}"
        yield f"    python {' '.join(stage.command)}"


def run(
    plan: Sequence[Stage], out: Path, seconds: float, say: Say, tuned: Callable[[], bool]
) -> list[dict[str, Any]]:
    """Runs the stages within so many seconds; what became of each, as in OUT/lease.json."""
    out.mkdir(parents=True, exist_ok=True)
    stop, results = time.monotonic() + seconds, []
    for stage in plan:
        left = min(stage.seconds, stop - time.monotonic())
        start = time.monotonic()
        if stage.after_tuning and not tuned():
            outcome = "not needed: the tiles are the same"
        elif left < min(LEAST_S, stage.seconds):
            outcome = "left out: no time"
        else:
            say(f"{stage.name}: {stage.purpose}, at most {left:.0f} s")
            outcome = in_child(stage.command, left, out / f"{stage.name}.log")
        took = time.monotonic() - start
        say(f"{stage.name}: {outcome} ({took:.0f} s)")
        results.append({"stage": stage.name, "outcome": outcome, "seconds": round(took, 1)})
        (out / "lease.json").write_text(json.dumps(results, indent=1) + "\n")
        if tuned():
            shutil.copy(CONFIGS, out / "configs.py")
    return results


def in_child(command: Sequence[str], seconds: float, log: Path) -> str:
    """Runs Python with this command, its output in a file; how it ended."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s"
        finally:
            _end(process)
    return "done" if code == 0 else f"ended with exit code {code}: see {log.name}"


def _end(process: subprocess.Popen):
    """Ends a process and those that it started; first it may say what it has."""
    for number, wait_s in ((signal.SIGINT, GRACE_S), (signal.SIGKILL, GRACE_S)):
        try:
            os.killpg(process.pid, number)
            process.wait(wait_s)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def advice(out: Path, kind: str, tuned: bool) -> Iterator[str]:
    """What to commit, and how."""
    records = [path for path in sorted((out / "kernels").glob("*.json")) if _is_sound(path)]
    current = [path for path in records if _is_current(path)]
    if not records:
        yield f"No kernel has a verdict: see {out}/check.log. There is nothing to commit."
        return
    if tuned and not current:
        yield (
            f"The new tiles were not checked. Leave them out (git checkout {TILES}), or check them "
            f"by {proof.COMMAND}."
        )
        current, tuned = records, False
    yield f"To make what is right on {kind} a default there, in the checkout:"
    for path in current:
        yield f"  cp {path} {PACKAGED}/  # {_count(path)}"
    if tuned:
        yield f"  cp {out}/configs.py {TILES}"
    yield f"  git add {PACKAGED} {TILES} {out}/*.json"
    yield f'  git commit -m "Kernels checked and timed on {kind}"'


def _is_sound(path: Path) -> bool:
    try:
        return bool(proof.read_record(path))
    except ValueError:
        return False


def _is_current(path: Path) -> bool:
    return proof.read_record(path)[0].get("kernels") == proof.source_digest()


def _count(path: Path) -> str:
    verdicts = proof.read_record(path)[1].values()
    return f"{sum(reason is None for reason in verdicts)} of {len(verdicts)} kernels are right"


def _slug(kind: str) -> str:
    return re.sub(r"[^0-9a-z]+", "-", kind.lower()).strip("-")


# ------------------------------------------------------------------ the stage of the check


def checked(seconds: float):
    """Checks the kernels, and writes the record after each one.

    Compiled kernels are kept, so that the second check compiles only those with new tiles.
    """
    if (folder := cache_folder()) is not None:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / PROGRAMS)
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    limits = check.Limits(start=60, compile=90, run=15, total=seconds)
    report = check.check(print, limits=limits, save=check.keep)
    for kernel, reason in report.verdicts.items():
        print(f"{kernel}: {reason or 'right'}")
    print(check.summary(report))


if __name__ == "__main__":
    checked(float(sys.argv[1]))
