"""Models known by their dimensions alone: enough to plan for, without a download.

Names are matched whatever their case and however their words are joined (`Llama2_13B`, `llama-2-13b`); so are the
names that the models have on the hub.
"""

from __future__ import annotations

import difflib
import os
import re
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from fitune.errors import InputError
from fitune.models.find import find_model
from fitune.models.preset_table import PRESETS, Preset
from fitune.models.source import Kind, ModelSource

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

# Configuration fields that make two models the same size.
_SIZES = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
# The family of a model that has no preset's dimensions, where its type tells.
_FAMILY_OF_TYPE = {
    "gemma": "gemma",
    "gemma2": "gemma-2",
    "gemma3_text": "gemma-3",
    "gemma3": "gemma-3",
    "glm": "glm-4",
    "mistral": "mistral",
    "mixtral": "mixtral",
    "phi3": "phi-3",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3",
    "smollm3": "smollm3",
}


def find_preset(words: str) -> Preset | None:
    """The preset of this name, or of this name on the hub (`owner/name`, `owner/name@revision`, or `name`).

    With an owner only the very name is taken: a path, or another owner's model, may be anything.
    """
    name = words.strip().partition("@")[0]
    return _BY_HUB.get(name.lower()) if "/" in name else _BY_KEY.get(_key(name))


def near_presets(words: str) -> list[str]:
    """Up to three names of presets that resemble `words`."""
    found = difflib.get_close_matches(_key(words), list(_BY_KEY), n=8, cutoff=0.6)
    return list(dict.fromkeys(_BY_KEY[key].name for key in found))[:3]


def preset_config(preset: Preset) -> PretrainedConfig:
    """The transformers configuration of a preset; its weights are taken to be bfloat16."""
    import torch
    from transformers import AutoConfig

    fields = dict(preset.config)
    return AutoConfig.for_model(fields.pop("model_type"), **fields, dtype=torch.bfloat16)


def preset_like(config: PretrainedConfig, reference: str = "") -> Preset | None:
    """The preset with the dimensions of `config`; of several the one that `reference` names, or of its context."""
    wanted = config.get_text_config()
    same = [
        preset for preset in PRESETS
        if all(preset.config[name] == getattr(wanted, name, None) for name in _SIZES)
    ]  # fmt: skip

    def rank(preset: Preset) -> tuple[int, bool]:
        family = _key(preset.family)
        named = len(family) if family in _key(reference) else 0  # qwen2-5 is more than qwen2
        return named, preset.config["max_position_embeddings"] == getattr(wanted, "max_position_embeddings", None)

    return max(same, key=rank, default=None)


def family_of(config: PretrainedConfig, reference: str = "") -> str | None:
    """The family whose recommended settings apply to a model; None where neither sizes nor type tell."""
    preset = preset_like(config, reference)
    return preset.family if preset else _FAMILY_OF_TYPE.get(config.model_type)


def open_to_plan(reference: str) -> ModelSource:
    """A model to plan for: as `find_model`, and presets too.

    What exists on disk, or wholly in the hub's local cache, wins. A hub name that is not there but has a preset is
    planned by it, without fetching gigabytes that a plan does not need. Raises InputError with the nearest names.
    """
    preset = find_preset(reference)
    if preset is not None and not os.path.exists(os.path.expanduser(reference.strip())):
        if "/" not in reference:
            return PresetSource(preset, reference)
        if not _is_cached(reference):
            source = PresetSource(preset, reference)
            reason = f"not in the local cache: the published dimensions are taken ({preset.name})"
            source.note = f"{reason}; {preset.note}" if preset.note else reason
            return source
    try:
        return find_model(reference)
    except InputError as error:
        near = near_presets(reference)
        if not near or preset is not None or len(error.problems) != 1:
            raise
        raise InputError(f"{error.problems[0]}; presets of a similar name: {', '.join(near)}", error.where) from error


class PresetSource(ModelSource):
    """A model of published dimensions, without weights: it can be planned for and shown, not trained."""

    kind: Kind = "preset"

    def __init__(self, preset: Preset, reference: str | None = None) -> None:
        self.preset = preset
        self.reference = reference or preset.name
        self.note = preset.note

    @cached_property
    def config(self) -> PretrainedConfig:
        return preset_config(self.preset)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        import torch

        from fitune.models.graph import build_graph

        graph = build_graph(self.config, torch.bfloat16)
        return {name: tuple(parameter.shape) for name, parameter in graph.named_parameters()}

    def tensor_names(self) -> list[str]:
        """The graph's own names, which for mixtures of experts are not those of the checkpoint."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        import torch

        self._shapes[name]  # a KeyError for an unknown name
        return torch.bfloat16

    def read(self, name: str) -> torch.Tensor:
        self._refuse()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        self._refuse()

    def generation_config(self) -> GenerationConfig:
        self._refuse()

    def files(self) -> list[Path]:
        self._refuse()

    def write_companions(self, folder: Path) -> None:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise InputError(
            f"a preset has dimensions only, no weights; give a folder, a .gguf file or a hub name to train, "
            f"e.g. {self.preset.hub[0]}",
            where=f"model {self.reference!r}",
        )


def _key(words: str) -> str:
    """A name without its owner, case and joints; a joint between two numbers stays: 3.1-8b is not 31-8b."""
    text = re.sub(r"[^a-z0-9]+", "-", words.rpartition("/")[2].lower()).strip("-")
    return re.sub(r"(?<=[a-z])-|-(?=[a-z])", "", text)


_BY_HUB: dict[str, Preset] = {hub.lower(): preset for preset in PRESETS for hub in preset.hub}
_BY_KEY: dict[str, Preset] = {_key(name): preset for preset in PRESETS for name in (*preset.hub, preset.name)}


def _is_cached(reference: str) -> bool:
    """Whether the hub's local cache has the configuration and all the weights of a hub name."""
    from huggingface_hub import snapshot_download

    from fitune.models.checkpoint_files import find_weights

    name, _, revision = reference.strip().partition("@")
    try:
        folder = Path(snapshot_download(name, revision=revision or None, local_files_only=True))
    except (OSError, ValueError):
        return False
    problems: list[str] = []
    return (folder / "config.json").is_file() and bool(find_weights(folder, problems)) and not problems
