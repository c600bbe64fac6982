"""The help is the documentation: docs/commands.md is what `--help` says, and every verb is in it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import typer
from script_modules import script

from fitune.cli import app

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_what_help_says() -> None:
    written = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert written == script("write_command_docs").command_docs(), "run: python scripts/write_command_docs.py"


def test_every_verb_has_a_file_and_a_place_on_the_page() -> None:
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name, command in commands.items():
        inner = getattr(command, "commands", {})
        for title, each in {name: command, **{f"{name} {below}": part for below, part in inner.items()}}.items():
            assert f"## fitune {title}\n" in page
            assert each.help
            for option in each.params:
                assert getattr(option, "help", None) or "--help" in option.opts, f"{title} {option.opts} has no help"
    files = {path.stem for path in (ROOT / "src/fitune/cli").glob("*.py")} - {"__init__", "output"}
    registered = {function.callback.__module__.rpartition(".")[2] for function in app.registered_commands}  # type: ignore[union-attr]
    assert registered <= files
    verbs = {path.stem for path in (ROOT / "src/fitune/cli").glob("*.py") if "def command(" in path.read_text()}
    assert verbs == registered


def test_help_is_quick_because_it_loads_nothing_heavy() -> None:
    heavy = ["torch", "transformers", "peft", "numpy", "pydantic", "yaml"]
    code = (
        "import sys\nfrom fitune.cli import run\nassert run(['--help']) == 0\n"
        f"sys.exit(','.join(name for name in {heavy!r} if name in sys.modules) or 0)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.stderr.strip() == ""
    assert ran.returncode == 0
    assert "doctor" in ran.stdout
