"""`jaxflow sample`: text from a trained language model."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from .. import models, training
from .._memory import check_fits
from ..models.exits import evaluations
from .boundary import interruptible
from .console import say
from .device import prepare
from .evaluate import depth_like, trained
from .reading import Sampling


def sample(s: Sampling):
    """Prints texts that the model of a run writes."""
    prepare()
    check_fits(64 * s.length, f"a text of {s.length} tokens", "Take a smaller --length.")
    with trained(s.run, latest=s.latest) as run:
        if not isinstance(run.model, models.LanguageModel):
            raise ValueError(f"{s.run} holds a {type(run.model).__name__}, not a language model.")
        model = run.model.with_depth(depth_like(run.model.depth, s.solver, s.steps, s.tolerance))
        tokenizer = training.tokenizer(s.run)
        tokens = jnp.asarray(encoded(tokenizer, s.prompt), jnp.int32)
        choice = {"temperature": s.temperature, "top_k": s.top_k, "top_p": s.top_p}
        draw = partial(model.generate, tokens, s.length, **choice)
        exit = models.DistributionExit(s.exit or 0.0)
        early = partial(model.generate_early, tokens, s.length, exit, **choice)
        for number, key in enumerate(jax.random.split(jax.random.key(s.seed), s.samples)):
            if number:
                say("-" * 72)
            if s.exit is None:
                say(tokenizer.decode(interruptible(partial(draw, key=key))))
                continue
            found = interruptible(partial(early, key=key))
            say(tokenizer.decode(found.tokens))
            say(f"- {found.evaluations.mean():.3g} of {_whole(model)} evaluations a token")


def _whole(model: models.LanguageModel) -> int:
    """The evaluations of a token that goes all the way."""
    return int(evaluations(model, jnp.array(model.depth.steps)))


def encoded(tokenizer, prompt: str | None) -> np.ndarray:
    """The tokens of a prompt; of none, those of a space."""
    if prompt is not None:
        return tokenizer.encode(prompt)
    try:
        return tokenizer.encode(" ")
    except ValueError:  # an alphabet without it: its first character
        return np.zeros(1, np.int32)
