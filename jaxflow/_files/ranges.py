"""Numbers that have to lie in a range."""

from typing import Any

import numpy as np


def first_outside(values: np.ndarray, low: int, high: int) -> tuple[Any, str] | None:
    """The first number that does not lie in low ... high, NaN included, and its place in words.

    `None` if all of them do.
    """
    if not values.size or (values.min() >= low and values.max() <= high):
        return None
    outside = ~((values >= low) & (values <= high))
    index = np.unravel_index(outside.argmax(), outside.shape)
    return values[index].item(), f"at {[int(i) for i in index]}"
