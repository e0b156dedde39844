"""`jaxflow train lm|image|resnet`: a model whose depth is time, trained through its flow.

The run folder holds config.json (all that repeats the run), metrics.jsonl, loss.png and
checkpoints/. Without matplotlib there is no loss.png, and without orbax-checkpoint no checkpoints/.
"""

import contextlib
import signal
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import typer

from .. import __version__, models, observables, training, viz
from .._folder import CONFIG, claim, read_settings
from .._memory import check_fits
from ..training import Fitted
from .choices import Block
from .console import say, table
from .device import prepare
from .learning import (
    KIND,
    AbstractTraining,
    AbstractTransformer,
    ImageTraining,
    LanguageTraining,
    ResidualTraining,
    task_of,
)
from .optional import available, figures
from .settings import counts, to_json
from .simulate import write_figure

PICTURE = "loss.png"
LOST = "checkpoints: the run cannot be resumed, and its model is lost when it ends"
COPIES = 8  # of the parameters: gradients, moments, updates, the best ones
BLOCK = 2**17  # bytes that a block costs, however small


def train(s: AbstractTraining):
    """Trains the model of the settings, or goes on."""
    drawn = available(figures, PICTURE)  # now, not after the training
    if s.resume is not None:
        training.checkpoints.require()
    kept = available(training.checkpoints.require, LOST)
    training.join()  # if the environment names other processes, which `fit` wants devices of
    prepare()
    double = bool(jnp.result_type(float) == jnp.float64)
    if s.resume is not None:  # in the precision that it began in
        double = read_settings(s.resume / CONFIG, unchanged=True).get("double", double)
    with jax.enable_x64(double):
        data = read_data(s)
        described = {
            "settings": {"task": task_of(type(s))} | to_json(s),
            "model": _model_config(s, data),
            "double": double,
            "jaxflow": __version__,
        }
        model = models.build(described["model"])
        with _folder(s) as run:
            start = time.perf_counter()
            fitted = _fit(s, run, model, data, described, kept)
            if fitted.reason in ("SIGINT", "SIGTERM"):
                next_ = f"--resume {run} goes on" if kept else "it cannot go on"
                say(f"{fitted.reason} after {fitted.step} steps: {next_}.")
                raise typer.Exit(128 + signal.Signals[fitted.reason])
            if not training.is_first():
                return
            if drawn:
                curve = viz.training_curve(fitted.history).get_figure(root=True)
                write_figure(run / PICTURE, curve)
        _summarise(run, fitted, data, time.perf_counter() - start)


def _folder(s: AbstractTraining) -> contextlib.AbstractContextManager[Path]:
    """The folder of the run; of several processes the first one holds it."""
    if training.is_first():
        return claim(s.resume or s.out, KIND, going_on=s.resume is not None)
    return contextlib.nullcontext(s.resume or s.out or Path("runs"))


def read_data(s: AbstractTraining, tokenizer: Any = None) -> training.Text | training.Images:
    """The data of a training, from its settings and, once it has one, its tokenizer."""
    if isinstance(s, LanguageTraining):
        new = {
            "bytes": training.Bytes(),
            "chars": training.Chars(),
            "bpe": training.BPE(s.vocabulary),
        }
        named = s.tokenizer and training.TokenizerFile.read(s.tokenizer)
        return training.text_data(
            s.text,
            tokenizer=tokenizer or named or new[s.tokens],
            context=s.context,
            batch_size=s.batch,
            seed=s.seed,
            cache=s.cache,
        )
    assert isinstance(s, ImageTraining | ResidualTraining)
    return training.image_data(s.images, labels=s.labels, batch_size=s.batch, seed=s.seed)


# ------------------------------------------------------------------ the model


