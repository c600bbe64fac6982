"""A Hugging Face checkpoint folder as a model source: plain or quantised weights, read from the mapped files."""

from __future__ import annotations

import json
import re
import shutil
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from fitune.errors import InputError
from fitune.models.answer_end import end_last_answer
from fitune.models.checkpoint_files import (
    CODES,
    CheckpointTensors,
    PickledFiles,
    find_index,
    find_weights,
    first_line,
    indexed_names,
    open_files,
    read_json,
)
from fitune.models.config_file import ConfigFile, read_config
from fitune.models.decoded_tensors import DecodedTensors
from fitune.models.source import Kind, ModelSource
from fitune.models.tokenizer_check import check_tokenizer

if TYPE_CHECKING:
    from fitune.models.bitsandbytes_folder import BitsAndBytesWeights
    from fitune.quant.nf4 import NF4Weight

# What a folder may hold beside its weights that changes what the model does.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
# What a multimodal model's pictures and sounds are prepared by.
_PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)
# One of these is what tokens are made by; the others only say how.
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
COMPANIONS = ("config.json", "generation_config.json", *TOKENIZER_FILES, *_PROCESSOR_FILES)
STORE_MANIFEST = "store.json"
# What is read as it is: floats, and the integer tables that some models look things up in.
PLAIN = (torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int64, torch.bool)
# Buffers of older transformers that newer ones compute, and drop from a checkpoint without a word.
_OLD_BUFFERS = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")


