"""A checkpoint folder of an architecture that transformers does not carry, read as one that it does carry.

Nothing of the code that comes with such a checkpoint is run: each tensor of the new layout is a run of rows of one
tensor of the old layout.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from fitune.errors import InputError
from fitune.models.checkpoint_files import (
    PickledFiles,
    find_index,
    find_weights,
    first_line,
    indexed_names,
    open_files,
    read_json,
)
from fitune.models.folder import COMPANIONS, PLAIN
from fitune.models.source import Kind, ModelSource
from fitune.models.tokenizer_check import check_tokenizer


@dataclass(frozen=True)
class Rows:
    """Rows [start, stop) of a tensor of the original checkpoint; all of them where `stop` is None."""

    original: str
    start: int = 0
    stop: int | None = None


class ConvertedFolder(ModelSource):
    """A folder whose configuration and tensors are given as those of another architecture.

    Attributes:
        known_fields: the fields of the original config.json that are understood, beside every model's.
        documented_template: the chat template of the model's documentation.
        stop_tokens: the tokens that end an answer.

    Raises InputError at construction, with everything that is wrong with configuration, files and names.
    """

    known_fields: frozenset[str]
    documented_template: str
    stop_tokens: tuple[str, ...]

    def __init__(self, folder: Path, reference: str | None = None, kind: Kind = "folder") -> None:
        self.folder = folder
        self.reference = reference or str(folder)
        self.kind = kind
        problems: list[str] = []
        self._fields = read_json(folder / "config.json", problems)
        if not problems:
            problems += unknown_fields(self._fields, self.known_fields)
            problems += self._refusals(self._fields)
        weights = find_weights(folder, problems)
        self._files = open_files(weights, problems)
        index = find_index(folder, weights)
        self._weight_files = [*weights, *([index] if index else [])]
        if index is not None and not problems:
            have = set(self._files.names())
            missing = [name for name in indexed_names(index, problems) if name not in have]
            problems += [f"{index.name} names tensors that no file holds (first: {missing[0]})"] if missing else []
        if not problems:
            self._config = self._converted_config(self._fields)
            self._config.dtype = self._stored_dtype(problems)
            self._rows = self._converted_rows(problems)
        if problems:
            raise InputError(problems[:20], where=folder)
        if isinstance(self._files, PickledFiles):
            self._add_note("weights read from a pickled .bin, tensors only")
        if self._own_template() not in (None, self._chat_template):
            self._add_note("its chat template does not end the last answer; the documented one, with an end, is used")

    @abstractmethod
    def _refusals(self, fields: Mapping[str, Any]) -> list[str]:
        """What in the original configuration the other architecture cannot do."""

    @abstractmethod
    def _converted_config(self, fields: Mapping[str, Any]) -> PretrainedConfig:
        """The other architecture's configuration."""

    @abstractmethod
    def _converted(self, name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, Rows]]:
        """The new names that an original tensor makes, none for a buffer that is computed.

        Raises InputError for a name that the original architecture does not have, or a shape it cannot have.
        """

    @abstractmethod
    def _build_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer with its chat template."""

    def _stored_dtype(self, problems: list[str]) -> torch.dtype:
        matrices = [self._files.dtype(name) for name in self._files.names() if len(self._files.shape(name)) > 1]
        odd = sorted({str(dtype) for dtype in matrices if dtype not in PLAIN})
        if odd:
            problems.append(f"tensors are stored as {', '.join(odd)}; 16- and 32-bit weights are read")
        return max(set(matrices), key=matrices.count) if matrices else torch.float32

    def _converted_rows(self, problems: list[str]) -> dict[str, Rows]:
        placed: dict[str, Rows] = {}
        for name in self._files.names():
            try:
                placed.update(self._converted(name, self._files.shape(name)))
            except InputError as error:
                problems += error.problems
        return placed

    @property
    def config(self) -> PretrainedConfig:
        return self._config

    def tensor_names(self) -> list[str]:
        return list(self._rows)

    def shape(self, name: str) -> tuple[int, ...]:
        rows = self._rows[name]
        whole = self._files.shape(rows.original)
        return (len(range(*slice(rows.start, rows.stop).indices(whole[0]))), *whole[1:])

    def dtype(self, name: str) -> torch.dtype:
        return self._files.dtype(self._rows[name].original)

    def read(self, name: str) -> torch.Tensor:
        rows = self._rows[name]
        return self._files.read(rows.original)[rows.start : rows.stop]

    def release(self) -> None:
        self._files.release()

    @cached_property
    def _tokenizer_and_warnings(self) -> tuple[PreTrainedTokenizerBase, list[str]]:
        tokenizer = self._build_tokenizer()
        problems, warnings = check_tokenizer(tokenizer, self.config.vocab_size)
        if problems:
            raise InputError(problems, where=self.folder)
        return tokenizer, warnings

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._tokenizer_and_warnings[0]

    def warnings(self) -> list[str]:
        return list(self._tokenizer_and_warnings[1])

    def generation_config(self) -> GenerationConfig:
        if not (self.folder / "generation_config.json").is_file():
            return GenerationConfig.from_model_config(self.config)
        try:
            found = GenerationConfig.from_pretrained(self.folder, local_files_only=True)
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"generation_config.json: {first_line(error)}", where=self.folder) from error
        if not isinstance(found.eos_token_id, list):
            found.eos_token_id = self.config.eos_token_id
        return found

    def write_companions(self, folder: Path) -> None:
        # Not copied: weights beside these are in the new layout, and need no foreign code.
        self.config.save_pretrained(folder)
        self.generation_config().save_pretrained(folder)
        self.tokenizer().save_pretrained(folder)

    def files(self) -> list[Path]:
        return [*self._weight_files, *(path for name in COMPANIONS if (path := self.folder / name).is_file())]

    def _add_note(self, words: str) -> None:
        self.note = f"{self.note}; {words}" if self.note else words

    def _settings(self, name: str) -> dict[str, Any]:
        """A JSON file of the folder; empty where there is none."""
        if not (self.folder / name).is_file():
            return {}
        problems: list[str] = []
        found = read_json(self.folder / name, problems)
        if problems:
            raise InputError(problems, where=self.folder)
        return found

    def _own_template(self) -> str | None:
        """The chat template that came with the model."""
        file = self.folder / "chat_template.jinja"
        if file.is_file():
            return file.read_text(encoding="utf-8")
        found = self._settings("tokenizer_config.json").get("chat_template")
        return found if isinstance(found, str) else None

    @cached_property
    def _chat_template(self) -> str:
        """The model's own chat template where it ends the last answer with a stop token, else the documented one."""
        own = self._own_template()
        if own is None:
            return self.documented_template
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
        try:
            (text,), _ = render_jinja_template([turns], chat_template=own, eos_token=self.stop_tokens[0])
        except Exception as error:  # a template may raise anything
            raise InputError(f"the chat template cannot be used: {first_line(error)}", where=self.folder) from error
        return own if text.rstrip().endswith(self.stop_tokens) else self.documented_template


def unknown_fields(fields: Mapping[str, Any], known: frozenset[str]) -> list[str]:
    """One problem for each field that nothing is known about; a field that is null asks for nothing."""
    everywhere = {*PretrainedConfig().to_dict(), "torch_dtype", "_name_or_path", "auto_map", "_from_model_config"}
    everywhere |= {"tokenizer_class", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"}
    odd = sorted(name for name in set(fields) - known - everywhere if fields[name] is not None)
    return [
        f"config.json: {name} = {fields[name]!r} is not known for model_type {fields.get('model_type')!r}, so its "
        "effect cannot be kept; remove the field if it has none"
        for name in odd
    ]


def missing_fields(fields: Mapping[str, Any], needed: tuple[str, ...]) -> list[str]:
    """One problem for each field that is not there or no positive number."""
    return [
        f"config.json: {name} is {fields.get(name)!r}; a positive number is needed"
        for name in needed
        if isinstance(fields.get(name), bool) or not isinstance(fields.get(name), (int, float)) or fields[name] <= 0
    ]
