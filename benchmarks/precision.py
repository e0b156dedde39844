"""The suite `precision`: what does bfloat16 cost, and save, in training?

A language model is trained twice from the same parameters on the same batches of Python's own
manual, its attention and feed-forward layers in float32 and in bfloat16 (parameters, residual
stream and loss are float32 in both), a step of each in turn. `last_loss` is the mean over the last
tenth of the steps, `validation_loss` is over 20 batches at the end. A CPU has no arithmetic in
bfloat16 and computes in float32 between roundings: its times say nothing of a GPU's.
"""

import statistics
import time
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import jaxflow as jf
from jaxflow import training
from jaxflow.training.step import State, Step, update

from . import machine
from .pace import Watch
from .timing import Options, summary

BUDGET_S = {"quick": 30, "full": 25}
DTYPES = "float32", "bfloat16"


class Case(NamedTuple):
    steps: int
    batch: int = 16
    context: int = 64
    dim: int = 64
    heads: int = 4
    layers: int = 2

    @property
    def name(self) -> str:
        return f"precision-{self.batch}-{self.context}-{self.dim} {self.steps} steps"


def cases(quick: bool) -> list[Case]:
    return [Case(40, 4, 32, 32, 2, 1)] if quick else [Case(500)]


class Run(NamedTuple):
    """A training underway: the step, its state, and what each step took and lost."""

    step: Step
    state: State
    seconds: list[float]
    losses: list[float]

    def after(self, batch, number: int) -> "Run":
        given = self.step, batch, np.int32(number), jnp.array(True)
        begin = time.perf_counter()
        state, _, metrics = jax.block_until_ready(update(given, self.state))
        self.seconds.append(time.perf_counter() - begin)
        self.losses.append(float(metrics["loss"]))
        return self._replace(state=state)


def begin(case: Case, dtype: str) -> Run:
    sizes = case.dim, case.heads, case.layers, case.context
    model = jf.models.LanguageModel(256, *sizes, dtype=dtype, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    optimiser = training.adamw(case.steps)
    loss = training.FlowLoss(training.cross_entropy)
    state = State(params, optimiser.init(params), jax.random.key(0))
    return Run(Step(static, optimiser, loss), state, [], [])


def run(options: Options, watch: Watch) -> dict:
    chosen = [case for case in cases(options.quick) if case.name.startswith(options.only)]
    for case in watch.each(chosen, lambda case: case.name):
        watch.rows += contest(case)
    return {"rows": watch.rows}


def contest(case: Case) -> list[dict]:
    data = training.text_data(context=case.context, batch_size=case.batch)
    runs, load = {dtype: begin(case, dtype) for dtype in DTYPES}, machine.load()
    for number in range(case.steps):
        batch = tuple(jnp.asarray(a)[None] for a in data.batch(number))
        for dtype in DTYPES[:: -1 if number % 2 else 1]:
            runs[dtype] = runs[dtype].after(batch, number)
    return [_row(case, dtype, run, data) | {"load": load} for dtype, run in runs.items()]


def _row(case: Case, dtype: str, run: Run, data: training.Text) -> dict[str, Any]:
    times = summary(run.seconds[1:])
    model = run.step.model(run.state)
    return (
        {"shape": case.name, "rival": f"jaxflow {dtype}"}
        | times
        | {
            "compile_s": run.seconds[0],
            "tokens_per_s": 1e3 * case.batch * case.context / times["ms"],
            "last_loss": statistics.mean(run.losses[-max(1, case.steps // 10) :]),
            "validation_loss": training.evaluate(model, data.validation_batches(20))["loss"],
        }
    )
