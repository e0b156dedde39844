"""The settings of a command, declared once: they are its flags, their help, and its config.json.

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Simulation:
        n: int = flag(256, "Number of tokens.", COUNT)

`command` makes a command of such a class. Every value is checked by its type and its rule, wherever
it comes from: a flag, a preset, or the config.json of another run.
"""

import dataclasses
import enum
import inspect
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar, get_args, get_origin, runtime_checkable

import typer

# ------------------------------------------------------------------ rules


@runtime_checkable
class Rule(Protocol):
    """What a value has to be, in words, and whether one is."""

    def __str__(self) -> str: ...

    def allows(self, value: Any) -> bool: ...


LARGEST = 2**31 - 1  # of whole numbers: indices of arrays have 32 bits


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; with `open`, without the two."""

    low: float | int = -math.inf
    high: float | int = math.inf
    open: bool = False

    def __str__(self):
        if self.high == LARGEST:
            return f"at least {self.low:g} and less than 2^31"
        if self.high < math.inf:
            return f"between {self.low:.12g} and {self.high:.12g}" + ", exclusive" * self.open
        if self.low == -math.inf:
            return "a finite number"
        if self.open:
            return "positive" if self.low == 0 else f"more than {self.low:.12g}"
        return f"at least {self.low:.12g}"

    def allows(self, value: float | int) -> bool:
        inside = self.low < value < self.high if self.open else self.low <= value <= self.high
        return inside and math.isfinite(value)


class InputFile:
    """A path of a file to read; a device or a pipe has no end that could be known."""

    def __str__(self):
        return "a regular file that exists"

    def allows(self, value: Path) -> bool:
        return value.is_file()


class Input:
    """A path of a file or a folder to read."""

    def __str__(self):
        return "a regular file or a folder that exists"

    def allows(self, value: Path) -> bool:
        return value.is_file() or value.is_dir()


class InputFolder:
    """A path of a folder to read."""

    def __str__(self):
        return "a folder that exists"

    def allows(self, value: Path) -> bool:
        return value.is_dir()


@dataclasses.dataclass(frozen=True)
class OutputFile:
    """A path of a file to write, with its ending."""

    ending: str

    def __str__(self):
        return f"a file that ends in {self.ending}, in a folder that exists"

    def allows(self, value: Path) -> bool:
        named = value.suffix.lower() == self.ending and not value.is_dir()
        return named and value.parent.is_dir()


FINITE, POSITIVE, NOT_NEGATIVE = Range(), Range(0, open=True), Range(0)
COUNT, PAIR = Range(1, LARGEST), Range(2, LARGEST)
SHARE = Range(0, 1, open=True)
SEED = Range(0, 2**32 - 1)  # JAX keeps 32 bits of a seed, so that others would be the same again


class Counts:
    """Whole numbers as FIRST:LAST or FIRST:LAST:EVERY."""

    def __str__(self):
        return "FIRST:LAST or FIRST:LAST:EVERY, at most 32 whole numbers from 1 on, such as 2:12"

    def allows(self, value: str) -> bool:
        try:
            found = counts(value)
        except (ValueError, TypeError):  # no whole numbers, or not two or three of them
            return False
        return 1 <= found.start < found.stop <= LARGEST and found.step >= 1 and len(found) <= 32


def counts(value: str) -> range:
    """The numbers of such a text, LAST among them."""
    first, last, *every = map(int, value.split(":"))
    return range(first, last + 1, *every)


# ------------------------------------------------------------------ declarations


def flag(
    default: Any,
    help: str,
    rule: Rule | None = None,
    *,
    kept: bool = True,
    name: str | None = None,
) -> Any:
    """A field of settings that is a flag.

    `rule` is that of each value where there may be more; `kept`: whether it repeats the run; `name`
    is that of the flag, where it is not the field's.
    """
    about = {"help": help, "rule": rule, "kept": kept, "name": name, "by_place": False}
    return dataclasses.field(default=default, metadata=about)


def argument(help: str, rule: Rule | None = None, *, default: Any = dataclasses.MISSING) -> Any:
    """A field of settings that is given by its position, and has to be where it has no default."""
    about = {"help": help, "rule": rule, "kept": False, "name": None, "by_place": True}
    return dataclasses.field(default=default, metadata=about)


def flag_name(field: str) -> str:
    return "--" + field.replace("_", "-")


def _given_as(field: dataclasses.Field) -> str:
    return field.name.upper() if field.metadata["by_place"] else flag_name(field.name)


@runtime_checkable
class Settings(Protocol):
    """A dataclass of flags."""

    def check(self):
        """Raises ValueError for values that do not go together."""


AnySettings = TypeVar("AnySettings", bound=Settings)


def check(settings: Any):
    """Raises ValueError for the first value that its rule, or another value, does not allow."""
    for field in dataclasses.fields(settings):
        check_value(field, getattr(settings, field.name), _given_as(field))
    settings.check()


def check_value(field: dataclasses.Field, value: Any, where: str):
    rule = field.metadata["rule"]
    for item in value if isinstance(value, list) else [value]:
        if rule is not None and item is not None and not rule.allows(item):
            raise ValueError(f"{where} must be {rule}, got {item}.")


def to_json(settings: Any) -> dict[str, Any]:
    """The settings as JSON; paths are absolute, so that they hold in another folder."""
    return {field.name: _json(getattr(settings, field.name)) for field in _kept(settings)}


def _kept(settings: Any) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(settings) if field.metadata["kept"]]


def _json(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value.resolve())
    if isinstance(value, list):
        return [_json(v) for v in value]
    return value.value if isinstance(value, enum.Enum) else value


def from_json(kind: type, record: dict[str, Any], where: str) -> dict[str, Any]:
    """Values of settings from JSON, checked; `where` says in errors what was read."""
    fields = {field.name: field for field in _kept(kind)}
    if unknown := sorted(set(record) - set(fields)):
        raise ValueError(f"{where} has settings that are not known: {', '.join(unknown)}.")
    values = {k: _typed(fields[k].type, v, f"{k} in {where}") for k, v in record.items()}
    for name, value in values.items():
        check_value(fields[name], value, f"{name} in {where}")
    return values


def _typed(kind: Any, value: Any, where: str) -> Any:
    """A value of JSON as the type of a field: nothing is rounded, no flag is a number."""
    if type(None) in get_args(kind):
        if value is None:
            return None
        kind = next(k for k in get_args(kind) if k is not type(None))
    if get_origin(kind) is list and isinstance(value, list):
        return [_typed(get_args(kind)[0], item, where) for item in value]
    if issubclass(kind, enum.Enum):
        if value not in [member.value for member in kind]:
            raise ValueError(f"{where} must be one of {', '.join(map(str, kind))}, got {value!r}.")
        return kind(value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and type(value) is int and abs(value) < 2**53:
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{where} must be of type {kind.__name__}, got {value!r}.")
    return value


# ------------------------------------------------------------------ commands


_PLACE = inspect.Parameter.POSITIONAL_OR_KEYWORD


def command(
    app: typer.Typer,
    name: str,
    kind: type[AnySettings],
    base: Callable[[AnySettings, frozenset[str]], dict[str, Any]] = lambda settings, given: {},
) -> Callable[[Callable[[AnySettings], None]], Callable[[AnySettings], None]]:
    """Makes a function of settings a command, whose help is the docstring of their class.

    `base(settings, given)` has the values in place of the defaults, such as those of a preset;
    `given` names the flags of the command line, which go before them.
    """

    def register(fn):
        def run(ctx, **values):
            sources = {k: ctx.get_parameter_source(k) for k in values}
            given = frozenset(k for k, s in sources.items() if s and s.name == "COMMANDLINE")
            flags: Any = kind(**values)
            kept = {k: v for k, v in base(flags, given).items() if k not in given}
            settings = dataclasses.replace(flags, **kept)
            check(settings)
            fn(settings)

        run.__doc__ = inspect.cleandoc(kind.__doc__ or "").replace("`", "")
        context = inspect.Parameter("ctx", _PLACE, annotation=typer.Context)
        parameters = [context, *_parameters(kind)]
        vars(run)["__signature__"] = inspect.Signature(parameters)
        line = " ".join(run.__doc__.partition("\n\n")[0].split())
        app.command(name, short_help=line)(run)
        return fn

    return register


def _parameters(kind: Any) -> Iterator[inspect.Parameter]:
    for field in dataclasses.fields(kind):
        help, rule = field.metadata["help"], field.metadata["rule"]
        if isinstance(rule, Range) and rule not in (FINITE, COUNT, SEED):
            help += f" [{rule}]"
        if field.metadata["by_place"]:
            missing = field.default is dataclasses.MISSING
            default: Any = typer.Argument(... if missing else field.default, help=help)
        else:
            named = field.metadata["name"]
            names = [named or flag_name(field.name)] if named or field.type is not bool else []
            default = typer.Option(field.default, *names, help=help)
        yield inspect.Parameter(field.name, _PLACE, default=default, annotation=field.type)
