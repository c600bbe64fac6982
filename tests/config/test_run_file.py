"""The strict reader: what it accepts, and that it tells everything else, once, with line and remedy."""

from __future__ import annotations

import difflib
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fitune import config
from fitune.config.allowed import Option, field_options, field_paths, nearest, section_of
from fitune.config.schema import DataSource, InputFile, RunConfig, Section
from fitune.errors import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tmp_path = tmp_path / "work"
    tmp_path.mkdir()
    for name in ("train.jsonl", "more.jsonl", "test.jsonl", "shop.sqlite"):
        (tmp_path / name).write_text("{}\n")
    return tmp_path


def written(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(folder: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(InputError) as caught:
        config.load(written(folder, text), overrides)
    assert caught.value.where == str(folder / "run.yaml")
    return caught.value.problems


def loaded(path: Path, overrides: Sequence[str] = ()) -> RunConfig | InputError:
    """What `load` gives or raises; any other exception fails the test."""
    try:
        return config.load(path, overrides)
    except InputError as error:
        return error


GOOD = "data:\n  train: train.jsonl\n"


def with_field(path: str, value: str) -> tuple[str, int]:
    """A run file that sets one field, and the line on which it does."""
    if path.startswith("data."):
        text = f"data:\n  train: train.jsonl\n  {path.removeprefix('data.')}: {value}\n"
        if path == "data.train":
            text = f"data:\n  train: {value}\n"
    elif "." in path:
        section, name = path.split(".")
        text = f"{GOOD}{section}:\n  {name}: {value}\n"
    else:
        text = f"{GOOD}{path}: {value}\n"
    return text, text.count("\n")


# What is accepted


def test_only_the_data_is_required(folder: Path) -> None:
    read = config.load(written(folder, GOOD))
    assert read == RunConfig(data={"train": str(folder / "train.jsonl")})
    assert read.lora.rank == 16
    assert read.train.betas is None


@pytest.mark.parametrize(
    ("spelt", "value"),
    [
        ("1e-4", 1e-4),
        ("2e-4", 2e-4),
        ("1E-3", 1e-3),
        (".5", 0.5),
        ("1.0e-05", 1e-5),
        ("+2e-4", 2e-4),
        ("0.01", 0.01),
    ],
)
def test_numbers_that_yaml_takes_for_text(folder: Path, spelt: str, value: float) -> None:
    assert config.load(written(folder, f"{GOOD}train:\n  learning_rate: {spelt}\n")).train.learning_rate == value
    assert config.load(written(folder, GOOD), [f"train.learning_rate={spelt}"]).train.learning_rate == value


def test_a_whole_number_is_good_for_a_float_field(folder: Path) -> None:
    read = config.load(written(folder, f"{GOOD}train:\n  epochs: 3\n"))
    assert read.train.epochs == 3.0
    assert isinstance(read.train.epochs, float)


@pytest.mark.parametrize(
    "train",
    [
        "train.jsonl",
        "[train.jsonl]",
        "[{path: train.jsonl}]",
        "{path: train.jsonl, format: auto, columns: {}, weight: 1}",
    ],
)
def test_every_way_to_name_the_data(folder: Path, train: str) -> None:
    read = config.load(written(folder, f"data:\n  train: {train}\n"))
    assert read.data.train == (DataSource(path=str(folder / "train.jsonl")),)


def test_paths_are_relative_to_the_run_file_and_those_of_overrides_to_here(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = folder / "here"
    here.mkdir()
    (here / "local.jsonl").write_text("{}")
    (folder / "base").mkdir()
    monkeypatch.chdir(here)
    text = f"model: base\noutput: runs/a\n{GOOD}  validation: more.jsonl\n"
    read = config.load(written(folder, text), ["data.train=local.jsonl"])
    assert read.data.train[0].path == str(here / "local.jsonl")
    assert read.data.validation == str(folder / "more.jsonl")
    assert read.model == str(folder / "base")
    assert read.output == str(folder / "runs/a")
    assert config.load(written(folder, GOOD)).model == "bundled"
    assert config.load(written(folder, f"model: some/name\n{GOOD}")).model == "some/name"


def test_a_section_with_nothing_under_it_has_its_defaults(folder: Path) -> None:
    assert config.load(written(folder, f"{GOOD}lora:\ntrain:\n")) == config.load(written(folder, GOOD))


def test_overrides_win_and_reach_into_lists(folder: Path) -> None:
    text = "data:\n  train:\n    - path: train.jsonl\n    - path: more.jsonl\ntrain:\n  epochs: 2\n"
    read = config.load(
        written(folder, text),
        ["train.epochs=3", "lora.rank=8", "data.train[1].weight=0.5", "lora.targets=[q_proj, v_proj]"],
    )
    assert (read.train.epochs, read.lora.rank) == (3.0, 8)
    assert [source.weight for source in read.data.train] == [1.0, 0.5]
    assert read.lora.targets == ("q_proj", "v_proj")


def test_the_config_cannot_be_changed(folder: Path) -> None:
    read = config.load(written(folder, GOOD))
    with pytest.raises(ValueError, match="frozen"):
        read.train.epochs = 2.0  # type: ignore[misc]


# What is told


def test_all_problems_in_one_error_in_the_documented_form(folder: Path) -> None:
    text = """model: bundled
seed: 1

data:
  max_tokens: 64

train:
  learning_rte: 1e-4
  epochs: 1
data2: {}
"""
    with pytest.raises(InputError) as caught:
        config.load(written(folder, text))
    assert str(caught.value) == (
        f"{folder / 'run.yaml'}: 3 problems\n"
        "  line 5: data.train: is missing; give a list of files\n"
        "  line 8: train.learning_rte: no such field; did you mean learning_rate?\n"
        "  line 10: data2: no such field; did you mean data?"
    )


def misspellings(name: str, valid: set[str]) -> list[str]:
    """Slips of the fingers: a letter lost, doubled, swapped; capitals; hyphens; never another field."""
    middle = len(name) // 2
    swapped = name[: middle - 1] + name[middle] + name[middle - 1] + name[middle + 1 :]
    slips = {
        name[:middle] + name[middle + 1 :],
        name[:middle] + name[middle] + name[middle:],
        swapped,
        name.upper(),
        name.replace("_", "-"),
        name + "s",
    }
    return sorted(slip for slip in slips if slip not in valid and slip != name)


@pytest.mark.parametrize("path", [*field_paths(), *(f"data.train[0].{name}" for name in DataSource.model_fields)])
def test_every_misspelt_field_is_told_with_its_line_and_the_right_name(folder: Path, path: str) -> None:
    parent, _, name = path.rpartition(".")
    section: type[Section] = RunConfig
    if parent.startswith("data.train"):
        section = DataSource
    elif parent:
        section = section_of(field_options(RunConfig, parent)) or RunConfig
    everywhere = {full.rpartition(".")[2] for full in field_paths()}
    for slip in misspellings(name, set(section.model_fields) | everywhere):
        if section is DataSource:
            text = f"data:\n  train:\n    - path: train.jsonl\n      {slip}: 1\n"
            expected = f"line 4: data.train[0].{slip}: no such field; did you mean {name}?"
        else:
            text, line = with_field(f"{parent}.{slip}" if parent else slip, "1")
            expected = f"line {line}: {parent + '.' if parent else ''}{slip}: no such field; did you mean {name}?"
        found = problems(folder, text)
        assert found == [expected]
        if section is not DataSource:
            named = f"{parent}.{slip}" if parent else slip
            assert problems(folder, GOOD, f"{named}=1") == [
                f"override {named}=1: no such field; did you mean {name}?"
            ]


def wrong_values(options: tuple[Option, ...]) -> list[str]:
    """YAML of values that no type of a field takes."""
    kinds = {option.type for option in options}
    wrong = []
    if not kinds & {int, float}:
        wrong += ["3", "2.5"]
    if bool not in kinds:
        wrong.append("true")
    if str not in kinds and not any(option.type is tuple and section_of(option.items[0]) for option in options):
        wrong += ["some words", "'1'"]
    if types.NoneType not in kinds:
        wrong.append("null")
    if tuple not in kinds:
        wrong.append("[1, 2]")
    if dict not in kinds and not any(option.type is tuple and section_of(option.items[0]) for option in options):
        wrong.append("{a: b}")
    for option in options:
        if option.type is Literal:
            wrong.append(f"{option.items[0]}x")
        if option.type in (int, float):
            wrong += [".nan", ".inf", "-.inf", "1e999", "-1", "1e20", "!!python/none ''"]
        if option.type is int:
            wrong += ["1.5", "0x10", "010", "1:30", "9" * 5000]
    return wrong


@pytest.mark.parametrize("path", field_paths())
def test_every_wrong_type_is_told_once_with_its_line(folder: Path, path: str) -> None:
    parent, _, name = path.rpartition(".")
    section = (section_of(field_options(RunConfig, parent)) or RunConfig) if parent else RunConfig
    options = field_options(section, name)
    for value in wrong_values(options):
        text, line = with_field(path, value)
        if any(option.marked(InputFile) for option in options) and value in ("some words", "'1'"):
            continue
        found = problems(folder, text)
        assert len(found) == 1, (value, found)
        assert found[0].startswith((f"line {line}: {path}: ", f"line {line}: {path}[0]: ")), (value, found)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (
            "train: {learning_rate: 3}",
            "line 3: train.learning_rate: must be a number greater than 0 and less than 1, or empty "
            "(usually between 1e-6 and 2e-3), found 3",
        ),
        (
            "train: {learning_rate: -1}",
            "line 3: train.learning_rate: must be a number greater than 0 and less than 1, or empty "
            "(usually between 1e-6 and 2e-3), found -1",
        ),
        ("lora: {rank: 0}", "line 3: lora.rank: must be a whole number from 1 to 1024, found 0"),
        ("lora: {rank: 1025}", "line 3: lora.rank: must be a whole number from 1 to 1024, found 1025"),
        (
            "train: {steps: 1e3}",
            "line 3: train.steps: must be a whole number at least 1, or empty, found 1e3; write 1000",
        ),
        (
            'train: {micro_batch: "4"}',
            'line 3: train.micro_batch: must be a whole number from 1 to 65536, found "4"; '
            "write it without quotes",
        ),
        ("method: qlor", "line 3: method: must be one of auto, qlora, lora, full, found qlor; did you mean qlora?"),
        (
            "train: {betas: [0.9]}",
            "line 3: train.betas: must be a list of 2, each a number at least 0 and less than 1, or empty, "
            "found a list of 1",
        ),
        (
            "train: {betas: [0.9, 1.0]}",
            "line 3: train.betas[1]: must be a number at least 0 and less than 1, found 1.0",
        ),
        ("rank: 8", "line 3: rank: no such field here; did you mean lora.rank?"),
        ("lora: 5", "line 3: lora: must be a section with fields of its own, found 5"),
        ("{<<: {seed: 1}}: 3", "line 3: the run file: a field's name must be a word, found a mapping"),
        ("<<: {seed: 1}", "line 3: <<: merge keys are not supported; write the fields out"),
        ("model: no", "line 3: model: must be text, found no; as text it takes quotes"),
        ('model: "  "', "line 3: model: is empty"),
        ('model: "a\\0b"', "line 3: model: holds a character that no text file or path can have"),
        ("seed: 1\nseed: 2", "line 4: seed: given twice (first on line 3); keep one"),
        (
            "evaluate: {batch: !!int 4, task: !x none}",
            "line 3: evaluate.task: the YAML tag !x is not supported; write the plain value",
        ),
    ],
)  # fmt: skip
def test_the_words_of_one_problem(folder: Path, line: str, told: str) -> None:
    assert problems(folder, f"{GOOD}{line}\n") == [told]


def test_each_wrong_entry_of_a_list_is_told_once(folder: Path) -> None:
    text = "data:\n  train: [5, train.jsonl, [x]]\nlora:\n  targets: [q_proj, 5, '', {a: b}]\n"
    assert problems(folder, text + "train:\n  betas: [0.9, x]\n") == [
        "line 2: data.train[0]: must be a file's path, found 5; as text it takes quotes",
        "line 2: data.train[2]: must be a file's path or a mapping "
        "{path, format, columns, instruction, weight, share}, found a list",
        "line 4: lora.targets[1]: must be text, found 5; as text it takes quotes",
        "line 4: lora.targets[2]: is empty",
        "line 4: lora.targets[3]: must be text, found a mapping",
        "line 6: train.betas[1]: must be a number at least 0 and less than 1, found x",
    ]


def test_missing_files_are_told_with_the_place_that_was_searched(folder: Path) -> None:
    (folder / "sub").mkdir()
    text = """data:
  train:
    - path: alpaca.json
    - sub
  validation: none.jsonl
model: ./base
evaluate:
  task: sql
  data: x.jsonl
  database: y.sqlite
"""
    assert problems(folder, text, "data.train[1]=gone.json") == [
        f"line 3: data.train[0].path: alpaca.json: no such file (looked for {folder / 'alpaca.json'})",
        f"line 5: data.validation: none.jsonl: no such file (looked for {folder / 'none.jsonl'})",
        f"line 6: model: ./base: no such model (looked for {folder / 'base'})",
        f"line 9: evaluate.data: x.jsonl: no such file (looked for {folder / 'x.jsonl'})",
        f"line 10: evaluate.database: y.sqlite: no such file (looked for {folder / 'y.sqlite'})",
        f"override data.train[1]=gone.json: gone.json: no such file (looked for {Path.cwd() / 'gone.json'})",
    ]
    assert "is a folder; name a file in it" in problems(folder, text)[1]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("method: full\nlora:\n  rank: 8\n", "line 5: lora.rank: method full has no adapter"),
        ("method: full\ntrain:\n  compute: int8\n", "line 5: train.compute: int8 is for frozen weights"),
        (
            "train:\n  compute: int8\nlora:\n  dropout: 0.1\n",
            "line 4: train.compute: int8 does not cover dropout",
        ),
        ("method: full\ntrain:\n  objective: dpo\n", "line 5: train.objective: dpo compares with the base"),
        (
            "lora:\n  rank_pattern: {q_proj: 5000}\n",
            "line 4: lora.rank_pattern.q_proj: must be a whole number from 1 to 1024, found 5000",
        ),
        (
            "lora:\n  rank_pattern: {q_proj: many}\n",
            "line 4: lora.rank_pattern: must be a whole number from 1 to 1024, found many",
        ),
        (
            "lora:\n  rank_pattern: 5\n",
            "line 4: lora.rank_pattern: must be a mapping of text to a whole number from 1 to 1024, found 5",
        ),
        (
            "train:\n  trackers: wandb\n",
            "line 4: train.trackers: must be a list, each one of wandb, mlflow, trackio, swanlab, or empty",
        ),
        (
            "train:\n  trackers: [wanda]\n",
            "line 4: train.trackers[0]: must be one of wandb, mlflow, trackio, swanlab, found wanda",
        ),
        (
            "train:\n  objective: dpo\n  compute: int8\n",
            "line 5: train.compute: dpo compares the model with its base",
        ),
        ("train:\n  objective: kto\n  neftune_alpha: 5\n", "line 5: train.neftune_alpha: kto compares the model"),
        ("train:\n  beta: 0.2\n", "line 4: train.beta: has no effect on supervised training"),
        ("  train_on: all\ntrain:\n  objective: orpo\n", "line 3: data.train_on: has no effect on pairs"),
        (
            "train:\n  optimizer: adafactor\n  optimizer_states: disk\n",
            "line 5: train.optimizer_states: adafactor looks at whole matrices",
        ),
        (
            "train:\n  optimizer: adafactor\n  betas: [0.9, 0.99]\n",
            "line 5: train.betas: has no effect: adafactor has no such rates",
        ),
        ("train:\n  steps: 5\n  epochs: 2\n", "line 4: train.steps: given together with train.epochs"),
        (
            "train:\n  validate_every_steps: 5\n",
            "line 4: train.validate_every_steps: there is nothing to validate on",
        ),
        ("  validation: train.jsonl\n", "line 3: data.validation: "),
        ("  validation: ../work/train.jsonl\n", "line 3: data.validation: "),
        ("evaluate:\n  data: test.jsonl\n", "line 4: evaluate.data: has no effect with task none"),
        ("evaluate:\n  task: text\n", "line 4: evaluate.task: text needs questions"),
        (
            "evaluate:\n  task: sql\n  data: test.jsonl\n",
            "line 4: evaluate.task: sql needs evaluate.database",
        ),
        (
            "evaluate:\n  task: text\n  data: test.jsonl\n  database: shop.sqlite\n",
            "line 6: evaluate.database: only task sql runs on a database",
        ),
    ],
)
def test_impossible_combinations(folder: Path, text: str, told: str) -> None:
    found = problems(folder, GOOD + text)
    assert len(found) == 1
    assert found[0].startswith(told)