def _model_config(s: AbstractTraining, data: Any) -> dict[str, Any]:
    """What `models.build` takes; MemoryError where it would not fit."""
    steps = None if s.tolerance else s.solver_steps or s.layers
    config: dict[str, Any] = {
        "dim": s.dim,
        "layers": s.layers,
        "curve": s.curve.value,
        "depth": {
            "t1": float(s.layers) if s.t1 is None else s.t1,
            "steps": steps,
            "tolerance": s.tolerance,
            "solver": s.solver.value,
        },
        "seed": s.seed,
    }
    if isinstance(s, ResidualTraining):
        inputs = int(np.prod(data.shape))
        own = {"model": "ResidualNetwork", "inputs": inputs, "outputs": data.classes}
        _check_size(s, data, inputs + data.classes, 2 * s.dim * s.width, 1)
        return own | config | {"width": s.width}
    assert isinstance(s, AbstractTransformer)
    config |= {
        "heads": s.heads,
        "width": s.width,
        "placement": s.placement.value,
        "dtype": "bfloat16" if s.bf16 else None,
    }
    block = 4 * s.dim**2 + 2 * s.dim * (4 * s.dim if s.width is None else s.width)
    if isinstance(s, LanguageTraining):
        _check_size(s, data, data.vocab_size + s.context, block, s.context)
        own = {"model": "LanguageModel", "vocab_size": data.vocab_size, "context": s.context}
        own |= {"normalised": True} if s.normalised else {}
        own |= {"tied": False} if s.untied else {}
        if s.block is None:
            return own | {"rotary": s.rotary, "bias": s.bias} | config
        config = {k: v for k, v in config.items() if k not in ("width", "placement")}
        named = {"block": {"name": s.block.value} | s.block_arguments()}
        return own | config | named | ({"norm": "rms"} if s.block is Block.llama else {})
    assert isinstance(s, ImageTraining)
    height, width, channels = data.shape
    tokens = max(1, height // s.patch) * max(1, width // s.patch)
    _check_size(s, data, s.patch**2 * channels + tokens + data.classes, block, tokens)
    own = {"model": "ImageClassifier", "shape": list(data.shape), "classes": data.classes}
    return own | {"patch": s.patch, "class_token": s.class_token} | config


def _check_size(s: AbstractTraining, data: Any, ends: int, block: int, tokens: int):
    """Raises MemoryError where parameters, or the states of a batch, do not fit."""
    parameters = s.layers * block + ends * s.dim
    inputs = s.accumulate * s.batch * max(tokens, int(np.prod(getattr(data, "shape", 1))))
    batch = s.batch * tokens * (24 * s.dim + 3 * getattr(data, "vocab_size", 0))
    check_fits(
        4 * (COPIES * parameters + batch + inputs) + BLOCK * s.layers,
        f"a model of {parameters:,} parameters, with batches of {s.batch} x {tokens} tokens,",
        "Take smaller --dim, --width, --layers, --batch, --context or --accumulate.",
    )


def _fit(
    s: AbstractTraining, run: Path, model, data, described: dict[str, Any], kept: bool
) -> Fitted:
    costs = {"kinetic": (s.kinetic, observables.KineticEnergy)}
    if isinstance(s, AbstractTransformer):
        costs |= {"entropy": (s.entropy, observables.AttentionEntropy)}
    drawn = s.elastic and training.Elastic(counts(s.elastic), s.jitter, after=s.elastic_after)
    optimiser = training.adamw(s.steps, learning_rate=s.learning_rate, weight_decay=s.weight_decay)
    asked = {name: cost for name, cost in costs.items() if cost[0]}
    return training.fit(
        model,
        data,
        steps=s.steps,
        optimiser=optimiser,
        loss=training.FlowLoss(training.cross_entropy, asked, consistency=s.consistency),
        depths=drawn or None,
        key=jax.random.key(s.seed),
        accumulate=s.accumulate,
        devices=training.FullySharded(s.devices) if s.sharded else s.devices,
        evaluate_every=s.evaluate_every,
        evaluation_batches=s.evaluation_batches,
        patience=s.patience,
        budget=s.budget,
        run=run,
        resume=s.resume is not None,
        checkpoint_every=s.checkpoint_every,
        keep=2 if kept else None,
        config=described,
        callbacks=[training.tensorboard(run / "tensorboard")] if s.tensorboard else [],
        minutes=s.minutes,
        evaluate_on_interrupt=s.evaluate_on_interrupt,
        profile=run / "profile" if s.profile else None,
    )


def _summarise(run: Path, fitted: Fitted, data, seconds: float):
    rows: list[tuple[str, Any]] = [
        ("ended", f"{fitted.reason}, after {fitted.step} steps"),
        ("validation loss", f"{fitted.validation_loss:.4f}"),
    ]
    if isinstance(data, training.Images):
        right = training.accuracy(fitted.best, data.validation_batches())
        rows.append(("validation accuracy", f"{right:.2%}"))
    rows += [("wall time", f"{seconds:.0f} s, compilation included"), ("run folder", run)]
    table("training", rows)
    if isinstance(data, training.Text):
        prompt = np.asarray(data.training[:8], np.int32)
        # Beyond the context each token takes a flow of all, and another program.
        length = max(1, fitted.best.context - len(prompt))
        text = fitted.best.generate(prompt, length, temperature=0.8, key=jax.random.key(0))
        say("\na sample\n")
        say(data.tokenizer.decode(text))
