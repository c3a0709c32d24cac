"""The command line: one verb a job of a user. Nothing heavy is imported before a verb is called.

harness data       import, simulate, list domains
harness plan       what would run, what is cached and why
harness dry-run    stages, steps and memory of a method on a suite, without data or weights
harness run        run a suite: records, MLflow, table
harness table      the comparison table from the records
...
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from harness.data.cli import app as data_app

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="An honest benchmark of generative and sequential recommendation: blind scoring, records, MLflow, tables.",
    epilog="First steps:  harness doctor  |  harness run --suite smoke  |  harness new-baseline my_model",
)
app.add_typer(data_app, name="data", help="Domains: import files, simulate, list, show a card.")

SuiteOption = Annotated[str, typer.Option("--suite", "-s", help="Name in harness/suites, path to a .toml file, or auto.")]
ExecutorOption = Annotated[
    str, typer.Option(help="Where methods run: local (child processes), docker (a container a run), worker (compose).")
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
MethodOption = Annotated[list[str] | None, typer.Option("--method", "-m", help="Only this method, NAME or NAME/CONFIG; repeatable.")]
DomainOption = Annotated[list[str] | None, typer.Option("--domain", "-d", help="Only this domain; repeatable.")]

SeedsOption = Annotated[int | None, typer.Option(min=1, help="Only the first so many seeds of the suite.")]
Selected = tuple[list[str] | None, list[str] | None, int | None]


def _console() -> Any:
    from rich.console import Console

    return Console(soft_wrap=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 160)


def _session(suite: str, executor: str, device: str, selected: Selected = (None, None, None)) -> tuple[Any, Any, Any]:
    from harness.commands.prepare import open_session

    console = _console()
    session, runner = open_session(suite, executor, device, _selection(selected), console.print)
    return session, runner, console


def _selection(selected: Selected) -> Any:
    from harness.commands.prepare import Selection

    methods, domains, seeds = selected
    return Selection(tuple(methods or ()), tuple(domains or ()), seeds)


@app.command(epilog="Example:  harness run --suite classic -m recbole/sasrec_ce -d office2014 --jobs 1")
def run(
    suite: SuiteOption = "auto",
    executor: ExecutorOption = "local",
    device: DeviceOption = "auto",
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs at the same time; default: one a GPU, or what the cores allow.")] = None,
    method: MethodOption = None,
    domain: DomainOption = None,
    seeds: SeedsOption = None,
    mlflow: Annotated[bool, typer.Option(help="Publish to MLflow (MLFLOW_TRACKING_URI, or a local server).")] = True,
) -> None:
    """Run a suite: every planned run ends with a record; then MLflow and the table. Run it again to go on."""
    from harness.commands.run import run_suite

    raise typer.Exit(run_suite(suite, executor, device, jobs, _selection((method, domain, seeds)), mlflow, _console()))


@app.command(epilog="Example:  harness plan --suite amazon2023")
def plan(
    suite: SuiteOption = "auto",
    executor: ExecutorOption = "local",
    device: DeviceOption = "auto",
    method: MethodOption = None,
    domain: DomainOption = None,
    seeds: SeedsOption = None,
) -> None:
    """Show what `run` would do: which runs, what is cached and why, what it will roughly cost. Starts nothing."""
    from harness.commands.views import show_plan

    session, runner, console = _session(suite, executor, device, (method, domain, seeds))
    raise typer.Exit(show_plan(session, runner, console))


@app.command("dry-run", epilog="Example:  harness dry-run utgrec/paper --suite amazon2023 --devices 8 --memory 80")
def dry_run(
    method: Annotated[str, typer.Argument(help="NAME/CONFIG of a method that brings a dry_run.py.")],
    suite: SuiteOption = "amazon2023",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda",
    devices: Annotated[int, typer.Option(min=1, help="How many train together.")] = 1,
    memory: Annotated[float | None, typer.Option(min=0, help="GiB that a device has: does it fit?")] = None,
) -> None:
    """Show stages, steps and memory of a method on a suite. Starts nothing, and needs neither data nor weights."""
    from harness.commands import dry_run as program
    from harness.paths import Paths

    how: dict[str, Any] = {"device": device, "devices": devices, "memory_gib": memory}
    raise typer.Exit(program.dry_run(method, suite, Paths.default(), _console(), **how))


@app.command(epilog="Example:  harness table --suite smoke")
def table(
    suite: SuiteOption = "auto",
    executor: ExecutorOption = "local",
    device: DeviceOption = "auto",
    method: MethodOption = None,
    domain: DomainOption = None,
    seeds: SeedsOption = None,
) -> None:
    """Print the comparison table from the records and write it as Markdown, CSV, LaTeX and HTML."""
    from harness.commands.views import show_table

    session, _, console = _session(suite, executor, device, (method, domain, seeds))
    raise typer.Exit(show_table(session, console))


@app.command(epilog="Example:  harness score --suite classic     (after a change of harness/metrics.py)")
def score(suite: SuiteOption = "auto", executor: ExecutorOption = "local", device: DeviceOption = "auto") -> None:
    """Score finished predictions again. Trains nothing."""
    from harness.commands.views import score_again

    session, runner, console = _session(suite, executor, device)
    raise typer.Exit(score_again(session, runner, console))


@app.command(epilog="Example:  MLFLOW_TRACKING_URI=http://localhost:5000 harness publish --suite smoke")
def publish(suite: SuiteOption = "auto", executor: ExecutorOption = "local", device: DeviceOption = "auto") -> None:
    """Rebuild the MLflow view of a suite from its records. Publishing twice changes nothing."""
    from harness.commands.views import publish as publish_session

    session, _, console = _session(suite, executor, device)
    raise typer.Exit(publish_session(session, console))


@app.command(epilog="Example:  harness keep --suite classic")
def keep(suite: SuiteOption = "auto", executor: ExecutorOption = "local", device: DeviceOption = "auto") -> None:
    """Copy the records and tables of a suite from results/local to results/, where git sees them."""
    from harness.commands.views import keep as keep_session

    session, _, console = _session(suite, executor, device)
    raise typer.Exit(keep_session(session, console))


@app.command()
def ui() -> None:
    """Open MLflow on the results of this project (Ctrl-C ends it)."""
    from harness.paths import Paths
    from harness.tracking import ui as open_ui

    open_ui(Paths.default().results)


@app.command(epilog="Example:  harness check fmlprec")
def check(
    name: Annotated[str, typer.Argument(help="Name of a method, or path of its folder.")],
    config: Annotated[
        str | None, typer.Option(help="Configuration to check; default: the one it brings to the smoke suite, else its first.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="Leave out the two leak tests, which take longest.")] = False,
) -> None:
    """Prove that a method keeps the contract: outputs, determinism, better than random, no leak, no stray writes."""
    from harness.commands.check import check_method

    raise typer.Exit(check_method(name, config, quick, _console()))


@app.command("new-baseline", epilog="Example:  harness new-baseline my_model")
def new_baseline(name: Annotated[str, typer.Argument(help="Lower case letters, digits and _.")]) -> None:
    """Copy baselines/_template to baselines/NAME: a method that works, for you to change."""
    from harness.commands.new_baseline import create

    raise typer.Exit(create(name, _console()))


@app.command()
def doctor() -> None:
    """Look at this machine: GPU, memory, disk, versions, Docker, isolation; what is missing and the command that mends it."""
    from harness.commands.doctor import examine

    raise typer.Exit(examine(_console()))


@app.command(hidden=True)
def worker(jobs: Annotated[Path | None, typer.Option(help="The jobs volume; default HARNESS_JOBS or /jobs.")] = None) -> None:
    """Run the jobs that a benchmark container puts into the jobs volume (compose starts this)."""
    from harness.execute.worker import serve

    serve(jobs)


@app.command(hidden=True)
def environments() -> None:
    """Make the virtual environments of methods that bring a requirements.txt (the image build calls this)."""
    from harness.environments import pythons
    from harness.method import find_methods
    from harness.paths import Paths

    paths = Paths.default()
    pythons(find_methods(paths).values(), paths, _console().print)


def main() -> None:
    """Console entry: errors a user can mend are printed in one line each, without a traceback."""
    try:
        app()
    except Exception as error:
        if not isinstance(error, _errors_of_users()):
            raise
        typer.secho(str(error), fg=typer.colors.RED, err=True)
        sys.exit(2)


def _errors_of_users() -> tuple[type[Exception], ...]:
    """Errors whose message is all that a user needs. Imported when one has happened, not at every start."""
    from harness.contract import ContractError
    from harness.data.source import DataError
    from harness.tracking import ServerError, TrackingError
    from harness.values import ConfigError

    return ConfigError, ContractError, DataError, ServerError, TrackingError


if __name__ == "__main__":
    main()