def test_a_misread_field_does_not_make_false_combinations(folder: Path) -> None:
    text = f"{GOOD}  validation: [1]\ntrain:\n  validate_every_steps: 5\nevaluate:\n  task: text\n"
    assert len(problems(folder, text)) == 1


def test_combinations_are_told_beside_other_problems(folder: Path) -> None:
    found = problems(folder, f"{GOOD}method: full\nlora:\n  rank: 8\n  ranc: 4\nseed: -1\n")
    assert [entry.split(":")[0] for entry in found] == ["line 5", "line 6", "line 7"]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("seed", "override seed: must look like train.learning_rate=1e-4"),
        ("=3", "override =3: must look like train.learning_rate=1e-4"),
        ("train..epochs=3", "override train..epochs=3: must look like train.learning_rate=1e-4"),
        ("train.epochs=", "override train.epochs=: has no value; give a number greater than 0"),
        ("train.epochs=[1", "override train.epochs=[1: not valid YAML"),
        ("train.epochs=2 # two", "override train.epochs=2 # two: what follows # would be lost"),
        ("data.train[3].path=x", "override data.train[3].path=x: data.train is not written as a list"),
        ("seed.x=3", "override seed.x=3: seed is not written as a mapping"),
        ("train={epochs: 2}", "override train={epochs: 2}: names a whole section"),
        (
            "train.learning_rate=3",
            "override train.learning_rate=3: must be a number greater than 0 and less than 1",
        ),
    ],
)
def test_overrides_that_cannot_be_used(folder: Path, override: str, told: str) -> None:
    found = problems(folder, f"{GOOD}seed: 1\ntrain:\n  epochs: 2\n", override)
    assert len(found) == 1
    assert found[0].startswith(told)
    assert problems(folder, GOOD, "seed=1", "seed=2") == ["override seed=2: seed is given twice"]


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        (b"", "data: is missing"),
        (b"- a\n- b\n", "line 1: must be a mapping of fields"),
        (b"data: {train: [a, b}\n", "line 1: not valid YAML"),
        (b"seed: 1\n  x: 2\n", "line 2: not valid YAML"),
        (b"seed: \xff\xfe\n", "line 1: not UTF-8 text (byte 0xff)"),
        (b"a: 1\nb: \x01\n", "line 2: not valid YAML: the character '\\x01' is not allowed"),
        (b"a: 1\n---\nb: 2\n", "line 2: not valid YAML"),
        (b"a: " + b"[" * 5000, "not valid YAML: nested too deeply"),
        (b'a: "\\UFFFFFFFF"', "not valid YAML"),
        (b"x" * (1 << 19), "larger than 256 KiB"),
        (b"data: &a\n  train: *a\n", "line 1: data.train"),
        (b"data:\n  train: ''\n", "line 2: data.train: is empty"),
    ],
)
def test_broken_files(folder: Path, raw: bytes, told: str) -> None:
    path = folder / "run.yaml"
    path.write_bytes(raw)
    with pytest.raises(InputError) as caught:
        config.load(path)
    assert caught.value.problems[0].startswith(told)


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file; `fitune init` writes one"):
        config.load(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="is a folder"):
        config.load(tmp_path)


