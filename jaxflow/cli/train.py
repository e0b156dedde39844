"""`jaxflow train lm|image|resnet`: a model whose depth is time, trained through its flow.

The run folder holds config.json (all that repeats the run), metrics.jsonl, loss.png and
checkpoints/.
"""

import enum
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import jax
import numpy as np
import typer
from rich.table import Table

from .. import __version__, models, observables, training, viz
from ..training import Fitted
from ..viz.style import require
from .console import console

if TYPE_CHECKING:
    from typer import Context
else:
    Context = typer.Context.__base__  # typer hands over an instance of this class

train = typer.Typer(
    help="Train a model whose depth is time.", no_args_is_help=True, rich_markup_mode="markdown"
)

Curve = enum.StrEnum("Curve", list(models.CURVES))
Solver = enum.StrEnum("Solver", list(models.SOLVERS))
Placement = enum.StrEnum("Placement", ["pre", "peri", "post"])
Tokens = enum.StrEnum("Tokens", ["bytes", "chars", "bpe"])

# What a preset does not name keeps the default of the command.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "lm": {
        "default": {},
        "demo": {"layers": 2, "dim": 64, "context": 64, "batch": 16, "steps": 400},
        # nanoGPT's published setting for a CPU.
        "nanogpt-cpu": {
            "tokens": "chars", "layers": 4, "heads": 4, "dim": 128, "context": 64, "batch": 12,
            "steps": 2000,
        },
        "continuous-cpu": {
            "tokens": "chars", "layers": 4, "heads": 4, "dim": 128, "context": 64, "batch": 12,
            "steps": 2000, "curve": "linear", "solver": "euler",
        },
    },
    "image": {
        "default": {},
        # One block with attention alone, the same at every depth.
        "attention": {"curve": "shared", "layers": 1, "t1": 4.0, "solver_steps": 4, "width": 0},
    },
    "resnet": {
        "default": {},
        "neural-ode": {
            "curve": "shared", "layers": 1, "solver": "dopri5", "tolerance": 1e-3,
        },
    },
}  # fmt: skip

# What may differ where a run goes on; the text and the images have to hold the same.
CHANGEABLE = {"steps", "learning_rate", "patience", "budget", "text", "images", "labels"}
CHANGEABLE |= {"evaluation_batches", "checkpoint_every", "cache"}

Preset = Annotated[str, typer.Option(help="Named settings; other flags override them.")]
Layers = Annotated[int, typer.Option(help="Blocks along the depth.")]
Dim = Annotated[int, typer.Option(help="Dimension of a token.")]
Heads = Annotated[int, typer.Option(help="Heads of attention.")]
Width = Annotated[int | None, typer.Option(help="Of the feed-forward layers (4 dim; 0: none).")]
CurveOption = Annotated[Curve, typer.Option(help="How parameters move in time.")]
SolverOption = Annotated[Solver, typer.Option(help="One-step method.")]
SolverSteps = Annotated[int | None, typer.Option(help="Steps of the solver (one a layer).")]
Tolerance = Annotated[float | None, typer.Option(help="Adaptive steps with this tolerance.")]
T1 = Annotated[float | None, typer.Option(help="Depth T (the number of layers).")]
PlacementOption = Annotated[Placement, typer.Option(help="Where tokens are normalised.")]
Batch = Annotated[int, typer.Option(help="Samples a step.")]
Steps = Annotated[int, typer.Option(help="Steps of training.")]
Rate = Annotated[float, typer.Option(help="Largest learning rate of AdamW.")]
Decay = Annotated[float, typer.Option(help="Weight decay of matrices.")]
Kinetic = Annotated[float, typer.Option(help="Weight of the transport cost int |x'|^2 dt.")]
Entropy = Annotated[float, typer.Option(help="Weight of the entropy of attention.")]
Bf16 = Annotated[bool, typer.Option(help="Attention and feed-forward in bfloat16.")]
Accumulate = Annotated[int, typer.Option(help="Batches a step.")]
Every = Annotated[int, typer.Option(help="Steps between evaluations.")]
EvaluationBatches = Annotated[int | None, typer.Option(help="Of an evaluation (default: all).")]
CheckpointEvery = Annotated[
    int | None, typer.Option(help="Steps between checkpoints (default: between evaluations).")
]
Budget = Annotated[int | None, typer.Option(help="Evaluations of the field to stop after.")]
Patience = Annotated[int | None, typer.Option(help="Evaluations without progress to stop after.")]
Seed = Annotated[int, typer.Option(help="Seed of the parameters and batches.")]
Out = Annotated[Path | None, typer.Option(help="Run folder (default: runs/DATE-TIME).")]
Resume = Annotated[
    Path | None,
    typer.Option(help="Go on with this run and its settings; --steps and few others may change."),
]


