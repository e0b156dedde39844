"""Attention of maps y = W x + b, each with a weight (out, in) of its own."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .sources import Source


class Heads(NamedTuple):
    """The sizes of attention: d, H, G and p."""

    dim: int
    heads: int
    kv_heads: int
    head_dim: int

    def sources(
        self,
        attention: Callable[[Any], Any],
        names: Sequence[str],
        *,
        bias: bool,
        output_bias: bool | None = None,
    ) -> list[Source]:
        """Of the field of a wrapper in a model, whose query, key, value and output have these
        names; `output_bias`: whether that of the output is there too, by default as the others."""
        d, p = self.dim, self.head_dim
        pairs = zip(
            ("query", "key", "value"), names, (self.heads, *[self.kv_heads] * 2), strict=False
        )
        found = []
        for field, name, heads in pairs:
            split = lambda w, heads=heads: w.reshape(heads, p, d)
            find = lambda m, field=field: getattr(attention(m).field, field)
            found.append(Source(find, f"{name}.weight", (heads * p, d), split))
            if bias:
                find = lambda m, field=field: getattr(attention(m).field, f"{field}_bias")
                found.append(Source(find, f"{name}.bias", (heads * p,)))
        split = lambda w: w.reshape(d, self.heads, p).transpose(1, 0, 2)
        shape = d, self.heads * p
        found.append(
            Source(lambda m: attention(m).field.output, f"{names[3]}.weight", shape, split)
        )
        if bias if output_bias is None else output_bias:
            find = lambda m: attention(m).field.output_bias
            found.append(Source(find, f"{names[3]}.bias", (d,)))
        return found


def part(k: int) -> Callable[[Any], Any]:
    """The k-th part of the layers of a model."""
    return lambda m: m.field.curve.coefficients.fields[k]