def test_a_byte_order_mark_is_no_problem(folder: Path) -> None:
    (folder / "run.yaml").write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert config.load(folder / "run.yaml").data.train


# Anything at all: a config or an InputError

FRAGMENTS = st.sampled_from(
    [
        *field_paths(), *(path.rpartition(".")[2] for path in field_paths()), "data:\n",
        "  train: train.jsonl\n", ": ", "\n", "  ", "- ", "[", "]", "{", "}", "'", '"', "&a ", "*a", "!!str ",
        "!!binary ", "!x ", "|", ">", "#", "<<", "? ", "---", "...", "%YAML 1.1", "\t", "1e-4", "-1", "null",
        "~", "true", ".inf", "99999999999999999999",
        "\\x00", "\\ud800", "é", "模型", "../", "/", "~nobody/x", "=", ",", "0", "2001-01-01", "1:30",
    ]
)  # fmt: skip


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(FRAGMENTS | st.text(max_size=5), max_size=25).map("".join),
    st.lists(st.text(max_size=12), max_size=2),
)
def test_any_text_is_a_config_or_an_input_error(folder: Path, text: str, overrides: list[str]) -> None:
    (folder / "run.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    read = loaded(folder / "run.yaml", overrides)
    assert isinstance(read, RunConfig) or read.problems


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["q", "1e-4"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*DataSource.model_fields, "x", "train", "rank"]), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(field_paths()), VALUES, max_size=4))
def test_any_values_of_real_fields_are_a_config_or_problems_with_lines(folder: Path, chosen: dict) -> None:
    tree: dict = {"data": {"train": "train.jsonl"}}
    for path, value in chosen.items():
        section, _, name = path.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = value
    text = yaml.safe_dump(tree)
    (folder / "run.yaml").write_text(text, encoding="utf-8")
    read = loaded(folder / "run.yaml")
    if isinstance(read, InputError):
        assert all(problem.startswith("line ") for problem in read.problems)
    else:
        (folder / "again.yaml").write_text(config.dump(read), encoding="utf-8")
        assert config.load(folder / "again.yaml") == read


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("weight: 0", "line 4: data.train.weight: must be a number greater than 0 and at most 1000, found 0"),
        ("weight: much", "line 4: data.train.weight: must be a number"),
        ("format: [1]", "line 4: data.train.format: must be text, found a list"),
    ],
)
def test_one_entry_without_its_list_has_its_line(folder: Path, written: str, told: str) -> None:
    found = problems(folder, f"data:\n  train:\n    path: gone.jsonl\n    {written}\n")
    assert len(found) == 2
    assert found[1].startswith(told)


def test_the_nearest_name_is_what_difflib_finds() -> None:
    """An independent look at the suggestions: the best ratio among the section's fields."""
    names = list(RunConfig.model_fields["train"].annotation.model_fields)  # type: ignore[union-attr]
    best = max(names, key=lambda name: difflib.SequenceMatcher(None, "lerning_rat", name).ratio())
    assert nearest("lerning_rat", names) == best == "learning_rate"
    assert nearest("zzz", names) is None
