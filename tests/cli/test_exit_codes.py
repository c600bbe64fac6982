"""What every command does when something goes wrong: one clear message, the right exit code, no traceback."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import fitune.cli as cli
from fitune import __version__
from fitune.errors import DiskFullError, FituneError, InputError, Interrupted


@pytest.fixture
def failing() -> Iterator[Callable[[BaseException], None]]:
    """Registers a command `fail` that raises what it is told to, for one test."""
    raised: list[BaseException] = []

    def command() -> None:
        """Fail."""
        raise raised[0]

    before = list(cli.app.registered_commands)
    cli.app.command("fail")(command)
    yield raised.append
    cli.app.registered_commands[:] = before


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("is missing", where="a.jsonl"), 2, "a.jsonl: is missing\n"),
        (InputError(["one", "two"], where="a.jsonl"), 2, "a.jsonl: 2 problems\n  one\n  two\n"),
        (FituneError("the store is torn"), 1, "the store is torn\n"),
        (DiskFullError("no room for the adapter"), 1, "no room for the adapter\n"),
        (
            Interrupted("stopped after step 7; go on with --resume"),
            130,
            "stopped after step 7; go on with --resume\n",
        ),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/x/y"),
            1,
            "the disk is full (/x/y); make room and run the command again\n",
        ),
    ],
)
def test_errors_that_explain_themselves(
    failing: Callable, capsys: pytest.CaptureFixture, error: BaseException, code: int, message: str
) -> None:
    failing(error)
    assert cli.run(["fail"]) == code
    assert capsys.readouterr() == ("", message)


def test_debug_shows_where(failing: Callable, capsys: pytest.CaptureFixture) -> None:
    failing(InputError("is missing", where="a.jsonl"))
    assert cli.run(["--debug", "fail"]) == 2
    assert "Traceback" in capsys.readouterr().err
    assert cli.run(["fail"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_an_unexplained_error_is_one_line_and_its_traceback_is_kept(
    failing: Callable, capsys: pytest.CaptureFixture
) -> None:
    failing(KeyError("lost\nwords"))
    assert cli.run(["fail"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("fitune failed: KeyError: 'lost\\nwords' (its traceback is in ")
    assert said.count("\n") == 1
    match = re.search(r"is in (\S+);", said)
    assert match is not None
    kept = Path(match[1])
    assert "raise raised[0]" in kept.read_text()
    kept.unlink()
    assert cli.run(["--debug", "fail"]) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert said.endswith("fitune failed: KeyError: 'lost\\nwords'\n")


@pytest.mark.parametrize(
    "arguments", [["docto"], ["--nothing"], ["doctor", "--nothing"], ["init", "--method", "x"], []]
)
def test_usage_errors(capsys: pytest.CaptureFixture, arguments: list[str]) -> None:
    assert cli.run(arguments) == 2
    said = capsys.readouterr()
    assert "Usage: fitune" in said.out + said.err
    assert "Traceback" not in said.err


def test_version_and_help(capsys: pytest.CaptureFixture) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"fitune {__version__}\n"
    assert cli.run(["doctor", "-h"]) == 0
    assert "--json" in capsys.readouterr().out


def fitune(*arguments: str, **options: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "fitune", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,  # type: ignore[call-overload]
    )  # fmt: skip


def test_the_process_exits_with_the_code(tmp_path: Path) -> None:
    process = fitune("init", str(tmp_path / "none" / "run.yaml"))
    out, err = process.communicate()
    assert (process.returncode, out) == (2, "")
    assert "there is no folder" in err


@pytest.mark.parametrize("arguments", [["doctor"], ["doctor", "--json"]])
def test_a_reader_that_goes_away_is_no_failure_to_explain(arguments: list[str]) -> None:
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = fitune(*arguments, env=buffered)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()  # as `| head` does
    err = process.stderr.read()
    process.wait()
    assert err == ""


def test_control_c_in_a_real_process() -> None:
    """A real SIGINT, sent by the command to its own process."""
    # A shell's background jobs start with the signal ignored, and so would this process there.
    code = "import os, signal, fitune.cli as cli\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "cli.app.command('wait')(lambda: os.kill(os.getpid(), signal.SIGINT))\ncli.main(['wait'])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (130, "", "stopped by Ctrl-C\n")