@train.command()
def lm(
    ctx: Context,
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 file or folder (default: Python's own manual).")
    ] = None,
    tokens: Annotated[Tokens, typer.Option(help="Bytes, characters, or byte pairs.")] = Tokens(
        "bytes"
    ),
    vocabulary: Annotated[int, typer.Option(help="Number of byte-pair tokens.")] = 1024,
    context: Annotated[int, typer.Option(help="Tokens the model sees.")] = 128,
    layers: Layers = 4,
    dim: Dim = 128,
    heads: Heads = 4,
    width: Width = None,
    curve: CurveOption = Curve("layers"),
    solver: SolverOption = Solver("lie-trotter"),
    solver_steps: SolverSteps = None,
    tolerance: Tolerance = None,
    t1: T1 = None,
    placement: PlacementOption = Placement("pre"),
    rotary: Annotated[bool, typer.Option(help="Rotary positions, not learned ones.")] = False,
    batch: Batch = 16,
    steps: Steps = 2000,
    learning_rate: Rate = 1e-3,
    weight_decay: Decay = 0.1,
    kinetic: Kinetic = 0.0,
    entropy: Entropy = 0.0,
    bf16: Bf16 = False,
    accumulate: Accumulate = 1,
    cache: Annotated[
        Path | None, typer.Option(help="Folder that keeps the tokens for the next run.")
    ] = None,
    evaluate_every: Every = 250,
    evaluation_batches: EvaluationBatches = None,
    checkpoint_every: CheckpointEvery = None,
    patience: Patience = None,
    budget: Budget = None,
    seed: Seed = 0,
    preset: Preset = "default",
    out: Out = None,
    resume: Resume = None,
):
    """Train a language model on a text.

    Examples:

    `jaxflow train lm --preset demo`

    `jaxflow train lm --text shakespeare.txt --preset nanogpt-cpu --out runs/shakespeare`

    `jaxflow train lm --curve smooth --solver heun --solver-steps 4`

    `jaxflow train lm --resume runs/shakespeare`
    """
    run, config = _settings(ctx, "lm")
    data = read_text(config)
    shape = {
        "model": "LanguageModel",
        "vocab_size": data.vocab_size,
        "context": config["context"],
        "rotary": config["rotary"],
    }
    model_config = shape | _blocks(config)
    _fit(run, config, model_config, data, resume is not None)


@train.command()
def image(
    ctx: Context,
    images: Annotated[
        Path | None, typer.Option(help=".npz or idx(.gz) file (default: digits of scikit-learn).")
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="idx(.gz) file of their classes.")] = None,
    patch: Annotated[int, typer.Option(help="Side of a patch.")] = 2,
    class_token: Annotated[bool, typer.Option(help="Read out from a token of its own.")] = False,
    layers: Layers = 2,
    dim: Dim = 64,
    heads: Heads = 4,
    width: Width = None,
    curve: CurveOption = Curve("layers"),
    solver: SolverOption = Solver("lie-trotter"),
    solver_steps: SolverSteps = None,
    tolerance: Tolerance = None,
    t1: T1 = None,
    placement: PlacementOption = Placement("pre"),
    batch: Batch = 64,
    steps: Steps = 1000,
    learning_rate: Rate = 1e-3,
    weight_decay: Decay = 0.1,
    kinetic: Kinetic = 0.0,
    entropy: Entropy = 0.0,
    bf16: Bf16 = False,
    accumulate: Accumulate = 1,
    evaluate_every: Every = 100,
    evaluation_batches: EvaluationBatches = None,
    checkpoint_every: CheckpointEvery = None,
    patience: Patience = None,
    budget: Budget = None,
    seed: Seed = 0,
    preset: Preset = "default",
    out: Out = None,
    resume: Resume = None,
):
    """Train a classifier of images on their patches.

    Examples:

    `jaxflow train image --preset attention`

    `jaxflow train image --images t10k-images.gz --labels t10k-labels.gz --patch 7 --steps 500`
    """
    run, config = _settings(ctx, "image")
    data = read_images(config)
    shape = {
        "model": "ImageClassifier",
        "shape": list(data.shape),
        "classes": data.classes,
        "patch": config["patch"],
        "class_token": config["class_token"],
    }
    _fit(run, config, shape | _blocks(config), data, resume is not None)


