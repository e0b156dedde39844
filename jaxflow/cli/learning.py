"""The settings of `jaxflow train lm|image|resnet`, their presets, and how a run goes on."""

import dataclasses
from pathlib import Path
from typing import Any

from .._folder import CONFIG, read_settings
from .choices import FIXED, Block, Curve, Placement, Solver, Tokens
from .settings import (
    COUNT,
    LARGEST,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    SHARE,
    Counts,
    Input,
    InputFile,
    InputFolder,
    Range,
    counts,
    flag,
    flag_name,
    from_json,
)

KIND = "train"  # of run

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
        # Its published setting for a GPU, but for the dropout of 0.2, which these models have not:
        # the best parameters are kept, and the last ones have seen the text too often.
        "nanogpt-gpu": {
            "tokens": "chars", "layers": 6, "heads": 6, "dim": 384, "context": 256, "batch": 64,
            "steps": 5000, "bf16": True,
        },
        "continuous-gpu": {
            "tokens": "chars", "layers": 6, "heads": 6, "dim": 384, "context": 256, "batch": 64,
            "steps": 5000, "bf16": True, "curve": "smooth",
        },
        "continuous-cpu": {
            "tokens": "chars", "layers": 4, "heads": 4, "dim": 128, "context": 64, "batch": 12,
            "steps": 2000, "curve": "linear", "solver": "euler",
        },
        # Bounded velocities, so that one model serves any accurate solver.
        "any-depth-cpu": {
            "tokens": "chars", "layers": 4, "heads": 4, "dim": 128, "context": 64, "batch": 12,
            "steps": 2000, "curve": "smooth", "solver": "heun", "solver_steps": 8,
            "elastic": "2:12:2", "elastic_after": 500, "placement": "peri", "normalised": True,
            "untied": True,
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

# What a block takes besides the sizes of the model.
TAKEN = {
    Block.gpt2: {"width", "placement", "rotary", "bias", "dtype"},
    Block.llama: {"kv_heads", "width", "bias", "dtype"},
    Block.parallel: {"width", "bias", "dtype"},
    Block.attention: {"bias"},
    Block.theory: set[str](),
}

CHECKPOINTS = "Steps between checkpoints (default: between evaluations)."
ELASTIC = "Solver steps drawn for each step of training, as 2:12; evaluations keep --solver-steps."
JITTER = "Lengths of --elastic's steps vary at random by this share."
ON = "Go on with this run and its settings; --steps and few others may change."


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractTraining:
    """What the trainings of all models share."""

    layers: int = flag(4, "Blocks along the depth.", COUNT)
    dim: int = flag(64, "Dimension of a token.", COUNT)
    curve: Curve = flag(Curve.layers, "How parameters move in time.")
    solver: Solver = flag(Solver["lie-trotter"], "One-step method.")
    solver_steps: int | None = flag(None, "Steps of the solver (one a layer).", COUNT)
    elastic: str | None = flag(None, ELASTIC, Counts())
    elastic_after: int = flag(0, "Steps of training before, at --solver-steps.", NOT_NEGATIVE)
    jitter: float = flag(0.0, JITTER, Range(0, 0.99))
    consistency: float = flag(0.0, "Weight of what halved steps change.", NOT_NEGATIVE)
    tolerance: float | None = flag(None, "Adaptive steps with this tolerance.", SHARE)
    t1: float | None = flag(None, "Depth T (the number of layers).", POSITIVE)
    batch: int = flag(64, "Samples a step.", COUNT)
    steps: int = flag(1000, "Steps of training.", COUNT)
    learning_rate: float = flag(1e-3, "Largest learning rate of AdamW.", POSITIVE)
    weight_decay: float = flag(0.1, "Weight decay of matrices.", NOT_NEGATIVE)
    kinetic: float = flag(0.0, "Weight of the transport cost int |x'|^2 dt.", NOT_NEGATIVE)
    accumulate: int = flag(1, "Batches a step.", COUNT)
    devices: int | None = flag(None, "Devices that share each batch (one).", COUNT, kept=False)
    sharded: bool = flag(False, "They share the parameters as well.", kept=False)
    evaluate_every: int = flag(100, "Steps between evaluations.", COUNT)
    evaluation_batches: int | None = flag(None, "Of an evaluation (default: all).", COUNT)
    checkpoint_every: int | None = flag(None, CHECKPOINTS, COUNT)
    patience: int | None = flag(None, "Evaluations without progress to stop after.", COUNT)
    budget: int | None = flag(None, "Evaluations of the field to stop after.", COUNT)
    minutes: float | None = flag(None, "Of wall time; --resume has them anew.", POSITIVE)
    evaluate_on_interrupt: bool = flag(False, "Ctrl-C leaves time for an evaluation.")
    tensorboard: bool = flag(False, "Also write RUN/tensorboard.")
    profile: bool = flag(False, "Trace five steps in RUN/profile.", kept=False)
    seed: int = flag(0, "Seed of the parameters and batches.", SEED)
    preset: str = flag("default", "Named settings; other flags override them.")
    out: Path | None = flag(None, "Run folder (default: runs/DATE-TIME).", kept=False)
    resume: Path | None = flag(None, ON, InputFolder(), kept=False)

    def check(self):
        """Raises ValueError for settings that do not go together."""
        if self.solver_steps is not None and self.tolerance is not None:
            raise ValueError("give one of --solver-steps and --tolerance.")
        if self.tolerance is not None and self.solver in FIXED:
            raise ValueError(
                f"--tolerance needs a solver that estimates its error, such as --solver tsit5; "
                f"{self.solver} takes fixed steps."
            )
        if self.curve is Curve.linear and self.layers < 2:
            raise ValueError(f"--curve linear needs --layers of at least 2, got {self.layers}.")
        if self.curve is Curve.fourier and self.layers % 2 == 0:
            raise ValueError(
                "--curve fourier is a constant and pairs of sine and cosine, so --layers must be "
                f"odd, got {self.layers}."
            )
        if self.sharded and self.devices is None:
            raise ValueError("--sharded is of several devices: give their number by --devices.")
        if isinstance(self, AbstractTransformer):
            self.check_attention()
        if isinstance(self, LanguageTraining):
            self.check_block()
        if self.curve is Curve.layers and (self.solver_steps or 0) % self.layers:
            raise ValueError(
                f"--solver-steps must be a multiple of --layers, as each layer takes whole steps; "
                f"got {self.solver_steps} and {self.layers}."
            )
        self.check_elastic()

    def check_elastic(self):
        """Raises ValueError for settings of drawn depths that do not go together."""
        if self.consistency and self.tolerance is not None:
            raise ValueError("--consistency cuts fixed steps into two: leave out --tolerance.")
        if self.elastic is None:
            if self.jitter:
                raise ValueError("--jitter moves the steps of --elastic: give both.")
            if self.elastic_after:
                raise ValueError("--elastic-after is when --elastic begins: give both.")
            return
        if self.curve is not Curve.layers:
            return
        if self.jitter:
            raise ValueError("--jitter moves steps, which layers do not let: take another --curve.")
        if any(steps % self.layers for steps in counts(self.elastic)):
            raise ValueError(
                "--elastic must be multiples of --layers, as each layer takes whole steps; got "
                f"{self.elastic} and {self.layers}. Take another --curve, or "
                f"{self.layers}:{3 * self.layers}:{self.layers}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractTransformer(AbstractTraining):
    """What the trainings of models with attention share."""

    heads: int = flag(4, "Heads of attention.", COUNT)
    width: int | None = flag(
        None, "Of the feed-forward layers (4 dim; 0: none).", Range(0, LARGEST)
    )
    placement: Placement = flag(Placement.pre, "Where tokens are normalised.")
    entropy: float = flag(0.0, "Weight of the entropy of attention.", NOT_NEGATIVE)
    bf16: bool = flag(False, "Attention and feed-forward in bfloat16.")

    def check_attention(self):
        """Raises ValueError for settings of attention that do not go together."""
        if self.dim % self.heads:
            raise ValueError(
                f"--dim must be a multiple of --heads, got {self.dim} and {self.heads}."
            )
        if self.bf16 and self.placement is Placement.post:
            raise ValueError("--bf16 is of the fields between norms: take --placement pre or peri.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageTraining(AbstractTransformer):
    """Train a language model on a text.

    Examples:

    `jaxflow train lm --preset demo`

    `jaxflow train lm --text shakespeare.txt --preset nanogpt-cpu --out runs/shakespeare`

    `jaxflow train lm --curve smooth --solver heun --solver-steps 4`

    `jaxflow train lm --curve smooth --elastic 2:6`

    `jaxflow train lm --block llama --kv-heads 2`

    `jaxflow train lm --resume runs/shakespeare`
    """

    text: Path | None = flag(None, "UTF-8 file or folder (default: Python's own manual).", Input())
    block: Block | None = flag(None, "Another block than GPT-2's without biases in attention.")
    kv_heads: int | None = flag(None, "Keys and values of --block llama.", COUNT)
    bias: bool = flag(False, "Biases in attention.")
    tokens: Tokens = flag(Tokens.bytes, "Bytes, characters, or byte pairs.")
    tokenizer: Path | None = flag(
        None, "A tokenizer.json of Hugging Face, in place of --tokens.", InputFile()
    )
    vocabulary: int = flag(1024, "Number of byte-pair tokens.", Range(256, 2**20))
    context: int = flag(128, "Tokens the model sees.", COUNT)
    rotary: bool = flag(False, "Rotary positions, not learned ones.")
    normalised: bool = flag(False, "Tokens are normalised before they flow, for adaptive steps.")
    untied: bool = flag(False, "The read-out has a matrix of its own, not that of the tokens.")
    cache: Path | None = flag(None, "Folder that keeps the tokens for the next run.")
    dim: int = flag(128, "Dimension of a token.", COUNT)
    batch: int = flag(16, "Samples a step.", COUNT)
    steps: int = flag(2000, "Steps of training.", COUNT)
    evaluate_every: int = flag(250, "Steps between evaluations.", COUNT)

    def block_arguments(self) -> dict[str, Any]:
        """What is asked of another block than the default, by flags that are not at their own."""
        asked = {
            "kv_heads": self.kv_heads,
            "width": self.width,
            "dtype": "bfloat16" if self.bf16 else None,
            "bias": self.bias or None,
            "rotary": self.rotary or None,
            "placement": None if self.placement is Placement.pre else self.placement.value,
        }
        return {name: value for name, value in asked.items() if value is not None}

    def check_block(self):
        """Raises ValueError for flags that the block does not take."""
        if self.block is None:
            if self.kv_heads is not None:
                raise ValueError("--kv-heads are those of --block llama: give both.")
            return
        for name in self.block_arguments():
            if name not in TAKEN[self.block]:
                flag = "--bf16" if name == "dtype" else flag_name(name)
                raise ValueError(f"--block {self.block} takes no {flag}: leave it out.")
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(
                f"--kv-heads must divide --heads, got {self.kv_heads} and {self.heads}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageTraining(AbstractTransformer):
    """Train a classifier of images on their patches.

    Examples:

    `jaxflow train image --preset attention`

    `jaxflow train image --images t10k-images.gz --labels t10k-labels.gz --patch 7 --steps 500`
    """

    images: Path | None = flag(
        None, ".npz or idx(.gz) file (default: digits of scikit-learn).", InputFile()
    )
    labels: Path | None = flag(None, "idx(.gz) file of their classes.", InputFile())
    patch: int = flag(2, "Side of a patch.", COUNT)
    class_token: bool = flag(False, "Read out from a token of its own.")
    layers: int = flag(2, "Blocks along the depth.", COUNT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResidualTraining(AbstractTraining):
    """Train a residual network, or the neural ODE of the same block.

    Examples:

    `jaxflow train resnet`

    `jaxflow train resnet --preset neural-ode --kinetic 0.01`
    """

    images: Path | None = flag(
        None, ".npz or idx(.gz) file (default: digits of scikit-learn).", InputFile()
    )
    labels: Path | None = flag(None, "idx(.gz) file of their classes.", InputFile())
    width: int = flag(128, "Of the hidden layer of a block.", COUNT)
    solver: Solver = flag(Solver.euler, "One-step method.")
    t1: float | None = flag(1.0, "Depth T (none: the number of layers).", POSITIVE)


TASKS: dict[str, type[AbstractTraining]] = {
    "lm": LanguageTraining,
    "image": ImageTraining,
    "resnet": ResidualTraining,
}


def task_of(kind: type[AbstractTraining]) -> str:
    return next(name for name, found in TASKS.items() if found is kind)


def base(flags: AbstractTraining, given: frozenset[str]) -> dict[str, Any]:
    """The settings of the run to go on with, or of the preset."""
    if flags.resume is not None:
        return _of_run(flags, flags.resume, given)
    presets = PRESETS[task_of(type(flags))]
    if flags.preset not in presets:
        raise ValueError(f"--preset must be one of {', '.join(presets)}; got {flags.preset!r}.")
    found = from_json(type(flags), presets[flags.preset], f"the preset {flags.preset}")
    for one, other in (("solver_steps", "tolerance"), ("tolerance", "solver_steps")):
        if one in given:
            found.pop(other, None)
    return found


def _of_run(flags: AbstractTraining, run: Path, given: frozenset[str]) -> dict[str, Any]:
    # Here, as help and new runs need none of it.
    from ..training.record import CHANGEABLE

    if not (run / CONFIG).exists():
        raise ValueError(f"{run} is no run to go on with: it has no {CONFIG}.")
    record = read_settings(run / CONFIG, unchanged=True)
    kept = training_settings(record, str(run / CONFIG))
    if type(flags) is not TASKS[kept.pop("task")]:
        raise ValueError(f"{run} is a run of `jaxflow train {record['settings']['task']}`.")
    fixed = sorted(k for k in given - CHANGEABLE if k in kept and getattr(flags, k) != kept[k])
    if fixed or flags.out is not None:
        name = flag_name((fixed or ["out"])[0])
        raise ValueError(
            f"a run goes on with its own settings, so {name} must stay as it was; start another "
            f"one for it. These may change: {', '.join(sorted(CHANGEABLE - {'jaxflow'}))}."
        )
    return kept


def training_settings(record: dict[str, Any], where: str) -> dict[str, Any]:
    """The settings of a training in its record, checked, and its "task"."""
    settings = record.get("settings")
    task = settings.get("task") if isinstance(settings, dict) else None
    if not isinstance(settings, dict) or task not in TASKS:
        raise ValueError(f"{where} is no record of a run of `jaxflow train`.")
    rest = {k: v for k, v in settings.items() if k != "task"}
    return {"task": task} | from_json(TASKS[task], rest, where)
