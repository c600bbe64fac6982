"""Writes docs/commands.md: every command's own --help, so that the page cannot say anything else.

Run it after changing a command: python scripts/write_command_docs.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from fitune.cli import app

PAGE = Path(__file__).resolve().parent.parent / "docs" / "commands.md"
HEAD = """# Commands

Written by `python scripts/write_command_docs.py` from each command's `--help`; do not edit.

Exit codes: 0 good, 2 something in the input cannot be used, 130 stopped by the user, 1 a failure of fitune.
"""


def _sections(group: Any, context: Any, above: str) -> list[str]:
    """One section for each command of a group, and for those inside it."""
    parts = []
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        inner = type(context)(command, parent=context, info_name=name, terminal_width=100)
        parts.append(f"## {above} {name}\n\n```text\n{command.get_help(inner).strip()}\n```\n")
        if hasattr(command, "list_commands"):
            parts += _sections(command, inner, f"{above} {name}")
    return parts


def command_docs() -> str:
    """The page's text."""
    group = typer.main.get_command(app)
    context = group.make_context("fitune", ["--debug"], resilient_parsing=True, terminal_width=100)
    parts = [HEAD, f"## fitune\n\n```text\n{group.get_help(context).strip()}\n```\n"]
    parts += _sections(group, context, "fitune")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(command_docs(), encoding="utf-8")
    print(f"wrote {PAGE}")
