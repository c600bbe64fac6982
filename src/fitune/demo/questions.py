"""Questions and their queries over any SQLite database, split so that the held-out ones are really unseen.

The split, made per database and seed:
- *Values.* A quarter of each column's values (of the sizes of a LIMIT or a group, of the years of a date
  column, of the pieces of a LIKE) is held out: in no training question is that column asked for that value.
- *Forms without values.* There is nothing to vary but what the question is about, so a quarter of their
  combinations of table and columns is held out: `AVG(price)` over products may be trained and `AVG(salary)`
  over employees not.
- *Queries.* What is drawn from the held-out side serves both held-out sets, so that no query of either is
  ever trained: `unseen_values` words it as in training, `unseen_phrasings` in wordings never trained (its
  values are thus unseen too: the harder reading).
Every query is run: answers that are empty, only NULL, or a bare 0 are left out, and so are filters that
filter nothing and answers that hang on how a tie is broken.
"""

from __future__ import annotations

import hashlib
import math
import random
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from fitune.data.text_to_sql import open_read_only
from fitune.demo.drafts import Combination, Draft, Draw, Form, NoValueError
from fitune.demo.forms import TABLE_FORMS
from fitune.demo.heldout import HELD_OUT
from fitune.demo.join_forms import JOIN_FORMS
from fitune.demo.phrasings import TRAINED
from fitune.demo.profile import StepBudget, StepsExceededError, read_profile
from fitune.errors import FituneError, InputError

FORMS: tuple[Form, ...] = (*TABLE_FORMS, *JOIN_FORMS)

# Training questions of a form over several tables to one of a form over a single table: where all had as many, half
# of what was answered wrongly was about several tables (docs/log.md).
JOINED_QUESTIONS = 2

TRAIN_SIZE = 1_500
HELD_OUT_SIZE = 320
HELD_OUT_SHARE = 4  # one combination in four, of forms without values
LARGEST_ANSWER_ROWS = 5_000
TRIES_PER_QUERY = 6
COMBINATIONS_LIMIT = 4_000
SLOW_QUERIES_LIMIT = 3


@dataclass(frozen=True, slots=True)
class Question:
    """One question and its gold query.

    phrasing_id: "equals/trained/3" or "equals/held_out/1". values: (column or kind of count, value) for every
    literal that was drawn. combination: the table and columns it is about.
    """

    form: str
    phrasing_id: str
    question: str
    sql: str
    values: tuple[tuple[str, str], ...] = ()
    combination: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class QuestionSets:
    """Three sets of questions, and what this database could not give.

    skipped: form -> why no question of it was made. notes: tables and columns left aside, sizes not reached.
    """

    train: tuple[Question, ...]
    unseen_values: tuple[Question, ...]
    unseen_phrasings: tuple[Question, ...]
    skipped: dict[str, str]
    notes: tuple[str, ...] = ()

    @property
    def forms(self) -> tuple[str, ...]:
        """The forms that are trained, in a fixed order."""
        used = {question.form for question in self.train}
        return tuple(form.name for form in FORMS if form.name in used)


@dataclass(frozen=True, slots=True)
class DisjointReport:
    """Sizes, and how many questions, queries, values and phrasings of a held-out set occur in training: 0."""

    train: int
    unseen_values: int
    unseen_phrasings: int
    forms: int
    train_queries: int
    held_out_queries: int
    train_phrasings: int
    held_out_phrasings: int
    held_out_values: int

    def __str__(self) -> str:
        return (
            f"{self.train} training questions of {self.forms} forms ({self.train_queries} queries, "
            f"{self.train_phrasings} phrasings); held out: {self.unseen_values} with unseen values "
            f"({self.held_out_values} values), {self.unseen_phrasings} with unseen phrasings "
            f"({self.held_out_phrasings} phrasings), {self.held_out_queries} queries; "
            "0 held-out questions, queries, values or phrasings occur in training"
        )


@dataclass(frozen=True)
class _Query:
    """A draft that was run and found good."""

    form: str
    draft: Draft
    values: tuple[tuple[str, str], ...]
    combination: tuple[str, ...]


