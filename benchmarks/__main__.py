"""The command line; README.md says how to use it."""

import importlib
import json
import os
import time
from pathlib import Path
from typing import Annotated

# Rivals share the memory of one GPU, so JAX must not take most of it at its first use.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from jaxflow.kernels import check

from . import SUITES, lease, machine_code, plots, predict, tune
from .device import provenance
from .timing import Options, Watch, library

COLUMNS = {
    "shape": "{}",
    "n": "{}",
    "mode": "{}",
    "rival": "{}",
    "config": "{}",
    "setting": "{}",
    "error": "{:.0e}",
    "evaluations": "{}",
    "trace_s": "{:.2f}",
    "lower_s": "{:.2f}",
    "compile_s": "{:.2f}",
    "traces": "{}",
    "programs_again": "{}",
    "ms": "{:.3g}",
    "vs_best": "{:.2f}",
    "vs_jnp": "{:.2f}",
    "vs_numpy": "{:.3f}",
    "vs_scan": "{:.2f}",
    "compile_vs_scan": "{:.2f}",
    "vs_forward": "{:.1f}",
    "vs_default": "{:.2g}",
    "asked": "{:.1%}",
    "replaced": "{:.1%}",
    "skipped": "{:.1%}",
    "registers": "{}",
    "spilled": "{}",
    "instructions": "{:.1f}",
    "loads": "{:.1f}",
    "of_floor": "{:.0%}",
    "floor": "{}",
    "peak_mib": "{:.3g}",
    "steps": "{}",
    "from_n": "{}",
    "time_exponent": "{:.2f}",
    "memory_exponent": "{:.2f}",
    "note": "{}",
}
UNITS = {
    "exps": "Gexp/s",
    "flops": "Gflop/s in float32",
    "tensor_flops": "Gflop/s in bfloat16",
    "bytes": "GB/s",
}
CPU_FACTOR = 4.5  # a CPU gets so many times the seconds of a full suite


def table(rows: list[dict]) -> Table:
    """A Markdown table of the rows, with the columns that they fill."""
    forms = {
        name: form for name, form in COLUMNS.items() if any(r.get(name) is not None for r in rows)
    }
    out = Table(*forms, box=box.MARKDOWN)
    for row in rows:
        cells = ((row.get(name), form) for name, form in forms.items())
        out.add_row(*("" if x is None else form.format(x) for x, form in cells))
    return out


def show(console: Console, report: dict):
    versions = ", ".join(f"{name} {v}" for name, v in report["versions"].items())
    commit = f"commit {report['commit']}" + " (modified)" * report["modified"]
    console.print(f"\n{report['suite']}: {report['seconds']:.0f} s on {report['device']}")
    console.print(f"Python {report['python']}, {versions}; {commit}")
    rates = report.get("ceilings", {}).items()
    if rates:
        console.print(", ".join(f"{rate / 1e9:.4g} {UNITS[name]}" for name, rate in rates))
    for rows in (report["rows"], report.get("fits", [])):
        if rows:
            console.print(table(rows))
    if report["skipped"]:
        console.print(f"Skipped, over the budget: {', '.join(report['skipped'])}")


def seconds(suite: str, quick: bool, patience: float) -> float:
    """The budget of a suite."""
    budget = importlib.import_module(f"benchmarks.{suite}").BUDGET_S
    factor = 1 if quick or jax.default_backend() != "cpu" else CPU_FACTOR
    return patience * factor * budget["quick" if quick else "full"]


def failures(reports: list[dict]) -> list[str]:
    """The rows of jaxflow that are wrong or failed."""
    return [
        f"{row['shape']} {row.get('mode', '')} {row['rival']}: {row['note']}"
        for report in reports
        for row in report["rows"]
        if library(row["rival"]) == "jaxflow"
        and row.get("note", "").startswith(("failed", "wrong"))
    ]


