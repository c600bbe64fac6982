"""Memory of answering questions while a run trains: a dry run of the cut-down model, as generation calls it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig
from transformers.cache_utils import Cache

from fitune.config.schema import RunConfig
from fitune.errors import FituneError
from fitune.generate.forward_call import call, forward_parameters, new_cache, slots_obstacle, undisturbed
from fitune.generate.slot_generation import PREFILL_STEP, PREFILL_TOKENS
from fitune.plan.anatomy import Anatomy, Layers
from fitune.plan.dry_run import make_parameters_fake
from fitune.plan.even_routing import EvenRouting
from fitune.plan.live_bytes import LiveBytes
from fitune.plan.small_model import small_model
from fitune.quant.lease import DecodedOnce, lease_for_generation

# Bits of a weight in NF4 with its block's nested maximum.
_NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
# The logits of a step, and what the choice of a token makes of them (in float32, and once more where it sorts).
_LOGIT_COPIES = 3


@dataclass(frozen=True)
class Answering:
    """How questions are answered: so many rows at once, of so many tokens at most.

    Attributes:
        shared_tokens: the beginning that all questions have in common; own_tokens: what the longest has beside it.
        new_tokens: of an answer.
    """

    rows: int
    shared_tokens: int
    own_tokens: int
    new_tokens: int

    @property
    def question_tokens(self) -> int:
        return self.shared_tokens + self.own_tokens

    @property
    def capacity(self) -> int:
        """Tokens of a question and its answer."""
        return self.question_tokens + self.new_tokens


@dataclass(frozen=True)
class AnsweringMemory:
    """What answering holds.

    Attributes:
        bytes: at its peak, without the model's weights.
        guessed: why it is an estimate; None: it is not.
    """

    bytes: int
    guessed: str | None = None

    @property
    def origin(self) -> str:
        """What the plan says the number comes from."""
        return "dry run" if self.guessed is None else "estimate"


NOTHING = AnsweringMemory(0)
_known: dict[str, AnsweringMemory] = {}


def answering_memory(
    run: RunConfig, config: PretrainedConfig, anatomy: Anatomy, asked: Answering | None, dtype: torch.dtype,
    backend: str,
) -> AnsweringMemory:  # fmt: skip
    """The most that answering holds at one time; nothing where nothing is asked.

    Caches of the questions and of all rows, what a forward makes on its way, logits; and, where no native kernel
    multiplies with weights in 4 bits, the weights decoded. Where a model cannot be dry-run its caches are taken to be
    as wide as its hidden states, twice.
    """
    if asked is None:
        return NOTHING
    held_dtype = torch.float32 if run.method == "full" else dtype
    text = config.get_text_config()
    logits = _LOGIT_COPIES * 4 * asked.rows * int(text.vocab_size)
    decoded = 0
    streams = run.train.resident_layers is not None
    if run.method == "qlora" and isinstance(lease_for_generation(backend, dtype, streams), DecodedOnce):
        decoded = round(sum(anatomy.layer_bytes) * 8 / _NF4_BITS * dtype.itemsize)
    key = repr((run.method, run.lora, asked, dtype, backend, config.to_json_string()))
    if key not in _known:  # a budget's variants differ in what answers do not depend on
        try:
            _known[key] = AnsweringMemory(_dry_run(run, config, anatomy, asked, dtype, backend))
        except (FituneError, RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
            why = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            a_token = 2 * int(text.num_hidden_layers) * int(text.hidden_size) * held_dtype.itemsize
            _known[key] = AnsweringMemory(2 * a_token * asked.rows * asked.capacity, why)
    return replace(_known[key], bytes=_known[key].bytes + logits + decoded)


def _dry_run(
    run: RunConfig, config: PretrainedConfig, anatomy: Anatomy, asked: Answering, dtype: torch.dtype, backend: str
) -> int:
    layers = anatomy.layers
    model, _ = small_model(run, config, layers, dtype, backend, filled=False)
    graph = model.graph
    mode, live = FakeTensorMode(allow_non_fake_inputs=True), LiveBytes()
    make_parameters_fake(graph, mode)
    with mode, EvenRouting(anatomy.expert_counts), live, undisturbed(graph):
        if slots_obstacle(graph, asked.capacity) is not None:
            return _in_lockstep(graph, asked, layers, live)
        return _in_slots(graph, asked, layers, live)


def _in_slots(graph: nn.Module, asked: Answering, layers: Layers, live: LiveBytes) -> int:
    """As slot_generation goes: the shared beginning, then groups of questions behind it, then steps of all rows."""
    own = max(1, asked.own_tokens - 1)
    padded = min(-(-own // PREFILL_STEP) * PREFILL_STEP, asked.own_tokens + asked.new_tokens)
    group = min(asked.rows, max(1, PREFILL_TOKENS // own))
    first = _cache(graph, layers)
    passing = _passing(live, lambda: _forward(graph, first, 1, 0, asked.shared_tokens or padded))
    a_token = _whole(first, layers) // (asked.shared_tokens or padded)
    questions = _with(first, graph, layers, group, asked.shared_tokens)
    passing = max(passing, _passing(live, lambda: _forward(graph, questions, group, asked.shared_tokens, padded)))
    # Not in slots: their native step takes addresses, which fake tensors have none of.
    rows = _with(first, graph, layers, asked.rows, asked.capacity - 1)
    passing = max(passing, _passing(live, lambda: _forward(graph, rows, asked.rows, asked.capacity - 1, 1)))
    of_questions = asked.shared_tokens + group * (asked.shared_tokens + padded)
    return a_token * (of_questions + asked.rows * asked.capacity) + passing


def _with(first: Cache, graph: nn.Module, layers: Layers, rows: int, count: int) -> Cache:
    """A cache that holds so many tokens of so many rows, of the kind of `first`."""
    cache = _cache(graph, layers)
    for layer, before in zip(cache.layers, first.layers, strict=True):
        if count:
            layer.update(
                before.keys[:1, :, :1].expand(rows, -1, count, -1),
                before.values[:1, :, :1].expand(rows, -1, count, -1),
            )
    return cache


def _in_lockstep(graph: nn.Module, asked: Answering, layers: Layers, live: LiveBytes) -> int:
    """As lockstep_generation goes: all rows at once, in a cache that is copied as it grows."""
    cache = _cache(graph, layers)
    before = live.current
    passing = _passing(live, lambda: _forward(graph, cache, asked.rows, 0, asked.question_tokens))
    kept = live.current - before
    share = len(layers.twins) / layers.kept if layers.kept else 1.0
    grown = kept * share * asked.capacity / asked.question_tokens
    return round(grown + grown * 2 / max(1, len(layers.twins))) + passing


def _cache(graph: nn.Module, layers: Layers) -> Cache:
    """An empty one for the layers that were kept."""
    cache = new_cache(graph)
    if layers.path is not None:
        del cache.layers[layers.kept :]
    return cache


def _forward(graph: nn.Module, cache: Cache, rows: int, start: int, count: int) -> None:
    tokens = torch.zeros(rows, count, dtype=torch.long)
    positions = torch.arange(start, start + count).expand(rows, -1)
    logits: Tensor = call(
        graph, forward_parameters(graph), tokens, past_key_values=cache,
        attention_mask=torch.ones(rows, start + count, dtype=torch.long), position_ids=positions,
    )  # fmt: skip
    del logits


def _passing(live: LiveBytes, forward: Callable[[], Any]) -> int:
    """The most that a forward makes, with the caches of the layers that were kept, which are few."""
    before = live.current
    live.reset_peak()
    forward()
    return live.peak - before


def _whole(cache: Cache, layers: Layers) -> int:
    """Bytes of a cache with the layers of the whole model."""
    of_layer = [
        sum(value.numel() * value.element_size() for value in (layer.keys, layer.values) if value is not None)
        for layer in cache.layers
        if getattr(layer, "keys", None) is not None
    ]
    if layers.path is None or len(of_layer) != layers.kept:
        return sum(of_layer)
    return sum(of_layer[twin] for twin in layers.twins)
