"""Depths that are drawn anew for each step of training, so that one model serves at all of them.

    step k    theta <- optimiser(theta, d/dtheta loss(model_theta at depth D_k)),   D_k drawn
    at D_k with jitter j, N equal steps end at   t_i = (i + j u_i) T / N,   u_i on [-1/2, 1/2)

The first steps may be at the model's own depth instead. The draw is a function of the key of the
run and of k alone, so that a run that goes on draws what it would have drawn. Each depth is a
program of its own, compiled when it is first drawn.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from .._rules import constant, count
from ..fields.time import jumps
from ..models import AbstractModel, Depth
from .step import Step

MOST = 32  # programs of one training


@dataclasses.dataclass(frozen=True)
class Elastic:
    """A training whose depth is drawn anew for each step, as `fit(depths=Elastic(range(2, 13)))`.

    The model's own depth stays what it is: the one of its evaluations, of what is saved, and of
    `model(...)`.

    **Arguments:**

    - `depths`: among which each step draws, all as likely: numbers of equal steps, with the solver
      and the T of the model's own depth, or a `jaxflow.models.Depth`, of any solver. At most
      32, as each is a program to compile.
    - `jitter`: from 0 to less than 1; a step then is (1 - jitter) to (1 + jitter) times as long as
      an equal one, at random, for models whose parameters do not jump in time. It is no further
      program.
    - `evaluate`: depths at which each evaluation is made beside the model's own, and logged as
      "validation_loss@12" for 12 steps; `None` is the first and the last of `depths`.
    - `after`: how many steps of the training are made at the model's own depth before depths are
      drawn: a model learns faster at one depth. With as many as the training has, none is.

    **Raises:** `ValueError` or `TypeError` for what makes no depths.

    ```python
    >>> elastic = jaxflow.training.Elastic(range(2, 7, 2), jitter=0.5)
    >>> elastic.depths, elastic.evaluate
    ((2, 4, 6), (2, 6))

    ```
    """

    depths: Sequence[int | Depth]
    jitter: float = 0.0
    evaluate: Sequence[int | Depth] | None = None
    after: int = 0

    def __post_init__(self):
        depths = _checked("depths", self.depths)
        if not depths:
            raise ValueError("an elastic training draws among one depth at least, got none.")
        ends = depths[:1] + depths[-1:]
        evaluate = ends if self.evaluate is None else _checked("evaluate", self.evaluate)
        rule = "at least 0 and less than 1"
        jitter = constant("jitter", self.jitter, rule, lambda j: (j >= 0) & (j < 1))
        after = count("after", self.after, 0)
        checked = {"depths": depths, "evaluate": evaluate, "jitter": jitter, "after": after}
        for name, value in checked.items():
            object.__setattr__(self, name, value)


def _checked(name: str, depths: Any) -> tuple[int | Depth, ...]:
    if not isinstance(depths, Sequence) or isinstance(depths, str):
        raise TypeError(
            f"{name} must be numbers of steps or depths, such as range(2, 13); got {depths!r}."
        )
    if len(depths) > MOST:
        raise ValueError(
            f"{name} must be at most {MOST}, each of which is a program to compile; got "
            f"{len(depths)}. Leave some out, as range(2, 65, 4) does."
        )
    return tuple(d if isinstance(d, Depth) else count(f"each of {name}", d) for d in depths)


@dataclasses.dataclass(frozen=True)
class Steps:
    """The step at the model's own depth, those among which one is drawn, those of further
    evaluations, by what their names end in, and the one that is made before, so many times."""

    own: Step
    drawn: Sequence[Step]
    evaluated: dict[str, Step]
    first: Step
    after: int = 0

    def at(self, seed: Sequence[int], number: int) -> Step:
        """The step of a number; `seed` is what `seed_of` makes of the key of the run."""
        if number < self.after:
            return self.first
        # The words of a SeedSequence are the same in every version of NumPy.
        [word] = np.random.SeedSequence([*seed, number]).generate_state(1)
        return self.drawn[int(word) % len(self.drawn)]

    @property
    def trained(self) -> list[Step]:
        """Those of the training, each of which is a program."""
        alone = self.after > 0 and not any(step is self.first for step in self.drawn)
        return [self.first] * alone + list(self.drawn)

    @property
    def depths(self) -> list[Depth]:
        """Those that are drawn; none where nothing is."""
        return [step.depth for step in self.drawn if step.depth is not None]


def seed_of(key: PRNGKeyArray) -> tuple[int, ...]:
    """The words of a key, on the host."""
    return tuple(np.asarray(jax.random.key_data(key)).ravel().tolist())


def steps_of(step: Step, elastic: Elastic | None) -> Steps:
    """The steps of a training.

    **Raises:** `ValueError` or `TypeError` for a model that is not trained so.
    """
    if elastic is None:
        return Steps(step, [step], {}, step)
    if not isinstance(elastic, Elastic):
        raise TypeError(
            f"depths must be jaxflow.training.Elastic(range(2, 13)) or None, got {elastic!r}."
        )
    model = step.static
    if not isinstance(model, AbstractModel):
        raise TypeError(
            f"depths are those of a jaxflow.models.AbstractModel, got a {type(model).__name__}."
        )
    if elastic.jitter and jumps(model.field):
        raise ValueError(
            "jitter moves the ends of steps, and the parameters of this model jump in time, where "
            "steps have to end: take a curve without jumps, such as jaxflow.models.smooth, or "
            "jitter=0."
        )
    own = model.depth
    of = lambda depth: depth if isinstance(depth, Depth) else own.with_steps(depth)
    at = lambda depth, jitter=0.0: dataclasses.replace(step, depth=depth, jitter=jitter)
    drawn = [at(depth, elastic.jitter) for depth in dict.fromkeys(map(of, elastic.depths))]
    others = {_name(d, own): at(d) for d in map(of, elastic.evaluate or ()) if d != own}
    same = (one for one in drawn if one.depth == own and not one.jitter)
    return Steps(step, drawn, others, next(same, step), elastic.after)


def _name(depth: Depth, own: Depth) -> str:
    """Such as "12"; for another solver than the model's own "Heun-12", "Tsit5-0.001"."""
    size = depth.tolerance if depth.steps is None else depth.steps
    return f"{size:g}" if depth.solver == own.solver else f"{type(depth.solver).__name__}-{size:g}"
