"""What does bfloat16 cost, and save, in training?

    PYTHONPATH=. python -m benchmarks.precision --steps 500

trains a language model twice from the same parameters on the same batches, its attention and
feed-forward layers in float32 and in bfloat16 (parameters, residual stream and loss are float32 in
both), a step of each in turn. Tokens a second are those of the median step; the losses are means
over the last tenth of the steps, and over validation batches at the end. A CPU has no arithmetic in
bfloat16 and computes in float32 between roundings: its times say nothing of a GPU's.
"""

import statistics
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import typer

import jaxflow as jf
from jaxflow import training
from jaxflow.training.step import State, Step, update

from .device import provenance

DTYPES = "float32", "bfloat16"


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


def begin(dtype: str, sizes: dict[str, Any], steps: int) -> Run:
    model = jf.models.LanguageModel(256, **sizes, dtype=dtype, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    optimiser = training.adamw(steps)
    loss = training.FlowLoss(training.cross_entropy)
    state = State(params, optimiser.init(params), jax.random.key(0))
    return Run(Step(static, optimiser, loss), state, [], [])


def main(
    steps: int = 500,
    layers: int = 2,
    dim: int = 64,
    heads: int = 4,
    context: int = 64,
    batch: int = 16,
    text: Annotated[Path | None, typer.Option(help="UTF-8 (Python's own manual).")] = None,
):
    """Tokens a second and losses of both, in a table."""
    data = training.text_data(text, context=context, batch_size=batch)
    sizes = {"dim": dim, "heads": heads, "layers": layers, "context": context}
    runs = {dtype: begin(dtype, sizes, steps) for dtype in DTYPES}
    for number in range(steps):
        inputs, targets = (jnp.asarray(a)[None] for a in data.batch(number))
        for dtype in DTYPES[:: -1 if number % 2 else 1]:
            runs[dtype] = runs[dtype].after((inputs, targets), number)
    print(provenance())
    print(f"\n{steps} steps, {layers} layers, dim {dim}, {batch} x {context} bytes\n")
    print("| dtype | tokens a second | last losses | validation loss |\n|---|---|---|---|")
    for dtype, run in runs.items():
        rate = batch * context / statistics.median(run.seconds[1:])  # the first one compiles
        last = statistics.mean(run.losses[-max(1, steps // 10) :])
        model = run.step.model(run.state)
        validated = training.evaluate(model, data.validation_batches(20))["loss"]
        print(f"| {dtype} | {rate:,.0f} | {last:.4f} | {validated:.4f} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
