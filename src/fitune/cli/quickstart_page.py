"""What a quickstart shows: the plan, bars, five questions before and after, the scores, what to run next."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fitune.cli.plan_page import print_plan
from fitune.demo.lesson import Quickstart, Screen
from fitune.demo.lesson_report import example_answers, next_commands, score_lines
from fitune.plan.planner import Plan
from fitune.train.loop import Watcher
from fitune.train.progress_view import TrainingView, clock
from fitune.train.run import Prepared


class ConsoleScreen:
    """A quickstart's screen on a terminal, or as plain lines; on stderr if stdout is for JSON."""

    def __init__(self, to_stderr: bool) -> None:
        self._to_stderr = to_stderr
        self._console = Console(stderr=to_stderr, highlight=False, soft_wrap=True)
        self._last: tuple[str, int] = ("", -1)

    def screen(self) -> Screen:
        """What `run_quickstart` speaks through."""
        return Screen(self._say, self._plan, self._training, self._store, self._answering)

    def _say(self, line: str) -> None:
        self._console.print(escape(line))

    def _plan(self, plan: Plan) -> None:
        with contextlib.redirect_stdout(sys.stderr) if self._to_stderr else contextlib.nullcontext():
            print()
            print_plan(plan)
            print(flush=True)

    @contextlib.contextmanager
    def _training(self, prepared: Prepared, plan: Plan) -> Iterator[Watcher]:
        view: TrainingView | None = None

        def watch(record: object) -> None:
            nonlocal view
            if view is None:  # opened late: what comes before the first step has lines of its own
                view = TrainingView(prepared.workload.steps, plan.peak_bytes)
                view.__enter__()
            view(record)  # type: ignore[arg-type]

        try:
            yield watch
        finally:
            if view is not None:
                view.__exit__(*sys.exc_info())

    def _store(self, done: int, total: int) -> None:
        self._share("quantising the model to NF4", done, total)

    def _answering(self, what: str, done: int, total: int) -> None:
        self._share(f"answering {what} questions", done, total)

    def _share(self, what: str, done: int, total: int) -> None:
        """One line when something begins and one when it ends; on a terminal the share in between."""
        percent = 100 * done // max(1, total)
        if self._console.is_terminal:
            end = "\n" if done >= total else "\r"
            if self._last != (what, percent):
                self._console.print(f"{what}: {percent} %", end=end)
        elif what != self._last[0]:
            self._console.print(what)
        self._last = (what, percent)

    def show_result(self, found: Quickstart) -> None:
        """The examples, the table and the next commands."""
        out = self._console
        out.print("\n[bold]Five questions, before and after[/bold]")
        for example in example_answers(found):
            mark = "[green]right[/green]" if example.tuned_right else "[red]wrong[/red]"
            out.print(f"\n  {escape(example.question)}   [dim]({example.group})[/dim]")
            out.print(f"    before  {escape(' '.join((example.base or '').split())[:140])}", style="dim")
            out.print(f"    after   {escape(example.tuned or '')}   {mark}")
        table = Table(title="\nExecution accuracy (share of questions whose SQL gives the right result)")
        for heading in ("held-out questions", "before", "after", "questions"):
            table.add_column(heading)
        for name, base, tuned in score_lines(found):
            count = str(tuned.count) if base.count == tuned.count else f"{tuned.count} (before: {base.count})"
            table.add_row(name, base.as_percent(), tuned.as_percent(), count)
        out.print(table)
        out.print("95 % intervals in brackets.", style="dim")
        plan = found.outcome.plan
        out.print(
            f"\n{clock(found.seconds)} in all; peak memory {found.peak_bytes / 1e9:.2f} GB "
            f"(planned {plan.peak_bytes / 1e9:.2f} GB); run folder {found.outcome.folder.path}, "
            f"report {found.outcome.folder.report_file}"
        )
        out.print("\n[bold]Next[/bold]")
        for what, line in next_commands(found):
            out.print(f"  {what}:\n    {escape(line)}")
