"""Where the command line ends: every expected failure is one line and an exit code.

2    refused: a flag, a file or a folder is not as it must be; nothing was begun
1    a solve or a training failed, and says where
130  Ctrl-C       143  SIGTERM
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import typer
from typer.core import TyperGroup

from .console import plain

REFUSED, FAILED = 2, 1
_REFUSALS = ValueError, TypeError, MemoryError, OSError, ImportError, NotImplementedError

Result = TypeVar("Result")


class Stopped(BaseException):
    """A signal that ends the command, as KeyboardInterrupt does for Ctrl-C."""

    def __init__(self, number: int):
        self.exit_code = 128 + number


class Group(TyperGroup):
    """Commands, whose help and names take no import of Pydantic."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The options, all of them flags: typer has Pydantic read the default None as well."""
        options = super().get_params(ctx)
        for option in options:
            option.default = False
        return options


class Boundary(Group):
    """The commands, and what becomes of their errors."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        try:
            with _sigterm():
                code = super().main(*args, standalone_mode=False, **extra)
        except typer.TyperException as error:
            text = _usage(error)
            if "Usage:" in text:  # no command was given: it is the help
                typer.echo(text, err=True)
                sys.exit(REFUSED)
            code = _say(text, REFUSED)
        except Stopped as stopped:
            code = stopped.exit_code
        except BrokenPipeError:  # whoever read the output has gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = FAILED
        except _REFUSALS as error:
            code = _say(_text(error), REFUSED)
        except RuntimeError as error:
            if (text := _failure(error)) is None:
                raise
            code = _say(text, FAILED)
        sys.exit(code if isinstance(code, int) else 0)


def _say(text: str, code: int) -> int:
    line = " ".join(line.strip() for line in text.splitlines() if line.strip())
    typer.echo(f"{typer.style('error:', fg='red')} {plain(line)}", err=True)
    return code


def _usage(error: typer.TyperException) -> str:
    """What is wrong with a flag, and what was given."""
    text = error.format_message().replace("Value error, ", "").partition(", unable to parse")[0]
    found = getattr(error.__cause__, "errors", None)  # of Pydantic, which read the value
    if not found or "is not one of" in text:  # which begins with the value
        return text
    return f"{text.rstrip('.')}, got {found()[0]['input']!r}."


def _text(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename} cannot be read or written: {error.strerror}. Take another path."
    if isinstance(error, MemoryError) and not str(error):
        return "there is not enough memory: take fewer or smaller tokens."
    return str(error) or type(error).__name__


def _failure(error: RuntimeError) -> str | None:
    """What a solve, a training, a check or a compiled program says of its failure, or None."""
    # Here, as only what imports them raises their errors.
    import equinox as eqx

    from ..flow import FlowError
    from ..kernels.check import CheckError
    from ..training import TrainingError

    text = str(error)
    if isinstance(error, FlowError | TrainingError | CheckError):
        return text
    if "RESOURCE_EXHAUSTED" in text:
        return "the device has too little memory: take fewer or smaller tokens."
    if isinstance(error, eqx.EquinoxRuntimeError):
        return text.partition("\n\n")[0]
    return None


# ------------------------------------------------------------------ signals


@contextmanager
def _sigterm() -> Iterator[None]:
    """SIGTERM raises Stopped, where it is not handled already."""

    def stop(number: int, _frame: Any):
        raise Stopped(number)

    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


_unfinished: list[threading.Event] = []


def interruptible(work: Callable[..., Result], *args: Any) -> Result:
    """work(*args), which Ctrl-C and SIGTERM end at once: a compiled program hears no signal, so
    that it runs in a thread while this one listens."""
    # Here, as help needs neither.
    import jax
    import jax.numpy as jnp

    outcome: list[Any] = []
    done = threading.Event()  # of a join that a signal cut off, Python takes the thread for ended
    double = jnp.result_type(float) == jnp.float64

    def run():
        try:
            with jax.enable_x64(double):  # which a thread does not inherit
                outcome.append((jax.block_until_ready(work(*args)), None))
        except BaseException as error:
            outcome.append((None, error))
        done.set()

    _unfinished.append(done)
    threading.Thread(target=run, daemon=True).start()
    while not done.wait(0.2):
        pass
    _unfinished.remove(done)
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


def leave(code: int | str | None):
    """Ends the process, without waiting for a solve that was interrupted."""
    if not all(done.is_set() for done in _unfinished):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0)
    sys.exit(code)
