"""Characters of a text in nanoGPT's setting for a CPU, whose published loss is 1.88.

    4 blocks, 4 heads, d = 128, context 64, 2000 steps of 12 windows     nanoGPT, README

Each case is a model from `jaxflow.models.build` and its training by AdamW (100 steps of warm-up, a
cosine down to a tenth, weight decay 0.1, b2 0.99, gradients clipped at 1). The loss is that of the
whole validation part, the last tenth of the text, in windows side by side; `best` is the least of
four evaluations, `last` the one after the last step. `losses` are those at other numbers of steps,
`exits` those at 12 steps of which each token takes as many as it needs: until its distribution
changes by no more than the tolerance, as in `generate(exit=DistributionExit(tolerance))`;
`exit_evaluations` are the evaluations a token of these.

    plain           GPT-2's blocks, one Euler step of Lie-Trotter splitting a block
    continuous n    4 Legendre coefficients, n steps on the same [0, 4]
    elastic         the same curve, 2, 3, 4, 6, 8 or 12 steps, drawn for each step of training
    elastic, ...    the same, drawn in the last half or quarter of the training alone
    elastic, 6000   drawn for 6000 steps: half of what training at each of the six takes
    heun n          tokens that are normalised before they flow, and what each block adds to them
                    too ("peri"); n unsplit steps of Heun's method
    heun, elastic   the same, after a quarter at 8 drawn among those numbers, and 4 and 6 steps of
                    Tsit5, for 2000 steps or 6000; `adaptive` are its losses by adaptive steps
    shared, ...     one block at all depths: d = 128 at equal compute, d = 256 at equal parameters
    llama, gpt2     Llama's and GPT-2's blocks at a learning rate of 0.003
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np

from jaxflow import models, training

from .study import Case, Place, Stopped, Study

QUESTION = "which loss does a model of characters reach in nanoGPT's setting for a CPU (1.88)?"
DEPTHS = (2, 3, 4, 6, 8, 12)
MODEL = {"model": "LanguageModel", "dim": 128, "heads": 4, "layers": 4, "context": 64}
TRAINING = {"steps": 2000, "batch": 12, "learning_rate": 1e-3}
FAST = {"learning_rate": 3e-3}
ADAPTIVE = {
    "Heun 0.1": {"t1": 4.0, "tolerance": 0.1, "solver": "heun"},
    **{f"Tsit5 {at}": {"t1": 4.0, "tolerance": at, "solver": "tsit5"} for at in (0.01, 0.001)},
}


def depth(steps: int, **solver: str) -> dict[str, Any]:
    return {"depth": {"t1": 4.0, "steps": steps} | solver}


def heun(steps: int) -> dict[str, Any]:
    bounded = {"curve": "smooth", "placement": "peri", "normalised": True, "tied": False}
    return depth(steps, solver="heun") | bounded


ANY_SOLVER = {
    "drawn": [*DEPTHS, *(depth(n, solver="tsit5")["depth"] for n in (4, 6))],
    "after": 500,
    "adaptive": ADAPTIVE,
}
# What a case changes of the model, and of the training.
Change = tuple[dict[str, Any], dict[str, Any]]
CASES: dict[str, Change] = {
    "plain": (depth(4), {}),
    "llama, rate 0.003": (depth(4) | {"block": "llama", "norm": "rms"}, FAST),
    "continuous 4": (depth(4) | {"curve": "smooth"}, {}),
    "elastic": (depth(4) | {"curve": "smooth"}, {"drawn": list(DEPTHS)}),
    "elastic, last half": (
        depth(4) | {"curve": "smooth"}, {"drawn": list(DEPTHS), "after": 1000}
    ),
    "elastic, last quarter": (
        depth(4) | {"curve": "smooth"}, {"drawn": list(DEPTHS), "after": 1500}
    ),
    "elastic, 6000": (
        depth(4) | {"curve": "smooth"},
        {"drawn": list(DEPTHS), "steps": 6000, "exits": [0.001, 0.003, 0.01, 0.03, 0.1]},
    ),
    "shared, equal compute": (depth(4) | {"curve": "shared", "layers": 1}, {}),
    "gpt2, rate 0.003": (depth(4), FAST),
    **{
        f"continuous {n}": (depth(n) | {"curve": "smooth"}, {})
        for n in DEPTHS
        if n != 4
    },
    "heun, elastic": (heun(8), ANY_SOLVER),
    "heun, elastic, 6000": (heun(8), ANY_SOLVER | {"steps": 6000, "after": 1500}),
    **{f"heun {n}": (heun(n), {}) for n in DEPTHS},
    "shared, equal parameters": (depth(4) | {"curve": "shared", "layers": 1, "dim": 256}, {}),
}  # fmt: skip


def study(
    text: Path, cases: dict[str, Change] = CASES, depths: Sequence[int] = DEPTHS, **smaller: Any
) -> Study:
    """The study of a text; `smaller` sizes are those of a trial. Smooth curves are evaluated at
    `depths`."""
    sizes = {k: v for k, v in smaller.items() if k in MODEL}
    short = {k: v for k, v in smaller.items() if k not in MODEL}
    about = _data(text, MODEL | sizes, TRAINING | short, 0)
    made = [
        _case(name, MODEL | sizes | model, TRAINING | own | short, about)
        for name, (model, own) in cases.items()
    ]
    return Study("characters", QUESTION, made, lambda *given: measure(text, depths, *given))


def _data(text: Path, model: dict, trained: dict, seed: int) -> training.Text:
    return training.text_data(
        text, tokenizer=training.Chars(), context=model["context"], batch_size=trained["batch"],
        seed=seed,
    )  # fmt: skip


def _case(name: str, model: dict, trained: dict, data: training.Text) -> Case:
    described = model | {"vocab_size": data.vocab_size}
    setting = {"model": described, "training": trained, "text": data.sha256}
    built = eqx.filter_eval_shape(lambda: models.build(described))
    inputs = data.batch(0)[0]
    cost = lambda depth: training.operations(built.with_depth(depth), inputs) or 0.0
    drawn = _depths(built, trained.get("drawn", ()))
    after = trained.get("after", 0) if drawn else trained["steps"]
    others = float(np.mean([cost(depth) for depth in drawn])) if drawn else 0.0
    return Case(name, setting, after * cost(built.depth) + (trained["steps"] - after) * others)


def _depths(model: models.AbstractModel, given: Sequence[int | dict]) -> list[models.Depth]:
    """Numbers of steps, or what `jaxflow.models.depth` takes."""
    steps = model.depth.with_steps
    return [models.depth(**d) if isinstance(d, dict) else steps(d) for d in given]


def measure(
    text: Path, depths: Sequence[int], case: Case, seed: int, place: Place
) -> dict[str, Any]:
    """Trains the model of a case, or goes on, and evaluates it."""
    config, trained = case.setting["model"], case.setting["training"]
    data = _data(text, config, trained, seed)
    model = models.build(config | {"seed": seed})
    drawn = _depths(model, trained.get("drawn", ()))
    elastic = training.Elastic(drawn, evaluate=[], after=trained.get("after", 0)) if drawn else None
    fitted = training.fit(
        model,
        data,
        steps=trained["steps"],
        optimiser=training.adamw(trained["steps"], learning_rate=trained["learning_rate"]),
        key=jax.random.key(seed),
        depths=elastic,
        evaluate_every=-(-trained["steps"] // 4),
        checkpoint_every=-(-trained["steps"] // 20),
        run=place.folder,
        resume=(place.folder / "checkpoints").is_dir(),
        config={"case": case.name, "seed": seed} | case.setting,
        minutes=place.minutes,
        log_every=100,
    )
    if fitted.reason != "done":
        raise Stopped(f"{fitted.reason} after {fitted.step} steps.")
    found = {
        "parameters": sum(a.size for a in jax.tree.leaves(eqx.filter(model, eqx.is_array))),
        "evaluations": fitted.history[-1]["total_evaluations"] / trained["steps"],
        "flops": case.flops,
        "seconds": fitted.history[-1]["seconds"],
        "best": fitted.validation_loss,
        "last": fitted.history[-1]["validation_loss"],
    }
    if config.get("curve") != "smooth":
        return found
    at = lambda depth: training.evaluate(fitted.model.with_depth(depth), data.validation_batches())
    found["losses"] = {str(n): at(model.depth.with_steps(n))["loss"] for n in depths}
    if "adaptive" in trained:
        adaptive = {name: at(models.depth(**d)) for name, d in trained["adaptive"].items()}
        found["adaptive"] = {name: each["loss"] for name, each in adaptive.items()}
        found["adaptive_evaluations"] = {n: each["num_evaluations"] for n, each in adaptive.items()}
    if "exits" in trained:
        finest = fitted.model.with_depth(fitted.model.depth.with_steps(max(depths)))
        exits = {f"{at:g}": _exited(finest, at, data) for at in trained["exits"]}
        found["exits"] = {at: each["loss"] for at, each in exits.items()}
        found["exit_evaluations"] = {at: each["num_evaluations"] for at, each in exits.items()}
    return found


def _exited(model: models.AbstractModel, tolerance: float, data: training.Text) -> dict:
    loss = training.ExitLoss(models.DistributionExit(tolerance))
    return training.evaluate(model, data.validation_batches(), loss)
