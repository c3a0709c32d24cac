"""``harness data``: fetch, model, import, export, prepare, simulate, list, card, verify.

In: the command line. Out: domains under the data root, tables on the terminal. Heavy modules are imported inside the
commands, so that ``harness --help`` stays quick.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from harness.data.source import DomainSummary

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Make and look at domains, from download to card.",
)

Root = Annotated[Path | None, typer.Option(help="Folder of the domains. Default: $HARNESS_DATA, else data/domains.")]
Replace = Annotated[bool, typer.Option("--replace", help="Replace a domain of this name that has other content.")]


OTHER_FRAMEWORKS = ["*.onnx*", "*.h5", "*.msgpack", "*.ot", "openvino*", "rust*"]
"""Files of a hub model that hold the same weights once more."""


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """Wrong input is the user's to mend: one line, no traceback."""
    from rich.console import Console

    from harness.contract import ContractError
    from harness.data.source import DataError

    try:
        yield
    except (DataError, ContractError) as error:
        Console(stderr=True).print(f"[bold red]error[/] {_plain(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None


def _console() -> Console:
    """A wide console where the output is no terminal: a log must not cut names."""
    from rich.console import Console

    return Console(soft_wrap=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 140)


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


@app.command("import")
def import_(
    path: Annotated[
        Path, typer.Argument(help="A folder of sequences.parquet and items.parquet, of UTGRec, of LC-Rec, of RecBole, or a S3-Rec text.")
    ],
    name: Annotated[str | None, typer.Argument(help="Name of the domain: small letters, digits, _. Default: the name of the path.")] = None,
    format: Annotated[str, typer.Option(help="auto, parquet, recbole, s3rec, utgrec or lcrec.")] = "auto",
    prepare: Annotated[bool, typer.Option("--prepare", help="Keep the earliest of repeated items, then the iterative 5-core.")] = False,
    ignore: Annotated[list[str] | None, typer.Option(help="A column of the source to leave out; may be given several times.")] = None,
    replace: Replace = False,
    root: Root = None,
) -> None:
    """Import sequences that somebody has prepared. Lists are taken as given: oldest first, nothing filtered.

    The last item of a user becomes the hidden test target, the one before it the validation target. Users with
    fewer than three interactions are dropped and counted.

    [bold]Examples[/]

      harness data import ../shared/data/beauty2014

      harness data import dataset/ml-100k/ml-100k.inter ml_100k --ignore release_year --ignore class

      harness data import Beauty.txt beauty --format s3rec --prepare

      harness data import AmazonReviews2023/Musical_Instruments musical_instruments --format utgrec
    """
    from harness.data.importers import import_domain

    with _plain_errors():
        domain = name or path.resolve().stem.lower().replace("-", "_")
        _report(import_domain(path, domain, root=root, format=format, prepare=prepare, ignore=ignore or (), overwrite=replace))


@app.command()
def export(
    name: Annotated[str, typer.Argument(metavar="DOMAIN", help="A domain of `harness data list`.")],
    format: Annotated[str, typer.Argument(metavar="FORMAT", help="parquet, recbole, s3rec, utgrec or lcrec.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder; RecBole and LC-Rec want the domain's name.")],
    root: Root = None,
) -> None:
    """Write a domain in the format of another program, whole or not at all. Importing it again gives the same domain.

    [bold]The files hold the test targets[/]: this reads the private part, for you. Keep them away from methods that are to be compared
    here. What the format cannot carry is said, and stands in exported.json; parquet carries everything.

    [bold]Examples[/]

      harness data export musical_instruments utgrec ~/AmazonReviews2023/Musical_Instruments

      harness data export beauty2014 recbole ~/dataset/beauty2014
    """
    from harness.data.domain import data_root
    from harness.data.export import export_domain

    with _plain_errors():
        done = export_domain((root or data_root()) / name, format, folder)
        console = _console()
        console.print(f"[green]written[/] {_plain(str(done.path))}: {_plain(', '.join(done.files))}", highlight=False)
        for line in done.lost:
            console.print(f"  [yellow]not carried by {format}[/]: {_plain(line)}", highlight=False)


@app.command()
def fetch(
    release: Annotated[str, typer.Argument(help="amazon2023: Amazon Reviews 2023.")],
    categories: Annotated[
        list[str] | None, typer.Argument(help="Musical_Instruments, Video_Games, ..., or paper (all nine), targets, pretraining.")
    ] = None,
    part: Annotated[list[str] | None, typer.Option(help="Only this part: 5core, reviews or meta; may be given several times.")] = None,
    to: Annotated[Path | None, typer.Option(help="Folder of the raw files. Default: $HARNESS_RAW, else data/raw.")] = None,
    raw: Annotated[Path | None, typer.Option(help="Take files that are in this folder already: checked, then linked.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be fetched, with sizes.")] = False,
    parallel: Annotated[int, typer.Option(min=1, max=16, help="Files at a time.")] = 4,
    verify: Annotated[bool, typer.Option("--verify", help="Read again also what was checked before.")] = False,
    hub: Annotated[str | None, typer.Option(help="Address of another hub, or none. Default: $HARNESS_AMAZON2023_HUB.")] = None,
    mirror: Annotated[str | None, typer.Option(help="Address of another mirror, or none. Default: $HARNESS_AMAZON2023_MIRROR.")] = None,
) -> None:
    """Fetch the official files of Amazon Reviews 2023, checked by digest. Stop it at any time: the same command goes on.

    From the Hugging Face data set at a pinned revision, else from the server of its authors.

    [bold]Examples[/]

      harness data fetch amazon2023 --dry-run

      harness data fetch amazon2023

      harness data fetch amazon2023 Video_Games Software --part 5core --part meta

      harness data fetch amazon2023 --raw ~/downloads
    """
    from harness.data.fetch import Fetch
    from harness.data.fetch_view import View, plan_table
    from harness.data.release import choose, raw_root, sources
    from harness.data.source import DataError
    from harness.values import nearest

    with _plain_errors():
        if release != "amazon2023":
            raise DataError(f"{release!r} is no release that can be fetched.{nearest(release, ['amazon2023'])}")
        folder = (to or raw_root()).absolute()
        console = _console()
        wanted, servers = choose(categories or (), part or ()), sources(hub, mirror)
        if dry_run:
            with Fetch(wanted, folder, servers, raw=raw) as dry:
                plan_table(dry.plan(), folder, console)
            return
        try:
            with View(console, folder) as view, Fetch(wanted, folder, servers, raw=raw, parallel=parallel, verify=verify, show=view) as run:
                run.run()
        except KeyboardInterrupt:
            console.print("[yellow]stopped[/]: what has arrived is kept; the same command goes on")
            raise typer.Exit(130) from None
        console.print(f"[green]complete[/]: {len(wanted)} files in {_plain(str(folder))}", highlight=False)


@app.command()
def model(
    hub_id: Annotated[str, typer.Argument(help="owner/name of a model on the Hugging Face hub.")],
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch; configurations pin a commit.")] = None,
) -> None:
    """Fetch an encoder's weights into the Hugging Face cache, where methods find them: they have no network.

    The cache is $HF_HOME, else ~/.cache/huggingface; with Docker data/huggingface.

    [bold]Examples[/]

      harness data model sentence-transformers/sentence-t5-base --revision 50c53e206f8b01c9621484a3c0aafce4e55efebf
    """
    from huggingface_hub import snapshot_download

    from harness.data.source import DataError

    with _plain_errors():
        try:
            folder = snapshot_download(
                hub_id, revision=revision, ignore_patterns=["*.onnx*", "*.h5", "*.msgpack", "*.ot", "openvino*", "rust*"]
            )
        except Exception as error:  # the hub's, the network's and the disk's, of many kinds; all say what was wrong
            raise DataError(f"{hub_id} could not be fetched: {error}") from error
        _console().print(f"[green]complete[/]: {_plain(str(folder))}", highlight=False)


@app.command()
def prepare(
    raw: Annotated[Path, typer.Argument(help="Folder with meta_categories/, and review_categories/ or benchmark/, as fetched.")],
    category: Annotated[str, typer.Argument(help="Musical_Instruments, Video_Games, ..., or paper: all nine of the paper.")],
    name: Annotated[
        str | None, typer.Argument(help="Name of the domain. Default: the category in small letters; with time-v1, _time behind it.")
    ] = None,
    route: Annotated[str, typer.Option(help="auto, raw, last-out, or both: prepare on both routes and refuse a difference.")] = "auto",
    protocol: Annotated[str, typer.Option(help="loo-v1: leave one out; time-v1: the authors' two cuts in time.")] = "loo-v1",
    replace: Replace = False,
    root: Root = None,
) -> None:
    """Prepare files of Amazon Reviews 2023: earliest of repeats, iterative 5-core, last item out.

    Two routes lead to the same domain: the authors' 5-core files (last-out; auto takes them where they are), or their rules applied
    to the reviews (raw).

    With --protocol time-v1 the same histories are cut by time instead: training before 2021-08-11 00:56:54 UTC, validation before
    2022-07-16 20:18:49 UTC, then the test; one prediction for each user who comes after that. It is a domain of its own.

    [bold]Examples[/]

      harness data prepare data/raw Musical_Instruments

      harness data prepare data/raw paper

      harness data prepare data/raw Video_Games --route both

      harness data prepare data/raw paper --protocol time-v1
    """
    from harness.data.prepare import default_name, prepare_raw
    from harness.data.simulate import CATEGORIES
    from harness.data.source import DataError

    with _plain_errors():
        if name and category == "paper":
            raise DataError("paper is nine domains: leave the name out")
        for each in CATEGORIES if category == "paper" else [category]:
            domain = name or default_name(each, protocol)
            _report(prepare_raw(raw, each, domain, root=root, overwrite=replace, route=route, protocol=protocol))


@app.command()
def pictures(
    names: Annotated[list[str], typer.Argument(help="Prepared domains, categories (all domains prepared from them), or paper.")],
    raw: Annotated[Path | None, typer.Option(help="Folder of the raw files. Default: $HARNESS_RAW, else data/raw.")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Also ask again for what failed before.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Read all kept pictures again first; fetch those that are damaged.")] = False,
    every_item: Annotated[bool, typer.Option("--all", help="Every item of the metadata, not only those of the domains.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show how many would be fetched.")] = False,
    per_host: Annotated[int, typer.Option(min=1, max=64, help="Requests of one host at a time.")] = 16,
    server: Annotated[str | None, typer.Option(help="Ask this server for all of them. Default: $HARNESS_AMAZON2023_PICTURES.")] = None,
    root: Root = None,
) -> None:
    """Fetch the product pictures of prepared domains, and put them in. Stop it at any time: the same command goes on.

    One picture an item: MAIN, in the size large. What fails stands with its reason in RAW/pictures/CATEGORY/ledger.jsonl. A domain
    with other pictures has another digest.

    [bold]Examples[/]

      harness data pictures paper --dry-run

      harness data pictures musical_instruments video_games

      harness data pictures Office_Products --retry-failed
    """
    from harness.data.domain import data_root
    from harness.data.picture_fetch import Manners
    from harness.data.pictures import Download, items_of, put_into_domain, resolve
    from harness.data.pictures_view import View, coverage, plan_table
    from harness.data.release import raw_root

    with _plain_errors():
        console, folder = _console(), (raw or raw_root()).absolute()
        domains = resolve(names, root or data_root())
        downloads = {
            category: Download(
                folder,
                category,
                None if every_item else items_of(category, found),
                manners=Manners(per_host=per_host),
                server=server,
                retry_failed=retry_failed,
            )
            for category, found in domains.items()
        }
        if dry_run:
            plan_table({category: download.plan() for category, download in downloads.items()}, console)
            return
        for category, download in downloads.items():
            try:
                with View(console) as download.show:
                    if verify:
                        console.print(f"{_plain(category)}: {len(download.verify()):,} pictures are damaged", highlight=False)
                    outcomes = download.run()
            except KeyboardInterrupt:
                console.print("[yellow]stopped[/]: what has arrived is kept; the same command goes on")
                raise typer.Exit(130) from None
            console.print(coverage(outcomes, download.items or list(outcomes)), highlight=False)
            for domain in domains[category]:
                _report(put_into_domain(folder, domain))


@app.command()
def simulate(
    category: Annotated[list[str] | None, typer.Option(help="Only this category; may be given several times. Default: all nine.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 1,
    users: Annotated[int, typer.Option(help="Users of a domain.")] = 400,
    items: Annotated[int, typer.Option(help="Items of a domain; at most as many as users.")] = 160,
    raw: Annotated[Path | None, typer.Option(help="Keep the raw files in this folder.")] = None,
    protocol: Annotated[str, typer.Option(help="loo-v1, or time-v1: cut by time, named sim_CATEGORY_time, without an oracle.")] = "loo-v1",
    root: Root = None,
) -> None:
    """Simulate miniature Amazon 2023 domains (sim_musical_instruments, ...) with pictures, text and an oracle.

    [bold]Examples[/]

      harness data simulate

      harness data simulate --protocol time-v1

      harness data simulate --category Video_Games --users 5000 --items 1000 --root /tmp/domains
    """
    from harness.data.simulate import CATEGORIES
    from harness.data.simulate import simulate as run

    with _plain_errors():
        sizes = {"seed": seed, "users": users, "items": items}
        for summary in run(root, categories=category or tuple(CATEGORIES), raw=raw, protocol=protocol, **sizes):
            _report(summary)


@app.command("list")
def list_(root: Root = None) -> None:
    """List the domains.

    [bold]Example[/]

      harness data list
    """
    from rich.table import Table

    from harness.data.domain import data_root, list_domains

    folder = root or data_root()
    table = Table(title=f"Domains in {_plain(str(folder))}", title_justify="left")
    table.add_column("domain", no_wrap=True)
    for heading in ("users", "items", "interactions", "tie rate"):
        table.add_column(heading, justify="right")
    for heading in ("protocol", "release", "digest"):
        table.add_column(heading)
    found = list_domains(folder)
    for domain in found:
        if domain.problem:
            table.add_row(domain.name, *["-"] * 5, "[red]broken[/]", _plain(domain.problem))
            continue
        counts = [f"{domain.counts[key]:,}" for key in ("users", "items", "interactions")]
        release = "SIMULATED" if domain.simulated else domain.release or "-"
        table.add_row(domain.name, *counts, _share(domain.tie_rate), domain.protocol, release, domain.digest[:12])
    console = _console()
    console.print(table)
    if not found:
        console.print("No domain yet. `harness data simulate` makes some, `harness data import` takes yours.")


@app.command()
def card(
    name: Annotated[str, typer.Argument(help="A domain of `harness data list`.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table; writes no page.")] = False,
    html: Annotated[Path | None, typer.Option(help="Where the page goes. Default: results/local/cards/DOMAIN.html.")] = None,
    alone: Annotated[bool, typer.Option("--alone", help="Do not compare it with the domains beside it.")] = False,
    root: Root = None,
) -> None:
    """Show what a domain holds, where it differs from what a domain of this name should hold, and how it overlaps with others.

    Also writes a page with plots. A card is made of the whole domain, test targets too: it is for you, methods never see it.

    [bold]Examples[/]

      harness data card beauty2014

      harness data card musical_instruments --html instruments.html
    """
    from harness.data.card import make_card, neighbours_of
    from harness.data.domain import data_root
    from harness.paths import Paths

    with _plain_errors():
        folder = (root or data_root()) / name
        found = make_card(folder, [] if alone else neighbours_of(folder))
        if as_json:
            typer.echo(json.dumps(found.to_json(), indent=1))
            return
        from harness.data.card_page import write_page
        from harness.data.card_view import show

        console = _console()
        show(found, console)
        page = write_page(found, html or Paths.default().results / "cards" / f"{name}.html")
        console.print(f"page with plots: {_plain(str(page))}", highlight=False)


@app.command()
def verify(name: Annotated[str, typer.Argument(help="A domain of `harness data list`.")], root: Root = None) -> None:
    """Check files, order, ranges and digests of a domain, and its counts, if it is known what a domain of this name must hold.

    [bold]Example[/]

      harness data verify beauty2014
    """
    from harness.data.card import require_expected
    from harness.data.domain import data_root, validate_domain
    from harness.data.expected import expected_card

    with _plain_errors():
        folder = (root or data_root()) / name
        summary = validate_domain(folder)
        require_expected(folder)
        counts = "; its counts are the expected ones" if expected_card(summary.name, summary.protocol) else ""
        typer.echo(f"{summary.name}: complete and unchanged (digest {summary.digest[:12]}){counts}")


# ----------------------------------------------------------------------------------------------------------- output


def _report(summary: DomainSummary) -> None:
    from harness.contract import PROTOCOL
    from harness.data.domain import read_private
    from harness.data.expected import differences, expected_card

    console = _console()
    counts = ", ".join(f"{summary.counts[key]:,} {key}" for key in ("users", "items", "interactions"))
    state = "[green]written[/]" if summary.created else "[cyan]there already[/]"
    console.print(f"{state} {summary.name}: {counts} (digest {summary.digest[:12]}) in {_plain(str(summary.path))}", highlight=False)
    if summary.protocol != PROTOCOL:
        users = ", ".join(f"{summary.counts[f'{part}_users']:,} users with {part}" for part in ("train", "valid", "test"))
        console.print(f"  protocol {summary.protocol}: {users}", highlight=False)
    dropped = {key: count for key, count in read_private(summary.path).info["dropped"].items() if count}
    pictureless = {key: dropped.pop(key) for key in list(dropped) if key.startswith("no_picture_")}
    for what, counts_of in (("left out", dropped), ("without picture", pictureless)):
        lines = [f"{count:,} {key.removeprefix('no_picture_').replace('_', ' ')}" for key, count in counts_of.items()]
        if lines:
            console.print(f"  {what}: {', '.join(lines)}", highlight=False)
    expected = expected_card(summary.name, summary.protocol)
    for line in differences(summary.counts, expected):
        console.print(f"  [yellow]not the {summary.name} of {expected['source'] if expected else '?'}[/]: {line}", highlight=False)


def _share(value: object) -> str:
    return f"{100 * value:.2f} %" if isinstance(value, float) else "-"
