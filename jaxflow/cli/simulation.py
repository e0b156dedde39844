"""The settings of `jaxflow simulate` and `jaxflow phase-diagram`."""

import dataclasses
from pathlib import Path
from typing import Any

from .. import __version__
from .._folder import CONFIG, read_settings
from .choices import (
    FIXED,
    NOISY,
    Geometry,
    Interaction,
    Law,
    Matrices,
    Motion,
    Observable,
    PhaseInteraction,
    Picture,
    Scheme,
    Solver,
    Until,
)
from .console import say
from .settings import (
    COUNT,
    FINITE,
    PAIR,
    POSITIVE,
    SEED,
    SHARE,
    InputFile,
    InputFolder,
    OutputFile,
    Range,
    flag,
    from_json,
)

# A scheme of normalisation, and the geometries on which it moves tokens; the first is its own.
SCHEMES = {
    Scheme.post: tuple(Geometry),
    Scheme.sqrt: tuple(Geometry),
    Scheme.pre: (Geometry.euclidean,),
    Scheme.peri: (Geometry.euclidean,),
    Scheme.ngpt: (Geometry.sphere,),
}
SMALLEST = 1e-30  # of a time: float32 tells it from 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Simulation:
    """Flow tokens by self-attention, and draw what they do.

    Examples:

    `jaxflow simulate --n 512 --d 3 --beta 9 --t1 30`

    `jaxflow simulate --n 16 --d 2 --beta 9 --t1 1e7 --log-time --double --solver kvaerno5 --merges`

    `jaxflow simulate --n 64 --until clustered --t1 1000 --observe order --observe entropy`

    `jaxflow simulate --normalisation pre --observe diameter --film`

    `jaxflow simulate --d 2 --beta 0 --kappa 4 --dt 0.05 --observe order`

    `jaxflow simulate --text README.md --d 32 --beta 8 --t1 20`

    `jaxflow simulate --image photo.png --patch 8 --beta 4`

    `jaxflow simulate --points start.npy --value V.npy --geometry euclidean --save points.npz`

    `jaxflow simulate --config runs/first/config.json --beta 2`
    """

    n: int = flag(256, "Number of tokens.", COUNT)
    d: int = flag(3, "Dimension of a token.", COUNT)
    law: Law = flag(Law.uniform, "Law of the first tokens.")
    text: Path | None = flag(None, "A text file: its words are the tokens.", InputFile())
    max_tokens: int = flag(512, "With --text: words read at most.", COUNT)
    image: Path | None = flag(None, "An image: its patches are the tokens.", InputFile())
    patch: int = flag(8, "With --image: side of a patch in pixels.", COUNT)
    points: Path | None = flag(None, "An array (n, d) in a .npy file: the tokens.", InputFile())
    beta: float = flag(4.0, "Inverse temperature.", FINITE)
    interaction: Interaction = flag(Interaction.softmax, "How a query weighs the tokens.")
    query: Path | None = flag(None, "The matrix Q (p, d) in a .npy file.", InputFile())
    key: Path | None = flag(None, "The matrix K (p, d) in a .npy file.", InputFile())
    value: Path | None = flag(None, "The matrix V (d, d) in a .npy file.", InputFile())
    repulsive: bool = flag(False, "Take V = -I instead of I.")
    causal: bool = flag(False, "Token i sees the tokens up to i.")
    normalisation: Scheme = flag(Scheme.post, "How tokens are normalised.")
    alpha: float = flag(1.0, "With --normalisation ngpt: its step.", FINITE)
    geometry: Geometry | None = flag(None, "Where tokens live (default: as normalised).")
    kappa: float | None = flag(
        None, "Add Brownian motion of temperature 1/kappa to the tokens.", POSITIVE
    )
    noise: Motion = flag(Motion.independent, "With --kappa: one for each token, or for all.")
    t1: float = flag(15.0, "Time to flow to.", Range(SMALLEST, 1e30))
    until: Until = flag(Until.never, "Stop before t1.")
    clusters: int = flag(1, "With --until clustered: this number.", COUNT)
    speed: float = flag(1e-6, "With --until steady: of the fastest token.", POSITIVE)
    solver: Solver = flag(Solver.tsit5, "One-step method.")
    rtol: float = flag(1e-5, "Relative and absolute tolerance.", SHARE)
    dt: float | None = flag(None, "Fixed step (default: adaptive steps).", POSITIVE)
    max_steps: int = flag(100_000, "Most steps of the solver.", COUNT)
    double: bool = flag(False, "Compute in double precision.")
    frames: int = flag(121, "Number of saved times.", PAIR)
    log_time: bool = flag(False, "Save evenly in log t.")
    threshold: float = flag(
        0.999, "Tokens with a larger cosine are linked into a cluster.", Range(-1, 1, open=True)
    )
    min_mass: float = flag(0.0, "Least share of the tokens that counts as a cluster.", Range(0, 1))
    observe: list[Observable] | None = flag(None, "Measure this too; repeatable.")
    merges: bool = flag(False, "Find the time and pair of each merge.")
    film: bool = flag(False, "Write a film too.")
    format: Picture = flag(Picture.png, "Of the figures.")
    save: Path | None = flag(
        None, "Write the times and the tokens at them to this file.", OutputFile(".npz"), kept=False
    )
    seed: int = flag(0, "Seed of the random numbers.", SEED)
    config: Path | None = flag(
        None,
        "config.json of another run: its settings, but for the flags given.",
        InputFile(),
        kept=False,
    )
    out: Path | None = flag(None, "Run folder (default: runs/DATE-TIME).", kept=False)

    @property
    def place(self) -> Geometry:
        return self.geometry or SCHEMES[self.normalisation][0]

    def check(self):
        """Raises ValueError for settings that do not go together."""
        allowed = SCHEMES[self.normalisation]
        sources = {"--text": self.text, "--image": self.image, "--points": self.points}
        given = [name for name, path in sources.items() if path is not None]
        if len(given) > 1:
            raise ValueError(f"take {' or '.join(given)}: tokens come from one of them.")
        if self.repulsive and self.value is not None:
            raise ValueError("take --value or --repulsive, which is V = -I: not both.")
        if self.law is Law.circle and self.d != 2 and not given:
            raise ValueError(f"--law circle needs --d 2, got {self.d}.")
        if self.place not in allowed:
            raise ValueError(
                f"--normalisation {self.normalisation} moves tokens on {', '.join(allowed)}; got "
                f"--geometry {self.place}."
            )
        if self.normalisation is not Scheme.post and Observable.rank in (self.observe or []):
            raise ValueError(
                f"--observe rank needs --normalisation post, not {self.normalisation}."
            )
        if self.solver in FIXED and self.dt is None:
            raise ValueError(
                f"--solver {self.solver} takes fixed steps: give --dt, or take a solver that "
                "estimates its error, such as tsit5."
            )
        if self.solver == "normalised-euler" and self.place is Geometry.euclidean:
            raise ValueError(
                "--solver normalised-euler normalises the tokens, and those on --geometry "
                f"{self.place} are not: take --geometry sphere, or --solver euler."
            )
        if self.dt is not None and self.t1 / self.dt > self.max_steps:
            raise ValueError(
                f"--dt {self.dt:g} needs {self.t1 / self.dt:.4g} steps to --t1 {self.t1:g}, and "
                f"--max-steps is {self.max_steps}: raise it, or take a larger step."
            )
        if self.log_time and self.frames < 3:
            raise ValueError(f"--log-time needs --frames of at least 3, got {self.frames}.")
        self._check_noise()

    def _check_noise(self):
        if self.kappa is None:
            if self.noise is not Motion.independent:
                raise ValueError(f"--noise {self.noise} is of the temperature --kappa: give both.")
            return
        if self.dt is None:
            raise ValueError("--kappa takes fixed steps, well below kappa / (2 d): give --dt.")
        if self.solver not in NOISY:
            raise ValueError(
                f"--solver {self.solver} is no method for noise: take one of "
                f"{', '.join(sorted(NOISY))}, or leave --kappa out."
            )
        if self.place is Geometry("layer-norm"):
            raise ValueError(
                "--kappa is for R^d and spheres, and --geometry layer-norm is an ellipsoid: take "
                "--geometry rms-norm or sphere, or leave --kappa out."
            )
        if self.merges:
            raise ValueError("--merges are those of a flow without noise: leave --kappa out.")


