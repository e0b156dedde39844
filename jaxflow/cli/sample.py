"""`jaxflow sample`: text from a trained language model."""

from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import typer

from .. import models, training
from .console import console
from .evaluate import depth_like
from .train import Solver


def sample(
    run: Annotated[Path, typer.Argument(help="Folder of a `jaxflow train lm` run.")],
    prompt: Annotated[
        str | None, typer.Option(help="The text to continue (default: a space).")
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens to add.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Draw among the k likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw among the fewest tokens of this probability.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Number of texts.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    latest: Annotated[bool, typer.Option(help="The last checkpoint, not the best.")] = False,
    steps: Annotated[int | None, typer.Option(help="Another number of steps.")] = None,
    solver: Annotated[Solver | None, typer.Option(help="Another solver.")] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Adaptive steps with this tolerance.")
    ] = None,
):
    """Continue a prompt with a trained language model, at its own depth or another one.

    Examples:

    `jaxflow sample runs/shakespeare --prompt "ROMEO:" --temperature 0.8 --top-k 40`

    `jaxflow sample runs/shakespeare --solver heun --steps 8`
    """
    model = training.load(run, which="latest" if latest else "best")
    if not isinstance(model, models.LanguageModel):
        raise typer.BadParameter(f"{run} holds a {type(model).__name__}, not a language model.")
    model = model.with_depth(depth_like(model.depth, solver, steps, tolerance))
    tokenizer = training.tokenizer(run)
    tokens = jnp.asarray(_encoded(tokenizer, prompt), jnp.int32)
    for key in jax.random.split(jax.random.key(seed), samples):
        text = model.generate(
            tokens, length, temperature=temperature, top_k=top_k, top_p=top_p, key=key
        )
        typer.echo(tokenizer.decode(text))
        if samples > 1:
            console.rule()


def _encoded(tokenizer, prompt: str | None):
    if prompt is not None:
        return tokenizer.encode(prompt)
    try:
        return tokenizer.encode(" ")
    except ValueError:  # an alphabet without it: its first character
        return [0]
