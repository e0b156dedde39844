"""Does a run that is killed go on as if nothing had happened?

    PYTHONPATH=. python -m benchmarks.resume --kills 100

trains a small network once from start to end, and once killed by SIGKILL so many times, each at a
random moment: inside a step, or while it saves. The losses must be the same, bit for bit.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.progress import track

STEPS = 120
WAIT_S = 120  # for a child to make a step


class Points:
    """Points of the plane and the sign of their product."""

    def batch(self, step: int):
        x = np.random.default_rng(step).standard_normal((8, 2)).astype(np.float32)
        return x, (x[:, 0] * x[:, 1] > 0).astype(np.int32)

    def validation_batches(self, count: int | None = None):
        return (self.batch(10_000 + i) for i in range(count or 2))

    def describe(self):
        return {"kind": "points"}


def train(run: Path, steps: int):
    """The training of a child process: from the last checkpoint, where there is one."""
    import jax

    from jaxflow import models, training

    model = models.ResidualNetwork(2, 2, 4, 2, width=8, key=jax.random.key(0))
    fitted = training.fit(
        model,
        Points(),
        steps=steps,
        run=run,
        resume=training.latest(run / "checkpoints") is not None,
        checkpoint_every=2,
        evaluate_every=steps,
        log_every=1,
        progress=False,
    )
    print(fitted.reason)


def start(run: Path, cache: Path, steps: int) -> subprocess.Popen:
    """A child that trains; `cache` spares it the compilation."""
    options = {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    code = f"from benchmarks.resume import *; train(Path({str(run)!r}), {steps})"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent.parent,
        env=os.environ | options,
        stdout=subprocess.PIPE,
        text=True,
    )


def logged(run: Path) -> int:
    """The number of steps that a run has logged."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_step(child: subprocess.Popen, run: Path):
    """Waits until a child has made a step of its own, or has ended."""
    least, deadline = logged(run), time.monotonic() + WAIT_S
    # A child that resumes forgets the steps after its checkpoint first.
    while logged(run) <= (least := min(least, logged(run))) and child.poll() is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"no step was made in {WAIT_S} s.")
        time.sleep(0.002)


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def compare(
    folder: Path, kills: int, steps: int, longest_s: float = 0.7
) -> tuple[list[float], list[float], int]:
    """Losses of the run that nothing disturbed and of the killed one, and its completed kills, each
    within `longest_s` of a first step."""
    rng, cache, straight, killed = random.Random(0), folder / "cache", folder / "a", folder / "b"
    undisturbed = start(straight, cache, steps)
    if undisturbed.communicate()[0].strip() != "done":
        raise RuntimeError("the undisturbed run did not end.")
    count = 0
    for _ in track(range(kills), "killing", disable=not sys.stdout.isatty()):
        child = start(killed, cache, steps)
        wait_for_step(child, killed)
        time.sleep(rng.uniform(0, longest_s))
        count += child.poll() is None
        child.kill()
        child.communicate()
    start(killed, cache, steps).communicate()
    return losses(straight), losses(killed), count


def main(kills: Annotated[int, typer.Option(help="How often the run is killed.")] = 100):
    """Kills a training run again and again, and compares its losses."""
    with tempfile.TemporaryDirectory() as folder:
        # Long enough that the last kill still finds it at work.
        whole, killed, count = compare(Path(folder), kills, steps=20 * kills)
    print(f"{count} kills during {len(whole)} steps: losses equal: {whole == killed}")
    raise typer.Exit(0 if whole == killed else 1)


if __name__ == "__main__":
    typer.run(main)