def _predicted(progress: Console) -> list[dict]:
    if (reason := machine_code.missing()) is not None:
        progress.print(reason, markup=False, soft_wrap=True)
        raise typer.Exit(1)
    return predict.run()


def main(
    suite: Annotated[
        str | None,
        typer.Argument(help=f"{', '.join(SUITES)}; all if none. Or tune, predict, lease."),
    ] = None,
    quick: Annotated[bool, typer.Option(help="A few small shapes.")] = False,
    backend: Annotated[
        list[str] | None, typer.Option(help="Time this backend of jaxflow too; repeatable.")
    ] = None,
    only: Annotated[str, typer.Option(help="Cases whose name starts so.")] = "",
    patience: Annotated[float, typer.Option(help="Multiplies the time that suites get.")] = 1.0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the reports here, and plots beside it.")
    ] = None,
    write: Annotated[bool, typer.Option(help="tune: keep the best tiles in configs.py.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="lease: where all goes; benchmarks/results/DEVICE if none.")
    ] = None,
    minutes: Annotated[float, typer.Option(help="lease: what it may take.")] = 7.5,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="lease: only say the plan.")] = False,
):
    """Benchmarks of jaxflow against its rivals; `tune` looks for the best tiles of its kernels,
    `predict` reads their speed off their machine code, and `lease` does what a short time on a GPU
    is best for."""
    if suite == "lease":
        raise typer.Exit(lease.main(out, minutes, dry_run, lambda text: print(text, flush=True)))
    if suite not in (None, "tune", "predict", *SUITES):
        names = ", ".join((*SUITES, "tune", "predict", "lease"))
        raise typer.BadParameter(f"suite must be one of {names}, got {suite!r}.")
    if write and suite != "tune":
        raise typer.BadParameter(
            "--write keeps what tune finds: python -m benchmarks tune --write."
        )
    console, progress = Console(width=170), Console(stderr=True)
    if suite == "predict":
        console.print(table(_predicted(progress)))
        return
    if suite == "tune" and (reason := tune.missing()) is not None:
        progress.print(reason, markup=False, soft_wrap=True)
        raise typer.Exit(1)
    if suite != "tune":  # which compares the kernels with the portable backend itself
        check.once(lambda text: progress.print(text, markup=False, soft_wrap=True))
    budgets = {name: seconds(name, quick, patience) for name in ([suite] if suite else SUITES)}
    plan = ", ".join(f"{name} {s:.0f} s" for name, s in budgets.items())
    progress.print(f"At most {sum(budgets.values()) / 60:.0f} min, give or take a case: {plan}")
    options = Options(quick=quick, only=only, backends=tuple(backend or ()))
    if suite == "tune":
        progress.print(tune.estimate(options))
    reports = []
    for name, budget_s in budgets.items():
        module, start = importlib.import_module(f"benchmarks.{name}"), time.perf_counter()
        lines: list[str] = []

        def save(found, skipped=(), name=name, start=start, lines=lines) -> dict:
            about = {"suite": name, "seconds": time.perf_counter() - start, "skipped": skipped}
            report = about | provenance() | found
            if json_file is not None:
                json_file.parent.mkdir(parents=True, exist_ok=True)
                json_file.write_text(json.dumps([*reports, report], indent=1) + "\n")
            if name == "tune":
                lines[:] = tune.conclude(found["rows"], report["device"], write=write)
            return report

        with progress.status(name) as status:
            log = lambda text, name=name: status.update(f"{name}: {text}")
            watch = Watch(budget_s, log, save)
            found = module.run(options, watch)
        reports.append(save(found, watch.skipped))  # so that a suite that dies costs no other
        show(console, reports[-1])
        for line in lines:
            console.print(line, markup=False, soft_wrap=True)
    if json_file is not None:
        for line in plots.draw(json_file):
            progress.print(line)
    if bad := failures(reports):
        progress.print("jaxflow is wrong or failed:", *bad, sep="\n  ")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
