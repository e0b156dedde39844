"""Steps that the device makes while the host looks at those before.

    host      batch 1, launch 1, batch 2, launch 2, fetch 1, batch 3, launch 3, fetch 2, ...
    device                     step 1               step 2                     step 3

A step is launched before the numbers of the one before are fetched, so the device waits neither for
Python nor for the next batch. What a failed step leaves as it was, the one behind it does too.
"""

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .depths import Steps, seed_of
from .step import State, Step, update


class Made(NamedTuple):
    """A step, as it was drawn: its number from 0, its batch, whether it is ok, and what it
    measured."""

    step: Step
    number: int
    batch: Any
    ok: Any
    metrics: dict[str, Any]


class Ahead:
    """Launches steps, and fetches what they measured, in their order.

    - `state`: after the last step launched; that of the last one fetched where none is underway.
    - `batches`: the batch of a step, on its devices.
    """

    def __init__(self, steps: Steps, batches: Callable[[int], Any], state: State, number: int):
        self.steps, self.batches, self.state = steps, batches, state
        self.seed = seed_of(state.key)
        self.next = number
        self._ok = steps.own.placement.state(jnp.array(True))
        self._underway: deque[Made] = deque()

    def __bool__(self) -> bool:
        """Whether a step is underway."""
        return bool(self._underway)

    def launch(self):
        """Starts the next step, without waiting for it."""
        step = self.steps.at(self.seed, self.next)
        batch, number = self.batches(self.next), np.int32(self.next)
        given = step, batch, number, self._ok
        self.state, self._ok, metrics = update(given, self.state)
        self._underway.append(Made(step, self.next, batch, self._ok, metrics))
        self.next += 1

    def fetch(self) -> Made:
        """Waits for the first step underway: the one fetch from the device that a step takes."""
        made = self._underway.popleft()
        ok, metrics = jax.device_get((made.ok, made.metrics))
        return made._replace(ok=bool(ok), metrics={k: float(v) for k, v in metrics.items()})

    def stop(self) -> State:
        """The state, with nothing underway any more: for a step that failed."""
        self._underway.clear()
        return self.state
