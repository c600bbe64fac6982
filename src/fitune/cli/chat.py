"""`fitune chat`: ask a model; with a database, in words, and see the rows."""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fitune.errors import InputError

if TYPE_CHECKING:
    from fitune.data.conversation import Message

SHOWN_ROWS = 20
HOW = "Ask, then Enter. /new begins anew; Ctrl-C stops an answer; Ctrl-D ends."


def command(
    model: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run's folder, an adapter's, or a model.")],
    prompt: Annotated[str | None, typer.Option(help="One question; answer it and exit.")] = None,
    database: Annotated[
        Path | None, typer.Option(help="A SQLite file: questions become SQL, which is run for reading only.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="The system message; without it the run's own.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    four_bit: Annotated[
        bool | None,
        typer.Option("--four-bit/--sixteen-bit", help="How the base is loaded; a run: as it was trained."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draws, where temperature is above 0.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object; with --prompt.")] = False,
) -> None:
    """Ask a tuned model or a base model questions; answers appear as they are written."""
    problems = []
    if database is not None and system is not None:
        problems.append("--system and --database: the database's schema is the system message; leave one out")
    if as_json and prompt is None:
        problems.append("--json prints one answer: give the question with --prompt")
    if prompt is not None and not prompt.strip():
        problems.append("--prompt is empty")
    if problems:
        raise InputError(problems)
    talk = _open(model, database, system, temperature, max_new_tokens, four_bit, seed)
    if prompt is not None:
        from fitune.cli.output import print_json

        facts = talk.answer(prompt, aloud=not as_json)
        if as_json:
            print_json({"model": model, **facts})
        return
    _converse(talk)


@dataclass
class _Talk:
    """A built model and the conversation so far."""

    graph: Any
    tokenizer: Any
    eos_ids: Sequence[int]
    opening: tuple[Message, ...]
    turns: list[Message]
    database: Path | None
    temperature: float
    max_new_tokens: int
    seed: int

    def answer(self, question: str, aloud: bool) -> dict[str, Any]:
        """Answers one question and remembers both; `aloud`: written to stdout as it comes."""
        from fitune.data.conversation import Message

        asked = [*self.turns, Message("user", question)]
        pieces: list[str] = []
        for piece in self._pieces([*self.opening, *asked]):
            pieces.append(piece)
            if aloud:
                print(piece, end="", flush=True)
        if aloud:
            print()
        text = "".join(pieces).strip()
        facts: dict[str, Any] = {"question": question, "answer": text}
        if self.database is None:
            self.turns = [*asked, Message("assistant", text)]
        else:  # every question about a database stands alone, as in training
            facts |= _run_sql(self.database, text, aloud)
        return facts

    def _pieces(self, messages: Sequence[Message]) -> Iterator[str]:
        """The answer in pieces of whole characters."""
        from fitune.data.encoding import encode_prompt
        from fitune.generate import stream

        tokens: list[int] = []
        shown = ""
        for token in stream(
            self.graph, encode_prompt(messages, self.tokenizer), max_new_tokens=self.max_new_tokens,
            eos_ids=self.eos_ids, temperature=self.temperature, seed=self.seed,
        ):  # fmt: skip
            tokens.append(token)
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            if not text.endswith("\ufffd") and text.startswith(shown):
                yield text[len(shown) :]
                shown = text
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        if text != shown:
            yield text[len(shown) :]


def _open(
    model: str, database: Path | None, system: str | None, temperature: float, max_new_tokens: int,
    four_bit: bool | None, seed: int,
) -> _Talk:  # fmt: skip
    from fitune.cli.output import print_warnings
    from fitune.data.conversation import Message
    from fitune.data.text_to_sql import read_schema, serialise_schema, sql_messages
    from fitune.generate.stopping import stop_ids
    from fitune.quant.lease import lease_for_generation
    from fitune.quant.linear import QuantisedLinear
    from fitune.train.trained_model import find_trained

    opening: tuple[Message, ...] = ()
    if database is not None:
        opening = sql_messages(serialise_schema(read_schema(database)), "")[:1]
    found = find_trained(model, four_bit)
    print_warnings(found.source.warnings())
    if database is None:
        said = system if system is not None else found.config.data.system if found.config else None
        opening = (Message("system", said),) if said else ()
    built = found.build()
    graph = built.graph
    # For as long as the process lives.
    lease = lease_for_generation(built.backend, built.dtype, built.stream is not None)
    for module in graph.modules():
        if isinstance(module, QuantisedLinear):
            module.lease = lease
    tokenizer = found.source.tokenizer()
    return _Talk(
        graph, tokenizer, stop_ids(found.source, tokenizer), opening, [], database, temperature, max_new_tokens, seed
    )  # fmt: skip


def _converse(talk: _Talk) -> None:
    """Questions from stdin until it ends."""
    is_person = sys.stdin.isatty()
    if is_person:
        import readline  # noqa: F401 - gives input() its editing keys

        print(HOW, file=sys.stderr)
    while True:
        try:
            question = input("> " if is_person else "").strip()
        except (EOFError, KeyboardInterrupt):
            if is_person:
                print()
            return
        if question == "/new":
            talk.turns = []
        elif question:
            try:
                talk.answer(question, aloud=True)
            except KeyboardInterrupt:
                print("\n(stopped; this question and its answer are forgotten)", file=sys.stderr)
            except InputError as error:
                # A conversation may outgrow the model's context; what was said before still stands.
                print(f"{error}\n/new begins a new conversation", file=sys.stderr)


def _run_sql(database: Path, text: str, aloud: bool) -> dict[str, Any]:
    """The query in an answer, run confined -> its rows, or why it does not run."""
    from fitune.cli.output import print_table
    from fitune.evaluate.sql_execution import QueryTimeoutError, extract_sql, run_query

    sql = extract_sql(text)
    facts: dict[str, Any] = {"sql": sql, "rows": None, "more_rows": False, "error": None}
    try:
        rows = run_query(database, sql, row_limit=SHOWN_ROWS + 1)
    except (sqlite3.Error, sqlite3.Warning, ValueError, QueryTimeoutError) as error:
        facts["error"] = str(error)
        if aloud:
            print(f"the query does not run: {error}")
        return facts
    facts["rows"] = [[_plain(value) for value in row] for row in rows[:SHOWN_ROWS]]
    facts["more_rows"] = len(rows) > SHOWN_ROWS
    if aloud:
        if rows and rows[0]:
            print_table([""] * len(rows[0]), [[_cell(value) for value in row] for row in rows[:SHOWN_ROWS]])
        counted = f"more than {SHOWN_ROWS} rows" if facts["more_rows"] else f"{len(rows)} rows"
        print(f"({counted})")
    return facts


def _plain(value: object) -> object:
    """JSON has no bytes and no broken characters."""
    if isinstance(value, bytes):
        return value.hex()
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def _cell(value: object) -> str:
    """A value for a terminal, on which control characters would act."""
    text = "NULL" if value is None else str(_plain(value))
    return "".join(character if character.isprintable() else "?" for character in text)
