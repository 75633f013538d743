"""The typer app with all commands, and error handling."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

from ..base.extras import require
from ..base.version import __version__
from ..errors import MultitowerError
from . import checks, decode, demo, plugins, show, training
from .server import command as server

typer: Any = require("typer", "cli")

EXPECTED = (MultitowerError, OSError, ValueError, TypeError, LookupError, ImportError)
"""Errors caused by bad input, shown without traceback; any other is a bug."""


def _version(wanted: bool) -> None:
    if wanted:
        print(f"multitower {__version__}")
        raise typer.Exit


app = typer.Typer(
    help="Fuse pretrained decoders into one model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()  # type: ignore[untyped-decorator]  # typer is known only at run time
def _program(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


for command in (
    show.inspect,
    show.draw,
    show.estimate,
    decode.generate,
    decode.transcribe,
    decode.speak,
    demo.demo,
    server.serve,
    training.train,
    checks.check,
    checks.verify,
    plugins.modalities,
    plugins.new_modality,
):
    app.command()(command)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status. See ``multitower.cli.main``."""
    try:
        app(args=arguments, prog_name="multitower")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except EXPECTED as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print("\n".join([f"error: {message}", *getattr(error, "__notes__", ())]), file=sys.stderr)
        return 1
    return 0