def generate_questions(
    database: Path,
    *,
    seed: int = 0,
    train_size: int = TRAIN_SIZE,
    held_out_size: int = HELD_OUT_SIZE,
    forms: Sequence[str] | None = None,
) -> QuestionSets:
    """Path of a SQLite file -> questions to train on and two held-out sets (the module says how they differ).

    The held-out sets are balanced over the forms; of forms over several tables, training has `JOINED_QUESTIONS` times
    as many. The sets are the same for the same database and arguments. `forms` restricts
    the forms by name. Where the database cannot supply a size, the set is smaller and a note says so.
    Raises InputError for a database that cannot be read, or about which nothing can be asked.
    """
    chosen = _choose_forms(forms)
    profile = read_profile(database, seed)
    skipped: dict[str, str] = {}
    casts: dict[str, list[Combination]] = {}
    for form in chosen:
        casts[form.name] = _capped(form.combinations(profile), random.Random(f"casts {form.name} {seed}"))
        if not casts[form.name]:
            skipped[form.name] = f"needs {form.needs}"
    usable = [form for form in chosen if form.name not in skipped]
    if not usable:
        notes = "; ".join(profile.notes)
        raise InputError(f"no question can be asked about it ({notes or 'no column can be used'})", where=database)
    with closing(open_read_only(database)) as connection:
        search = _Search(StepBudget(connection), seed)
        turns = {form.name: JOINED_QUESTIONS if form in JOIN_FORMS else 1 for form in usable}
        to_train = math.ceil(1.5 * train_size / sum(turns.values()))
        to_hold_out = math.ceil(1.5 * held_out_size / len(usable))
        trained: dict[str, list[_Query]] = {}
        held_out: dict[str, list[_Query]] = {}
        for number, form in enumerate(usable):
            # Forms share the budget of work evenly; what one leaves, the next may use.
            share = search.budget.left // (2 * (len(usable) - number))
            trained[form.name] = search.queries(form, casts[form.name], False, turns[form.name] * to_train, share)
            held_out[form.name] = search.queries(form, casts[form.name], True, to_hold_out, share)
    known = {comparable(query.draft.sql) for queries in trained.values() for query in queries}
    for name, queries in held_out.items():
        held_out[name] = [query for query in queries if comparable(query.draft.sql) not in known]
    wording = _Wording(seed)
    train = wording.fill(trained, TRAINED, "trained", train_size, turns=turns)
    seen = {question.phrasing_id for question in train}
    unseen_values = wording.fill(held_out, TRAINED, "trained", held_out_size, seen.__contains__)
    trained_forms = {question.form for question in train}
    ready = {name: queries for name, queries in held_out.items() if name in trained_forms}
    unseen_phrasings = wording.fill(ready, HELD_OUT, "held_out", held_out_size)
    for form in usable:
        if form.name not in trained_forms:
            skipped[form.name] = search.reason(form.name)
    notes_list = [*profile.notes, *search.notes()]
    notes_list += [
        f"form {name}: trained, not held out ({search.reason(name)})"
        for name in trained
        if name in trained_forms and not held_out[name]
    ]
    for what, questions, size in (
        ("training questions", train, train_size),
        ("questions with unseen values", unseen_values, held_out_size),
        ("questions with unseen phrasings", unseen_phrasings, held_out_size),
    ):
        if len(questions) < size:
            notes_list.append(f"{size} {what} were asked for; this database supplies {len(questions)}")
    if not train:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise InputError(f"no question about it has an answer ({reasons})", where=database)
    sets = QuestionSets(tuple(train), tuple(unseen_values), tuple(unseen_phrasings), skipped, tuple(notes_list))
    check_disjoint(sets)
    return sets


