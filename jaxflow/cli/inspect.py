"""`jaxflow inspect`: what a model does to a text, on one page."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from .. import models, training, viz
from .._files import read_text
from .._folder import write_text
from .boundary import interruptible
from .console import say, table
from .device import prepare
from .evaluate import trained
from .optional import figures
from .reading import Inspecting

CHARACTERS = 64  # read at most for each token


def inspect(s: Inspecting):
    """Writes the page."""
    figures()  # the page is pictures
    prepare()
    if training.latest(s.model / "checkpoints") is None:
        _inspect(s, models.from_pretrained(s.model), _tokenizer(s.model))
        return
    with trained(s.model, latest=s.latest) as run:
        if not isinstance(run.model, models.LanguageModel):
            raise ValueError(f"{s.model} holds a {type(run.model).__name__}, no model of a text.")
        _inspect(s, run.model, training.tokenizer(s.model))


def _tokenizer(folder: Path) -> training.TokenizerFile:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no tokenizer.json, which its text needs: put it there.")
    return training.TokenizerFile.read(path)


def _inspect(s: Inspecting, model: Any, tokenizer: Any):
    most = min(s.tokens, model.context)
    tokens = tokenizer.encode(read_text(s.text)[: CHARACTERS * most])[:most]
    if len(tokens) < 2:
        raise ValueError(f"{s.text} has {len(tokens)} tokens: take a text of two or more.")
    found = interruptible(models.inspect, model, np.asarray(tokens, np.int32))
    words = [tokenizer.decode(tokens[i : i + 1]) for i in range(len(tokens))]
    numbers = sum(a.size for a in jax.tree.leaves(model) if isinstance(a, jax.Array))
    about = {
        "model": f"{s.model}, {type(model).__name__} of {numbers:,} parameters",
        "depth": f"T = {model.depth.t1:g}, {len(found.ts) - 1} steps",
        "text": f"{s.text}, its first {len(tokens)} tokens",
        models.inspection.loss_name(model): f"{found.loss:.4f}",
    }
    write_text(s.out, viz.inspection_page(found, words, about))
    table("inspected", [*about.items(), ("page", s.out)])
    say()
