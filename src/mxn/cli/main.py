"""The `mxn` command. A command is a file beside this one; heavy imports wait inside functions."""

from __future__ import annotations

import sys

import typer

from mxn import __version__
from mxn.cli import (
    bench,
    chat,
    chips,
    doctor,
    gateway,
    kernels,
    keys,
    limits,
    models,
    pack,
    prices,
    ps,
    run,
    serve,
    tenants,
    top,
    train,
    tune,
    up,
    usage,
)
from mxn.errors import MxnError

app = typer.Typer(
    name="mxn",
    help="The bus between M models and N chips: any Hugging Face model on any chip behind one API.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("up")(up.up)
app.command("serve")(serve.serve)
app.command("gateway")(gateway.gateway)
app.command("run")(run.run)
app.command("chat")(chat.chat)
app.command("ps")(ps.ps)
app.command("top")(top.top)
app.command("models")(models.models)
app.command("doctor")(doctor.doctor)
app.command("bench")(bench.bench)
app.command("pack")(pack.pack)
app.command("tune")(tune.tune)
app.add_typer(chips.app, name="chips")
app.add_typer(kernels.app, name="kernels")
app.add_typer(keys.app, name="keys")
app.add_typer(usage.app, name="usage")
app.add_typer(limits.budget, name="budget")
app.add_typer(limits.limit, name="limit")
app.add_typer(prices.app, name="price")
app.add_typer(train.app, name="train")
app.add_typer(tenants.orgs, name="org")
app.add_typer(tenants.projects, name="project")
app.add_typer(tenants.users, name="user")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mxn {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version."
    ),
) -> None:
    pass


def main() -> None:
    """Run the command line; an expected error is one message and exit status 2, no traceback."""
    try:
        app()
    except MxnError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