def of_config(flags: Simulation, given: frozenset[str]) -> dict[str, Any]:
    """The settings of --config."""
    if flags.config is None:
        return {}
    record = read_settings(flags.config, unchanged=False)
    if record.pop("command", "simulate") != "simulate":
        raise ValueError(f"{flags.config} is not of a run of `jaxflow simulate`.")
    version = record.pop("jaxflow", __version__)
    settings = from_json(Simulation, record, str(flags.config))
    if version != __version__:
        say(f"{flags.config} was written by jaxflow {version}; this is {__version__}.")
    return settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """Draw the probability that two tokens have met, by inverse temperature and time.

    Uniform tokens on the sphere move by self-attention, V = Q = K = I (arXiv 2312.10794), or with
    random matrices, drawn for each initial law: gaussian Q and K, of a --rank; goe V; V = I or -I.

    Examples:

    `jaxflow phase-diagram`

    `jaxflow phase-diagram --d 8 --betas 30 --systems 16 --out runs/phase-8`

    `jaxflow phase-diagram --n 16 --d 8 --matrices gaussian --rank 2`

    `jaxflow phase-diagram --resume runs/phase-8`
    """

    n: int = flag(32, "Number of tokens.", PAIR)
    d: int = flag(128, "Dimension of a token.", PAIR)
    beta_min: float = flag(0.1, "Least inverse temperature.", FINITE)
    beta_max: float = flag(9.0, "Largest inverse temperature.", FINITE)
    betas: int = flag(90, "Number of inverse temperatures.", COUNT)
    t1: float = flag(30.0, "Time to flow to.", Range(SMALLEST, 1e30))
    times: int = flag(200, "Number of times from 0 on.", PAIR)
    systems: int = flag(64, "Number of initial laws.", COUNT)
    threshold: float = flag(0.999, "Tokens with this inner product or more have met.", SHARE)
    interaction: PhaseInteraction = flag(PhaseInteraction.softmax, "How a query weighs the tokens.")
    matrices: Matrices = flag(Matrices.identity, "Q, K and V of each initial law.")
    rank: int | None = flag(None, "With --matrices gaussian: of Q^T K (default: d).", COUNT)
    tolerance: float = flag(1e-5, "Relative and absolute, of the solver.", SHARE)
    seed: int = flag(0, "Seed of the initial laws.", SEED)
    out: Path | None = flag(
        None, "Run folder (default: runs/DATE-TIME); one cut off goes on.", kept=False
    )
    resume: Path | None = flag(
        None, "Go on with this run; its own settings hold.", InputFolder(), kept=False
    )

    def check(self):
        """Raises ValueError for settings that do not go together."""
        if self.rank is not None and self.matrices != Matrices.gaussian:
            raise ValueError("--rank is that of --matrices gaussian: give both.")
        if self.rank is not None and self.rank > self.d:
            raise ValueError(f"--rank must not be more than --d {self.d}, got {self.rank}.")
        if self.beta_min > self.beta_max:
            raise ValueError(
                f"--beta-min must not be more than --beta-max, got {self.beta_min:g} and "
                f"{self.beta_max:g}."
            )
        if self.betas > 1 and self.beta_min == self.beta_max:
            raise ValueError(
                f"--betas {self.betas} of them lie between --beta-min and --beta-max, which are "
                f"both {self.beta_min:g}: take --betas 1."
            )
        if self.out is not None and self.resume is not None:
            raise ValueError("take --out or --resume, not both: a run goes on in its own folder.")


def of_run(flags: Phase, given: frozenset[str]) -> dict[str, Any]:
    """The settings of the run of --resume, or of an --out that holds one: the flags must be its
    own."""
    folder = flags.resume or flags.out
    if folder is None or not (file := folder / CONFIG).exists():
        if flags.resume is not None:
            raise ValueError(f"{folder} is no run to go on with: it has no {CONFIG}.")
        return {}
    record = read_settings(file, unchanged=True)
    if record.pop("command", None) != "phase-diagram":
        raise ValueError(f"{folder} holds a run of another command: take another --out.")
    record.pop("jaxflow", None)
    kept = from_json(Phase, record, str(file))
    asked = given & set(kept) if flags.resume is not None else set(kept)
    if others := sorted(name for name in asked if getattr(flags, name) != kept[name]):
        told = ", ".join(f"{name} = {kept[name]}, not {getattr(flags, name)}" for name in others)
        raise ValueError(
            f"{folder} holds a run with {told}: --resume it as it is, or take another --out."
        )
    return kept