@train.command()
def resnet(
    ctx: Context,
    images: Annotated[
        Path | None, typer.Option(help=".npz or idx(.gz) file (default: digits of scikit-learn).")
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="idx(.gz) file of their classes.")] = None,
    layers: Layers = 4,
    dim: Dim = 64,
    width: Annotated[int, typer.Option(help="Of the hidden layer of a block.")] = 128,
    curve: CurveOption = Curve("layers"),
    solver: SolverOption = Solver("euler"),
    solver_steps: SolverSteps = None,
    tolerance: Tolerance = None,
    t1: T1 = 1.0,
    batch: Batch = 64,
    steps: Steps = 1000,
    learning_rate: Rate = 1e-3,
    weight_decay: Decay = 0.1,
    kinetic: Kinetic = 0.0,
    accumulate: Accumulate = 1,
    evaluate_every: Every = 100,
    evaluation_batches: EvaluationBatches = None,
    checkpoint_every: CheckpointEvery = None,
    patience: Patience = None,
    budget: Budget = None,
    seed: Seed = 0,
    preset: Preset = "default",
    out: Out = None,
    resume: Resume = None,
):
    """Train a residual network, or the neural ODE of the same block.

    Examples:

    `jaxflow train resnet`

    `jaxflow train resnet --preset neural-ode --kinetic 0.01`
    """
    run, config = _settings(ctx, "resnet")
    data = read_images(config)
    kept = ("dim", "layers", "width", "curve", "depth", "seed")
    model_config = {
        "model": "ResidualNetwork",
        "inputs": int(np.prod(data.shape)),
        "outputs": data.classes,
    } | {name: value for name, value in _blocks(config).items() if name in kept}
    _fit(run, config, model_config, data, resume is not None)


# ------------------------------------------------------------------ settings


def _settings(ctx: Context, task: str) -> tuple[Path, dict[str, Any]]:
    """The run folder and its settings: of the flags and the preset, or of the run to go on with."""
    given = {k: _json(v) for k, v in ctx.params.items() if k not in ("out", "resume")}
    sources = {k: ctx.get_parameter_source(k) for k in given}
    from_user = {k for k, source in sources.items() if source and source.name == "COMMANDLINE"}
    if (run := ctx.params["resume"]) is not None:
        path = run / "config.json"
        if not path.is_file():
            raise typer.BadParameter(f"{run} is no run: it has no config.json.")
        config = json.loads(path.read_text())["settings"]
        if config["task"] != task:
            raise typer.BadParameter(f"{run} is a run of `jaxflow train {config['task']}`.")
        fixed = sorted(k for k in from_user - CHANGEABLE if given[k] != config.get(k))
        if fixed or ctx.params["out"]:
            flag = f"--{(fixed or ['out'])[0].replace('_', '-')}"
            raise typer.BadParameter(
                f"a run goes on with its own settings, so {flag} must stay as it was; start "
                f"another one for it. These may change: {', '.join(sorted(CHANGEABLE))}."
            )
        return run, config | {k: given[k] for k in from_user & CHANGEABLE}
    if given["preset"] not in PRESETS[task]:
        raise typer.BadParameter(
            f"preset must be one of {', '.join(PRESETS[task])}; got {given['preset']!r}."
        )
    preset = {k: v for k, v in PRESETS[task][given["preset"]].items() if k not in from_user}
    if {"solver_steps", "tolerance"} <= from_user:
        raise typer.BadParameter("give one of --solver-steps and --tolerance.")
    if "solver_steps" in from_user:
        preset.pop("tolerance", None)
    run = ctx.params["out"] or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    return run, {"task": task} | given | preset


