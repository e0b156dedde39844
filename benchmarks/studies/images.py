"""Images of digits by few parameters, and what a transport cost does for them.

    L = cross-entropy + weight int_0^T sum_i |x_i'|^2 / n dt       arXiv 2505.13499, 2002.02798

`accuracy` and `loss` are those of the test images after the last step, which chose nothing;
`noisy` is the accuracy with normal noise of standard deviation 0.5 added to each pixel, `training`
that on the training images, and `transport` the integral of the cost in the last logged step.

digits     MNIST's 10,000 test digits, 8,000 to train and 2,000 to test on: one attention-only block
           of 18k parameters, taken four times, with transport cost and without, beside one plain
           block of 93k. arXiv 2505.13499, table 7, publishes 97.1 % against 93.0 % for these
           numbers of parameters, of 60,000 training images.
transport  scikit-learn's digits, 150 to train on, drawn anew for each seed, and the 1,437 others of
           its validation part: the weight of the transport cost against the accuracy.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np

from jaxflow import models, observables, training

from .study import Case, Place, Stopped, Study

NOISE = 0.5
WEIGHTS = (0.0, 0.001, 0.01, 0.1, 1.0)
TRAINING = {"batch": 64, "learning_rate": 5e-3, "kinetic": 0.0, "images": None}
ATTENTION = {
    "model": "ImageClassifier", "dim": 58, "heads": 2, "layers": 1, "width": 0, "patch": 7,
    "curve": "shared", "depth": {"t1": 4.0, "steps": 4},
}  # fmt: skip
PLAIN = {
    "model": "ImageClassifier", "dim": 84, "heads": 4, "layers": 1, "patch": 7,
    "depth": {"t1": 1.0, "steps": 1},
}  # fmt: skip
SMALL = {
    "model": "ImageClassifier", "dim": 32, "heads": 4, "layers": 1, "patch": 2,
    "curve": "shared", "depth": {"t1": 4.0, "steps": 4},
}  # fmt: skip


def digits(images: Path, weight: float = 0.01, **smaller: Any) -> Study:
    """Of a file of MNIST's format or .npz, one of five images of which is to test on."""
    data = training.image_data(images, validation=0.2, batch_size=TRAINING["batch"])
    trained = TRAINING | {"steps": 1500} | smaller
    cases = [
        _case("attention, transport", ATTENTION, trained | {"kinetic": weight}, data),
        _case("attention", ATTENTION, trained, data),
        _case("plain block", PLAIN, trained, data),
    ]
    question = "how many digits does one small attention-only block with transport cost tell?"
    return Study("digits", question, cases, lambda *given: measure(data, *given))


def transport(**smaller: Any) -> Study:
    """Of scikit-learn's digits."""
    data = training.image_data(validation=0.8, batch_size=TRAINING["batch"])
    trained = TRAINING | {"steps": 400, "batch": 50, "images": 150} | smaller
    cases = [
        _case(f"weight {weight:g}", SMALL, trained | {"kinetic": weight}, data)
        for weight in WEIGHTS
    ]
    question = "does a transport cost help a model that has seen 150 images?"
    return Study("transport", question, cases, lambda *given: measure(data, *given))


def _case(name: str, model: dict, trained: dict, data: training.Images) -> Case:
    described = model | {"shape": list(data.shape), "classes": data.classes}
    setting = {"model": described, "training": trained, "images": data.sha256, "noise": NOISE}
    built = eqx.filter_eval_shape(lambda: models.build(described))
    batch = np.zeros((trained["batch"], *data.shape), np.float32)
    steps = model["depth"]["steps"] * (2 if trained["kinetic"] else 1)
    cost = training.operations(built, batch, steps=steps)
    assert cost is not None
    return Case(name, setting, cost * trained["steps"])


def measure(data: training.Images, case: Case, seed: int, place: Place) -> dict[str, Any]:
    """Trains the model of a case, or goes on, and counts what it tells right."""
    trained = case.setting["training"]
    data = _drawn(
        dataclasses.replace(data, batch_size=trained["batch"], seed=seed), trained["images"]
    )
    model = models.build(case.setting["model"] | {"seed": seed})
    costs = {"transport": (trained["kinetic"], observables.KineticEnergy)}
    fitted = training.fit(
        model,
        data,
        steps=trained["steps"],
        optimiser=training.adamw(trained["steps"], learning_rate=trained["learning_rate"]),
        loss=training.FlowLoss(training.cross_entropy, costs),
        key=jax.random.key(seed),
        evaluate_every=trained["steps"],
        checkpoint_every=-(-trained["steps"] // 4),
        run=place.folder,
        resume=(place.folder / "checkpoints").is_dir(),
        config={"case": case.name, "seed": seed} | case.setting,
        minutes=place.minutes,
        log_every=-(-trained["steps"] // 4),
    )
    if fitted.reason != "done":
        raise Stopped(f"{fitted.reason} after {fitted.step} steps.")
    right = lambda batches: training.accuracy(fitted.model, batches)
    steps = range(-(-len(data.images) // trained["batch"]))
    return {
        "parameters": sum(a.size for a in jax.tree.leaves(eqx.filter(model, eqx.is_array))),
        "flops": case.flops,
        "seconds": fitted.history[-1]["seconds"],
        "accuracy": right(data.validation_batches()),
        "noisy": right(_noisy(data.validation_batches(), seed)),
        "training": right(data.batch(step) for step in steps),
        "loss": fitted.history[-1]["validation_outputs_loss"],
        "transport": fitted.history[-1]["transport"],
    }


def _drawn(data: training.Images, count: int | None) -> training.Images:
    """So many of the training images, by the seed of the data."""
    if count is None:
        return data
    kept = np.random.default_rng(data.seed).permutation(len(data.images))[:count]
    return dataclasses.replace(
        data,
        images=data.images[kept],
        labels=data.labels[kept],
        sha256=f"{data.sha256}, {count} by {data.seed}",
    )


def _noisy(batches: Iterable[tuple[Any, Any]], seed: int) -> Iterator[tuple[Any, Any]]:
    rng = np.random.default_rng(seed)
    for images, labels in batches:
        noise = NOISE * rng.standard_normal(images.shape, np.float32)
        yield images + noise, labels