def _choose_forms(names: Sequence[str] | None) -> list[Form]:
    if names is None:
        return list(FORMS)
    known = {form.name: form for form in FORMS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError([f"no form of question is called {n}; there are: {', '.join(known)}" for n in unknown])
    return [known[name] for name in dict.fromkeys(names)]


def _capped(combinations: Iterable[Combination], rng: random.Random) -> list[Combination]:
    """At most COMBINATIONS_LIMIT combinations, evenly chosen from the stream (reservoir sampling)."""
    kept: list[Combination] = []
    for index, combination in enumerate(combinations):
        if index < COMBINATIONS_LIMIT:
            kept.append(combination)
        elif (place := rng.randint(0, index)) < COMBINATIONS_LIMIT:
            kept[place] = combination
    return kept


class _Search:
    """Finds queries with good answers."""

    def __init__(self, budget: StepBudget, seed: int) -> None:
        self.budget = budget
        self.seed = seed
        self.slow: Counter[tuple[str, ...]] = Counter()
        self.refused: dict[str, Counter[str]] = {}
        self.is_spent = False

    def queries(
        self, form: Form, casts: list[Combination], is_held_out: bool, wanted: int, steps: int
    ) -> list[_Query]:
        """Up to `wanted` queries of one side of the split, found in about `steps` of SQLite's steps."""
        rng = random.Random(f"queries {form.name} {is_held_out} {self.seed}")
        if not form.draws_values:
            casts = self._side(form, casts, is_held_out)
        if not casts:
            self._refuse(form, "there is only one thing to ask about")
            return []
        found: dict[str, _Query] = {}
        floor = self.budget.left - steps
        for combination in self._order(form, casts, rng, wanted):
            if len(found) >= wanted:
                break
            if self.budget.left < floor:
                self.is_spent = True
                self._refuse(form, "the queries take too long")
                break
            if self.slow[combination.tables] >= SLOW_QUERIES_LIMIT:
                self._refuse(form, f"queries on {' and '.join(combination.tables)} take too long")
                continue
            draw = Draw(rng, self.seed, is_held_out)
            try:
                draft = form.draft(combination, draw)
            except NoValueError:
                self._refuse(form, "there are too few different values")
                continue
            if draft.sql in found:
                continue
            fault = self._fault(draft, combination)
            if fault:
                self._refuse(form, fault)
            else:
                found[draft.sql] = _Query(form.name, draft, tuple(draw.slots), combination.key)
        return list(found.values())

    def _side(self, form: Form, casts: list[Combination], is_held_out: bool) -> list[Combination]:
        def place(combination: Combination) -> bytes:
            text = repr((self.seed, form.name, combination.key))
            return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()

        ranked = sorted(casts, key=place)
        share = math.ceil(len(ranked) / HELD_OUT_SHARE) if len(ranked) > 1 else 0
        return ranked[:share] if is_held_out else ranked[share:]

    def _order(self, form: Form, casts: list[Combination], rng: random.Random, wanted: int) -> Iterator[Combination]:
        """Combinations to try: each table about as often as any other, labels more often than the rest."""
        per_table = Counter(combination.tables for combination in casts)
        weights = [(3 if q.returns_label else 1) / math.sqrt(per_table[q.tables]) for q in casts]
        if form.draws_values:
            yield from rng.choices(casts, weights, k=wanted * TRIES_PER_QUERY)
        # A random order in which the heavier tend to come first (Efraimidis and Spirakis 2006).
        keys = [rng.random() ** (1 / weight) for weight in weights]
        yield from (casts[i] for i in sorted(range(len(casts)), key=lambda i: -keys[i]))

    def _fault(self, draft: Draft, combination: Combination) -> str:
        """Why the draft's answer is no good as a gold, "" if it is good."""
        try:
            rows = self.budget.run(draft.sql, LARGEST_ANSWER_ROWS + 1)
            if len(rows) > LARGEST_ANSWER_ROWS:
                return f"the answers have more than {LARGEST_ANSWER_ROWS} rows"
            if all(value is None for row in rows for value in row):
                return "the answers are empty"
            is_single = len(rows) == 1 and len(rows[0]) == 1
            if is_single and rows[0][0] == 0:
                return "the answers are 0"
            if draft.fewer_than is not None:
                size = rows[0][0] if draft.sql.startswith("SELECT COUNT(*)") else len(rows)
                if isinstance(size, int) and size >= draft.fewer_than:
                    return "the conditions hold for every row"
            if draft.tie_check is not None:
                ends = self.budget.run(draft.tie_check, LARGEST_ANSWER_ROWS)
                if len(ends) == 1 or ends[-1][0] == ends[-2][0] or self._is_short(draft, ends):
                    return "the answers hang on ties"
        except StepsExceededError:
            self.slow[combination.tables] += 1
            return "the queries take too long"
        except (sqlite3.Error, sqlite3.Warning, OverflowError) as error:
            return f"the queries fail: {error}"
        return ""

    @staticmethod
    def _is_short(draft: Draft, ends: Sequence[tuple[object, ...]]) -> bool:
        """Fewer rows than the tie check asked for: the LIMIT would limit nothing."""
        assert draft.tie_check is not None, "only drafts with a tie check come here"
        return len(ends) < int(draft.tie_check.rsplit(" ", 1)[1])

    def _refuse(self, form: Form, reason: str) -> None:
        self.refused.setdefault(form.name, Counter())[reason] += 1

    def reason(self, form: str) -> str:
        """The commonest reason why queries of this form were refused."""
        refused = self.refused.get(form)
        return refused.most_common(1)[0][0] if refused else "no further query was found"

    def notes(self) -> list[str]:
        notes = [
            f"{' and '.join(tables)}: queries that take too long were left out"
            for tables, count in self.slow.items()
            if count and tables
        ]
        if self.is_spent:
            notes.append("the database is large: the search for questions stopped at its limit of work")
        return notes


class _Wording:
    """Puts queries into words, no question twice and never one question for two queries."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.meaning: dict[str, str] = {}
        self.asked: set[str] = set()

    def fill(
        self,
        queries: dict[str, list[_Query]],
        phrasings: dict[str, tuple[str, ...]],
        kind: str,
        size: int,
        is_allowed: Callable[[str], bool] = lambda phrasing_id: True,
        turns: Mapping[str, int] | None = None,
    ) -> list[Question]:
        """Up to `size` questions, one form after the other so that all have about as many; then shuffled.

        `turns`: how many a form gives before it is the next one's turn (None: one).
        """
        streams = [
            (self._word(form, queries[form], phrasings[form], kind, is_allowed), turns[form] if turns else 1)
            for form in queries
        ]
        questions: list[Question] = []
        while streams and len(questions) < size:
            running = []
            for stream, count in streams:
                given = list(islice(stream, count))
                questions += given
                if len(given) == count:
                    running.append((stream, count))
            streams = running
        random.Random(f"order {kind} {self.seed}").shuffle(questions)
        return questions[:size]

    def _word(
        self,
        form: str,
        queries: list[_Query],
        phrasings: tuple[str, ...],
        kind: str,
        is_allowed: Callable[[str], bool],
    ) -> Iterator[Question]:
        """Each query once, wordings in turn; then again with the next wording, until all pairs are used."""
        numbers = list(range(len(phrasings)))
        random.Random(f"wordings {form} {kind} {self.seed}").shuffle(numbers)
        for turn in range(len(numbers)):
            for index, query in enumerate(queries):
                number = numbers[(index + turn) % len(numbers)]
                phrasing_id = f"{form}/{kind}/{number + 1}"
                text = phrasings[number].format(**query.draft.words)
                text = text[:1].upper() + text[1:]
                key = comparable(text)
                if not is_allowed(phrasing_id) or self.meaning.setdefault(key, query.draft.sql) != query.draft.sql:
                    continue
                if key not in self.asked:
                    self.asked.add(key)
                    yield Question(form, phrasing_id, text, query.draft.sql, query.values, query.combination)


def comparable(text: str) -> str:
    """A question or query -> itself without case and spacing, for telling whether two are the same."""
    return " ".join(text.lower().split())


def check_disjoint(sets: QuestionSets) -> DisjointReport:
    """Question sets -> counts to print. Raises FituneError if anything held out occurs in training."""
    train_questions = {comparable(question.question) for question in sets.train}
    train_queries = {comparable(question.sql) for question in sets.train}
    train_phrasings = {question.phrasing_id for question in sets.train}
    train_values = {value for question in sets.train for value in question.values}
    faults: list[str] = []
    for name, questions in (
        ("unseen values", sets.unseen_values),
        ("unseen phrasings", sets.unseen_phrasings),
    ):
        for question in questions:
            if comparable(question.question) in train_questions:
                faults.append(f"{name}: this question is also trained: {question.question}")
            if comparable(question.sql) in train_queries:
                faults.append(f"{name}: this query is also trained: {question.sql}")
            for slot, value in set(question.values) & train_values:
                faults.append(f"{name}: {slot} = {value} is also trained: {question.question}")
            is_trained = question.phrasing_id in train_phrasings
            if is_trained != (name == "unseen values"):
                faults.append(f"{name}: phrasing {question.phrasing_id} is {'' if is_trained else 'not '}trained")
    if faults:
        raise FituneError(f"{len(faults)} held-out questions are not held out; the first: {faults[0]}")
    held_out = (*sets.unseen_values, *sets.unseen_phrasings)
    return DisjointReport(
        train=len(sets.train),
        unseen_values=len(sets.unseen_values),
        unseen_phrasings=len(sets.unseen_phrasings),
        forms=len(sets.forms),
        train_queries=len(train_queries),
        held_out_queries=len({comparable(question.sql) for question in held_out}),
        train_phrasings=len(train_phrasings),
        held_out_phrasings=len({question.phrasing_id for question in sets.unseen_phrasings}),
        held_out_values=len({value for question in sets.unseen_values for value in question.values}),
    )