def _json(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value.resolve())
    return value.value if isinstance(value, enum.Enum) else value


def read_text(config: dict[str, Any], tokenizer: Any = None) -> training.Text:
    """The data of a run of `train lm`, from its settings and, once it has one, its tokenizer."""
    new = {
        "bytes": training.Bytes(),
        "chars": training.Chars(),
        "bpe": training.BPE(config["vocabulary"]),
    }
    return training.text_data(
        config["text"],
        tokenizer=tokenizer or new[config["tokens"]],
        context=config["context"],
        batch_size=config["batch"],
        seed=config["seed"],
        cache=config.get("cache"),
    )


def read_images(config: dict[str, Any]) -> training.Images:
    """The data of a run of `train image` or `train resnet`, from its settings."""
    return training.image_data(
        config["images"],
        labels=config["labels"],
        batch_size=config["batch"],
        seed=config["seed"],
    )


def _blocks(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a model's configuration that all models have."""
    t1 = float(config["layers"]) if config["t1"] is None else config["t1"]
    steps = None if config["tolerance"] else config["solver_steps"] or config["layers"]
    return {
        "dim": config["dim"],
        "heads": config.get("heads"),
        "layers": config["layers"],
        "width": config["width"],
        "curve": config["curve"],
        "depth": {
            "t1": t1,
            "steps": steps,
            "tolerance": config["tolerance"],
            "solver": config["solver"],
        },
        "placement": config.get("placement"),
        "dtype": "bfloat16" if config.get("bf16") else None,
        "seed": config["seed"],
    }


def _costs(config: dict[str, Any]):
    costs = {
        "kinetic": (config["kinetic"], observables.KineticEnergy),
        "entropy": (config.get("entropy", 0.0), observables.AttentionEntropy),
    }
    return {name: cost for name, cost in costs.items() if cost[0]}


# ------------------------------------------------------------------ the run


def _fit(run: Path, config: dict, model_config: dict, data, resume: bool):
    require("matplotlib")  # now, not after the training
    model = models.build(model_config)
    if not resume and training.latest(run / "checkpoints") is not None:
        raise typer.BadParameter(f"{run} holds a run already: --resume it, or take another --out.")
    described = {"settings": config, "model": model_config, "jaxflow": __version__}
    start = time.perf_counter()
    fitted = training.fit(
        model,
        data,
        steps=config["steps"],
        optimiser=training.adamw(
            config["steps"],
            learning_rate=config["learning_rate"],
            weight_decay=config["weight_decay"],
        ),
        loss=training.FlowLoss(training.cross_entropy, _costs(config)),
        key=jax.random.key(config["seed"]),
        accumulate=config["accumulate"],
        evaluate_every=config["evaluate_every"],
        evaluation_batches=config.get("evaluation_batches"),
        patience=config["patience"],
        budget=config.get("budget"),
        run=run,
        resume=resume,
        checkpoint_every=config.get("checkpoint_every"),
        config=described,
    )
    figure = viz.training_curve(fitted.history).get_figure(root=True)
    assert figure is not None
    figure.savefig(run / "loss.png", dpi=120)
    _summarise(run, fitted, data, time.perf_counter() - start)


def _summarise(run: Path, fitted: Fitted, data, seconds: float):
    table = Table(show_header=False, title="training")
    table.add_row("ended", f"{fitted.reason}, after {fitted.step} steps")
    table.add_row("validation loss", f"{fitted.validation_loss:.4f}")
    if isinstance(data, training.Images):
        right = training.accuracy(fitted.best, data.validation_batches())
        table.add_row("validation accuracy", f"{right:.2%}")
    table.add_row("wall time", f"{seconds:.0f} s, compilation included")
    table.add_row("run folder", str(run))
    console.print(table)
    if isinstance(data, training.Text):
        prompt = np.asarray(data.training[:8], np.int32)
        text = fitted.best.generate(prompt, 200, temperature=0.8, key=jax.random.key(0))
        console.rule("a sample")
        typer.echo(data.tokenizer.decode(text))
