"""The command line; README.md says how to use it. JAX is imported when something is measured."""

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from . import SUITES, machine

# Rivals share the memory of one GPU, so JAX must not take most of it at its first use.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

SUITE_LIST = "\n\n".join(f"{name}: {question}" for name, question in SUITES.items())
app = typer.Typer(
    name="python -m benchmarks",
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Benchmarks of jaxflow against its rivals.\n\n"
    "python -m benchmarks --quick: all suites, small shapes, under 8 minutes.\n\n"
    "python -m benchmarks kernels: one suite; kernels --help: its options.",
    epilog=f"Suites:\n\n{SUITE_LIST}",
)

WHICH, HOW_LONG, WRITTEN = "Which cases", "How long", "What is written"
Quick = Annotated[
    bool,
    typer.Option(help="A few small shapes; all suites in under 8 minutes.", rich_help_panel=WHICH),
]
Only = Annotated[str, typer.Option(help="The cases whose name starts so.", rich_help_panel=WHICH)]
Patience = Annotated[
    float,
    typer.Option(help="Multiplies the seconds that suites get.", min=0.0, rich_help_panel=HOW_LONG),
]
JsonFile = Annotated[
    Path | None,
    typer.Option("--json", help="The reports, and pictures beside it.", rich_help_panel=WRITTEN),
]


@app.command("run", epilog=f"Suites:\n\n{SUITE_LIST}")
def run(
    suite: Annotated[str | None, typer.Argument(help="One of the suites; all if none.")] = None,
    quick: Quick = False,
    only: Only = "",
    backend: Annotated[
        list[str] | None,
        typer.Option(help="Time this backend of jaxflow, too; repeatable.", rich_help_panel=WHICH),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            help="All that the run may take; what does not fit is skipped and named.",
            min=0.0,
            rich_help_panel=HOW_LONG,
        ),
    ] = None,
    patience: Patience = 1.0,
    cap: Annotated[
        float,
        typer.Option(
            help="A call that takes more seconds is not repeated.",
            min=0.0,
            rich_help_panel=HOW_LONG,
        ),
    ] = 2.0,
    threads: Annotated[
        int | None,
        typer.Option(
            help="Cores that jaxflow and its rivals may use; all if none.", rich_help_panel=HOW_LONG
        ),
    ] = None,
    json_file: JsonFile = None,
    csv_file: Annotated[
        Path | None,
        typer.Option("--csv", help="All rows as one table.", rich_help_panel=WRITTEN),
    ] = None,
):
    """One suite, or all of them in turn: right answers timed against rivals. (The default.)"""
    start = time.perf_counter()
    if suite is not None and suite not in SUITES:
        raise typer.BadParameter(f"suite must be one of {', '.join(SUITES)}, got {suite!r}.")
    if threads is not None:
        _limit_threads(threads)
    import jax
    from rich.console import Console

    from jaxflow.kernels import check

    from . import command, pace
    from .timing import Options, Samples

    shown, progress = Console(width=170), Console(stderr=True)
    say = lambda text: progress.print(text, markup=False, soft_wrap=True)
    check.once(say)
    budgets = {n: command.budget(n, quick, patience) for n in ([suite] if suite else SUITES)}
    options = Options(quick, only, tuple(backend or ()), Samples(cap_s=cap))
    output = command.Output(json_file, csv_file)
    earlier = pace.earlier(quick, jax.default_backend())
    job = command.Run(options, output, shown, progress, earlier)
    total_s = command.total(budgets, quick, minutes)
    say(command.plan(earlier, budgets, total_s, job.clock.slowdown))
    if (words := machine.warning(machine.load())) is not None:
        say(words)
    limited = quick or minutes is not None
    left = total_s - (time.perf_counter() - start)
    with job.ends_after(left) if limited else contextlib.nullcontext():
        code = job.all(budgets, (1 - command.RESERVE) * total_s, start)
        job.draw()
    if code:
        raise typer.Exit(code)


@app.command("tune")
def tune_tiles(
    quick: Quick = False,
    only: Only = "",
    patience: Patience = 1.0,
    json_file: JsonFile = None,
    write: Annotated[bool, typer.Option(help="Keep the best tiles in configs.py.")] = False,
):
    """Looks for the best tiles of the CUDA kernels on the GPU at hand."""
    from rich.console import Console

    from . import command, tune
    from .timing import Options

    shown, progress = Console(width=170), Console(stderr=True)
    if (reason := tune.missing()) is not None:
        progress.print(reason, markup=False, soft_wrap=True)
        raise typer.Exit(1)
    options = Options(quick, only)
    progress.print(tune.estimate(options))
    conclude = lambda made: tune.conclude(made["rows"], made["device"], write=write)
    output = command.Output(json_file)
    job = command.Run(options, output, shown, progress, conclude=conclude)
    budget_s = command.budget("tune", quick, patience)
    if code := job.all({"tune": budget_s}, budget_s, time.perf_counter()):
        raise typer.Exit(code)


@app.command("predict")
def predicted():
    """Reads the speed of the particles' kernels off their machine code; it needs no GPU."""
    from rich.console import Console

    from . import machine_code, predict, report

    if (reason := machine_code.missing()) is not None:
        Console(stderr=True).print(reason, markup=False, soft_wrap=True)
        raise typer.Exit(1)
    Console(width=170).print(report.table(rows := predict.run()))
    print(report.legend(rows))


@app.command("lease")
def on_lease(
    out: Annotated[
        Path | None, typer.Option(help="Where all goes; benchmarks/results/DEVICE if none.")
    ] = None,
    minutes: Annotated[float, typer.Option(help="What it may take.")] = 7.5,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say the plan.")] = False,
):
    """Does what a short time on a GPU machine is best for."""
    from . import lease

    raise typer.Exit(lease.main(out, minutes, dry_run, lambda text: print(text, flush=True)))


@app.command("tables")
def written_tables(
    check: Annotated[bool, typer.Option("--check", help="Only say which differ.")] = False,
):
    """Writes the tables of results in the documents anew, from benchmarks/results."""
    from . import tables

    stale = tables.update(write=not check)
    for path in stale:
        print(f"{path} {'differs from the results' if check else 'was written anew'}")
    if check and stale:
        raise typer.Exit(1)


def _limit_threads(number: int):
    try:
        machine.limit_threads(number)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def main(arguments: list[str]):
    """`run` may be left out."""
    names = {command.name for command in app.registered_commands}
    named = arguments and (arguments[0] in names or arguments[0] == "--help")
    app(arguments if named else ["run", *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])
