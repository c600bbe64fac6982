"""The command `fitune`: one file per verb, registered here, and what all do when something goes wrong.

Exit codes: 0 good, 2 the user's input, 130 stopped by the user, 1 our failure.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

from fitune import __version__
from fitune.cli import chat, data, doctor, evaluate, init, merge, models, plan, quickstart, runs, train
from fitune.errors import FituneError
from fitune.process_memory import ask_for_huge_pages

app = typer.Typer(
    name="fitune",
    help="Fine-tuning that fits: QLoRA, LoRA and full fine-tuning of open language models on your machine.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

# The verbs, in the order in which --help lists them. Verb files import other rooms inside `command`.
app.command("quickstart")(quickstart.command)
app.command("init")(init.command)
app.add_typer(data.group, name="data")
app.command("plan")(plan.command)
app.command("train")(train.command)
app.add_typer(runs.group, name="runs")
app.command("evaluate")(evaluate.command)
app.command("chat")(chat.command)
app.command("merge")(merge.command)
app.add_typer(models.group, name="models")
app.command("doctor")(doctor.command)

_asked_for_traceback = False


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"fitune {__version__}")
        raise typer.Exit


# Whose warnings are for programmers (deprecations, a missing optional package) and say nothing about the run.
_LIBRARIES = ("bitsandbytes", "peft", "transformers", "torch")


def _quieten_libraries() -> None:
    """Keeps other packages' warnings off the screen; --debug shows them."""
    for name in _LIBRARIES:
        warnings.filterwarnings("ignore", module=rf"{name}(\.|$)")
        logging.getLogger(name).setLevel(logging.ERROR)


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    global _asked_for_traceback
    _asked_for_traceback = debug
    if not debug:
        _quieten_libraries()


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits the process with its code."""
    ask_for_huge_pages()
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; messages go to stderr. -> the exit code."""
    global _asked_for_traceback
    _asked_for_traceback = False
    usage_error = typer.BadParameter.__mro__[2]  # ClickException, of the click that this typer carries
    try:
        result = app(None if arguments is None else list(arguments), prog_name="fitune", standalone_mode=False)
        sys.stdout.flush()
    except FituneError as error:
        return _told(str(error), error.exit_code)
    except BrokenPipeError:
        # Whoever read our output has gone (`| head`); the interpreter must not flush into it again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (KeyboardInterrupt, typer.Abort):
        return _told("stopped by Ctrl-C", 130)
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    except Exception as error:
        if isinstance(error, usage_error):
            error.show()  # type: ignore[attr-defined]
            return int(error.exit_code)  # type: ignore[attr-defined]
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            place = f" ({error.filename})" if error.filename else ""
            return _told(f"the disk is full{place}; make room and run the command again", 1)
        return _unexpected(error)
    if result == 130:  # typer turns Ctrl-C into this
        return _told("stopped by Ctrl-C", 130)
    return result if isinstance(result, int) else 0


def _told(message: str, code: int) -> int:
    """Prints what went wrong; with --debug also where in the code."""
    if _asked_for_traceback:
        traceback.print_exc()
    _print_error(message)
    return code


def _unexpected(error: Exception) -> int:
    """An error that nobody explained: one line, and the traceback kept where it can be read and sent."""
    line = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    if _asked_for_traceback:
        traceback.print_exc()
        _print_error(f"fitune failed: {line}")
        return 1
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="fitune-traceback-", suffix=".txt", delete=False, encoding="utf-8"
        ) as file:
            file.write(f"fitune {__version__}, Python {sys.version}\n{' '.join(sys.argv)}\n\n")
            traceback.print_exc(file=file)
        kept = f"its traceback is in {file.name}; `fitune --debug ...` shows it"
    except OSError:
        kept = "`fitune --debug ...` shows its traceback"
    _print_error(f"fitune failed: {line} ({kept})")
    return 1


def _print_error(message: str) -> None:
    """The message as it is, or in colour on a terminal."""
    if not sys.stderr.isatty():
        print(message, file=sys.stderr)
        return
    from rich.console import Console
    from rich.text import Text

    first, *rest = message.split("\n")
    text = Text(first, style="bold red")
    Console(stderr=True, highlight=False, soft_wrap=True).print(Text("\n").join([text, *map(Text, rest)]))