class FolderSource(ModelSource):
    """A folder with config.json and weights: safetensors (one file, or shards with their index), else pickled ones.

    Quantised weights appear under their plain names, decoded when they are read.

    Raises InputError at construction for a folder whose weights or configuration cannot be used; all problems
    that can be told apart are reported together.
    """

    def __init__(self, folder: Path, reference: str | None = None, kind: Kind = "folder") -> None:
        self.folder = folder
        self.reference = reference or str(folder)
        self.kind = kind
        problems: list[str] = []
        self._weight_files = find_weights(folder, problems)
        found = read_config(folder, problems)
        files = open_files(self._weight_files, problems)
        self._index = find_index(folder, self._weight_files)
        if self._index is not None and not problems:
            self._check_index(set(files.names()), problems)
        self._bitsandbytes: BitsAndBytesWeights | None = None
        self._tensors = files
        if found is not None and not problems:
            self._config, self._config_warnings = found.config, found.warnings
            self._is_quantised = bool(found.quantisation)
            self._tensors = self._decoded(files, found, problems)
            self._check_stored_types(problems)
            self._left_out = self._tied_head(files)
        if problems:
            raise InputError(problems, where=folder)
        if isinstance(files, PickledFiles):
            self.note = "; ".join(filter(None, (self.note, "weights read from a pickled .bin, tensors only")))

    def _check_index(self, have: set[str], problems: list[str]) -> None:
        assert self._index is not None
        missing = [name for name in indexed_names(self._index, []) if name not in have]
        if missing:
            problems.append(
                f"{self._index.name} names {len(missing)} tensors that no file holds (first: {missing[0]})"
            )

    def _decoded(self, files: CheckpointTensors, found: ConfigFile, problems: list[str]) -> CheckpointTensors:
        """`files`, or what decodes them; and sets the note."""
        if not found.quantisation:
            return files
        dtype = found.config.dtype if found.config.dtype in PLAIN else torch.bfloat16
        if found.quantisation.get("quant_method") == "bitsandbytes":
            # Inside: quantised folders are few, and these rooms load libraries of their own.
            from fitune.models.bitsandbytes_folder import BitsAndBytesWeights

            manifest = self.folder / STORE_MANIFEST
            is_own = manifest.is_file()
            self._bitsandbytes = BitsAndBytesWeights(files, found.config, dtype, is_own, problems)
            encoding = self._bitsandbytes.encoding
            if is_own:
                made = read_json(manifest, problems)
                self.note = "; ".join(filter(None, (f"a store of {made.get('reference')}", made.get("note"))))
        else:
            from fitune.models.dequantise import find_encoding

            read = find_encoding(files, found.quantisation, dtype, self.folder, problems)
            if read is None:
                return files
            encoding = read
        self.note = encoding.note if self.note is None else f"{self.note}; {encoding.note}"
        return DecodedTensors(files, encoding)

    def _check_stored_types(self, problems: list[str]) -> None:
        if problems:  # where a quantised weight is not understood, its parts would be told of again
            return
        odd = [name for name in self._tensors.names() if self._tensors.dtype(name) not in PLAIN]
        if odd:
            dropped = re.compile("|".join((*_OLD_BUFFERS, *self._dropped_patterns())))
            odd = [name for name in odd if not dropped.search(name)]
        for name in odd[:3]:
            dtype = self._tensors.dtype(name)
            allowed = ", ".join(CODES[each] for each in PLAIN)
            problems.append(f"tensor {name} is stored as {CODES.get(dtype, dtype)}; {allowed} are read")
        if len(odd) > 3:
            problems.append(f"and {len(odd) - 3} more such tensors")

    def _dropped_patterns(self) -> list[str]:
        """What transformers' class of this architecture drops from a checkpoint."""
        if type(self._config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            return []
        return list(MODEL_FOR_CAUSAL_LM_MAPPING[type(self._config)]._keys_to_ignore_on_load_unexpected or ())

    def _tied_head(self, files: CheckpointTensors) -> set[str]:
        """Names in a pickled file that are another tensor once more; safetensors leave them out themselves."""
        if not isinstance(files, PickledFiles) or not getattr(self._config, "tie_word_embeddings", False):
            return set()
        if type(self._config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            return set()
        tied = MODEL_FOR_CAUSAL_LM_MAPPING[type(self._config)]._tied_weights_keys
        have = set(files.names())
        return {
            name for name, other in (tied or {}).items()
            if name in have and other in have and files.is_same_memory(name, other)
        }  # fmt: skip

    @property
    def config(self) -> PretrainedConfig:
        if getattr(self._config, "dtype", None) is None:
            matrices = [self._tensors.dtype(name) for name in self.tensor_names() if len(self.shape(name)) > 1]
            matrices = [dtype for dtype in matrices if dtype in PLAIN]
            self._config.dtype = max(set(matrices), key=matrices.count) if matrices else torch.float32
        return self._config

    def tensor_names(self) -> list[str]:
        return [name for name in self._tensors.names() if name not in self._left_out]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors.dtype(name)

    def read(self, name: str) -> torch.Tensor:
        return self._tensors.read(name)

    def release(self) -> None:
        self._tensors.release()

    def nf4(self, name: str) -> NF4Weight | None:
        return self._bitsandbytes.nf4(name) if self._bitsandbytes is not None else None

    def quantised_folder(self) -> Path | None:
        is_as_is = self._bitsandbytes is not None and self._bitsandbytes.is_as_is
        return self.folder if is_as_is else None

    @property
    def is_plain(self) -> bool:
        """Whether the files hold the very weights that `read` gives, so that other tools read the same from them."""
        return not self._is_quantised

    @cached_property
    def _tokenizer_and_warnings(self) -> tuple[PreTrainedTokenizerBase, list[str]]:
        if not any((self.folder / name).is_file() for name in VOCABULARY_FILES):
            raise InputError(self._no_tokenizer(), where=self.folder)
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers raises a dozen kinds here
            raise InputError(f"the tokenizer cannot be read: {first_line(error)}", where=self.folder) from error
        problems, warnings = check_tokenizer(tokenizer, self.config.get_text_config().vocab_size)
        if problems:
            raise InputError(problems, where=self.folder)
        added = end_last_answer(tokenizer, self._stop_ids())
        if added is not None:
            warnings.append(
                f"the chat template does not end the last answer; {added}, on which the model stops, is added there"
            )
        return tokenizer, warnings

    def _stop_ids(self) -> list[int]:
        """What configuration and generation configuration stop on."""
        found: list[int] = []
        for ends in (self.generation_config().eos_token_id, getattr(self.config, "eos_token_id", None)):
            found += ends if isinstance(ends, list | tuple) else [] if ends is None else [ends]
        return found

    def _no_tokenizer(self) -> str:
        if not (self.folder / STORE_MANIFEST).is_file():
            return f"the tokenizer is missing: none of {', '.join(TOKENIZER_FILES[:3])} is there; fetch them too"
        original = read_json(self.folder / STORE_MANIFEST, []).get("reference")
        return (
            f"a store of quantised weights without a tokenizer; give the model that it was made from: {original} "
            "(its store is found again)"
        )

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._tokenizer_and_warnings[0]

    def warnings(self) -> list[str]:
        return [*self._config_warnings, *self._tokenizer_and_warnings[1]]

    def generation_config(self) -> GenerationConfig:
        if not (self.folder / "generation_config.json").is_file():
            return GenerationConfig.from_model_config(self.config)
        try:
            return GenerationConfig.from_pretrained(self.folder, local_files_only=True)
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"generation_config.json: {first_line(error)}", where=self.folder) from error

    def write_companions(self, folder: Path) -> None:
        # Copied, not saved anew: a newer transformers would rewrite fields that older readers need.
        for path in self._companions():
            shutil.copyfile(path, folder / path.name)
        if self._is_quantised:
            written = read_json(folder / "config.json", [])
            (folder / "config.json").write_text(json.dumps(_unquantised(written, self.config), indent=2) + "\n")

    def files(self) -> list[Path]:
        manifest = self.folder / STORE_MANIFEST
        extra = [path for path in (self._index, manifest) if path is not None and path.is_file()]
        return [*self._weight_files, *self._companions(), *extra]

    def _companions(self) -> list[Path]:
        return [path for name in COMPANIONS if (path := self.folder / name).is_file()]


def _unquantised(written: dict[str, Any], config: PretrainedConfig) -> dict[str, Any]:
    """config.json of the same model with the decoded weights."""
    kept = {key: value for key, value in written.items() if key not in ("quantization_config", "compression_config")}
    return kept | {"torch_dtype" if "torch_dtype" in kept else "dtype": str(config.dtype).removeprefix("torch.")}
