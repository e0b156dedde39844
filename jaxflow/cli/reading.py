"""The settings of the commands that read runs, `evaluate`, `sample`, `inspect`, `compare` and
`view`, and of `info`."""

import dataclasses
from pathlib import Path

from .choices import At, DType, Solver
from .settings import (
    COUNT,
    SEED,
    SHARE,
    Input,
    InputFile,
    InputFolder,
    OutputFile,
    Range,
    argument,
    flag,
)

PROBABILITY = Range(0, 1)


class Figure:
    """A path of a picture to write."""

    endings = ".png", ".pdf", ".svg", ".jpg", ".jpeg"

    def __str__(self):
        return f"a file that ends in {', '.join(self.endings)}"

    def allows(self, value: Path) -> bool:
        return value.suffix.lower() in self.endings and not value.is_dir()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Measure a trained model at other depths, or on other data, without training it again.

    The validation loss with each solver at each number of steps and each tolerance, in
    RUN/evaluate.jsonl; RUN/evaluate.png draws it against the evaluations of the field. Layers take
    a multiple of their number as steps. With --layers the parameters are those in the middle of
    each of so many pieces, one step a piece. With --exit the flow of each token of a text ends with
    the first of the model's own steps that moves less than so much probability of the next one, as
    it may at generation, and the evaluations are the mean of what a token takes.

    Examples:

    `jaxflow evaluate runs/shakespeare --steps 4 --steps 8 --steps 16 --solver heun`

    `jaxflow evaluate runs/shakespeare --solver tsit5 --tolerance 1e-2 --tolerance 1e-4`

    `jaxflow evaluate runs/shakespeare --layers 4 --layers 8 --layers 16`

    `jaxflow evaluate runs/shakespeare --exit 0.01 --exit 0.1`

    `jaxflow evaluate runs/shakespeare --text marlowe.txt`
    """

    run: Path = argument("Folder of a `jaxflow train` run.", InputFolder())
    steps: list[int] | None = flag(None, "Another number of steps; repeatable.", COUNT)
    tolerance: list[float] | None = flag(None, "Adaptive steps; repeatable.", SHARE)
    solver: list[Solver] | None = flag(None, "Another solver; repeatable.")
    layers: list[int] | None = flag(
        None, "Its curve sampled into so many layers; repeatable.", COUNT
    )
    exit: list[float] | None = flag(
        None, "Tokens exit where a step moves less probability; repeatable.", PROBABILITY
    )
    batches: int | None = flag(None, "Validation batches (default: all of them).", COUNT)
    latest: bool = flag(False, "The last checkpoint, not the best.")
    text: Path | None = flag(None, "Another text (default: the run's).", Input())
    images: Path | None = flag(None, "Other images (default: the run's).", InputFile())
    labels: Path | None = flag(None, "The classes of --images in the idx format.", InputFile())

    def check(self):
        """Raises ValueError for settings that do not go together."""
        if self.text is not None and self.images is not None:
            raise ValueError("take --text or --images, not both.")
        if self.labels is not None and self.images is None:
            raise ValueError("--labels are of --images: give both.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Continue a prompt with a trained language model, at its own depth or another one.

    Examples:

    `jaxflow sample runs/shakespeare --prompt "ROMEO:" --temperature 0.8 --top-k 40`

    `jaxflow sample runs/shakespeare --solver heun --steps 8`

    `jaxflow sample runs/shakespeare --exit 0.05`
    """

    run: Path = argument("Folder of a `jaxflow train lm` run.", InputFolder())
    prompt: str | None = flag(None, "The text to continue (default: a space).")
    length: int = flag(256, "Tokens to add.", Range(0, 10**8))
    temperature: float = flag(0.8, "0 takes the likeliest token.", Range(0, 1e30))
    top_k: int | None = flag(None, "Draw among the k likeliest tokens.", COUNT)
    top_p: float | None = flag(
        None, "Draw among the fewest tokens of this probability.", Range(1e-30, 1)
    )
    samples: int = flag(1, "Number of texts.", Range(1, 10**6))
    seed: int = flag(0, "Seed of the draws.", SEED)
    latest: bool = flag(False, "The last checkpoint, not the best.")
    steps: int | None = flag(None, "Another number of steps.", COUNT)
    solver: Solver | None = flag(None, "Another solver.")
    tolerance: float | None = flag(None, "Adaptive steps with this tolerance.", SHARE)
    exit: float | None = flag(None, "Tokens exit where a step moves less probability.", PROBABILITY)

    def check(self):
        """Raises ValueError for settings that do not go together."""
        if self.exit is not None and self.tolerance is not None:
            raise ValueError("--exit ends fixed steps: leave out --tolerance.")
        if self.exit is not None and not self.length:
            raise ValueError("--exit is of tokens that are added: take --length of at least 1.")
        if self.steps is not None and self.tolerance is not None:
            raise ValueError("a depth has either --steps or a --tolerance; give one of them.")
        if self.prompt == "":
            raise ValueError("--prompt must have at least one character, got none.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspecting:
    """Show what a language model or encoder does to a text along its depth, on one HTML page.

    Inner products and clusters of the tokens, the entropy of attention, the spectra of Q^T K and V,
    the inverse temperature of each head beside the attention of the theory, and how sensitive the
    loss is to each token. The model is that of a run, or a pretrained one in a folder with
    config.json, safetensors and tokenizer.json.

    Examples:

    `jaxflow inspect runs/shakespeare --text sonnet.txt`

    `jaxflow inspect models/gpt2 --text sonnet.txt --tokens 256 --out gpt2.html`
    """

    model: Path = argument("Folder of a run, or of a pretrained model.", InputFolder())
    text: Path = flag(..., "UTF-8 file, of which the beginning is read.", InputFile())
    tokens: int = flag(128, "Tokens of it, at most.", Range(2, 2048))
    out: Path = flag(Path("inspect.html"), "The page.", OutputFile(".html"))
    latest: bool = flag(False, "The last checkpoint of a run, not the best.")

    def check(self):
        """These go together as they are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Compare runs: the settings that differ, each metric at their ends and where all had come to,
    and their curves.

    Where all had come to is the largest step, or time or number of evaluations of the field, at
    which all measured the metric; where they never did at the same, the least of their last ones,
    and each run has what it measured last up to there.

    Examples:

    `jaxflow compare runs/post runs/pre --metric diameter`

    `jaxflow compare runs/layers runs/smooth --metric validation_loss --out losses.png`

    `jaxflow compare runs/layers runs/smooth --at time`
    """

    runs: list[Path] = argument("Two or more run folders of one command.", InputFolder())
    metric: list[str] | None = flag(None, "Draw this metric; repeatable (default: all).")
    at: At = flag(At.step, "What runs are compared at, and drawn over.")
    out: Path = flag(Path("compare.png"), "The figure.", Figure())

    def check(self):
        """Raises ValueError for settings that do not go together."""
        if len(self.runs) < 2:
            raise ValueError(f"compare takes two or more run folders, got {len(self.runs)}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Viewing:
    """Show runs in a browser while they are written: simulations play, metrics are curves.

    Several runs are laid over one another, with the settings that differ. The page is served on
    this machine alone, under a URL with a random token, and nothing is written. Ctrl-C ends it.

    Examples:

    `jaxflow view runs/shakespeare`

    `jaxflow view runs/layers runs/smooth`

    `jaxflow view runs/sphere --no-browser --port 8080`
    """

    runs: list[Path] = argument("Run folders.", InputFolder())
    browser: bool = flag(True, "Open the page in a browser.")
    port: int = flag(0, "Of the server; 0 takes one that is free.", Range(0, 65535))

    def check(self):
        """These go together as they are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Information:
    """Versions, devices, and the backend and kernel chosen for a shape, and why.

    With --check the kernels of the GPU or TPU at hand run first, each in a process that may fail,
    against the portable backend. Those that are right are taken from then on; the verdicts are kept
    in the cache folder for this device and these versions.
    """

    n: int = flag(16384, "Number of tokens.", COUNT)
    d: int = flag(3, "Dimension of a token or of a head.", COUNT)
    dtype: DType = flag(DType.float32, "Of the tokens.")
    check_kernels: bool = flag(
        False, "Run every kernel on the device, and take those that are right.", name="--check"
    )

    def check(self):
        """These go together as they are."""
