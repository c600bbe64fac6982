"""Which way of generating is right for a model: found on the model itself, with a few tokens.

The reference is a whole forward without cache, mask and positions, of one row alone. A way is right if, run as it
will be run, with rows of unequal length and over several steps, it gives the same logits. What is proven is
remembered for as long as the model lives.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fitune.errors import FituneError
from fitune.generate.forward_call import (
    device_of,
    forward,
    forward_parameters,
    indexer_obstacle,
    inner_model,
    slots_obstacle,
    text_config,
)
from fitune.generate.generation import GenerationPath, GenerationStats
from fitune.generate.lockstep_generation import CACHED_WAYS, PADDED, UNCACHED, Way, generate_lockstep
from fitune.generate.slot_generation import SlotBatch

# Relative difference of logits, their mean taken out. In float32 only the order of summation differs: 2e-6 at most
# over the audit's models, 6e-6 in SmolLM2-135M; the smallest fault seen is 1.5e-4 (a sparse mask with a cache).
TOLERANCE = 1e-4
# In low precision every layer rounds, so the difference grows with the root of their number: 1.5 times the precision
# and that root in SmolLM2-135M. Wrong positions are off by about 1.
ROUNDING_FACTOR = 4.0
MOST_ROUNDING = 0.3
STEPS = 3  # the first logits come with the prompt, the others out of a cache that has grown
SHARED_TOKENS = 2
SHORT_TOKENS = 5
LONG_TOKENS = 11  # at least; more where the config names a length that sequences outgrow
# Settings whose numbers are sizes of weights or counts: no length of a sequence is compared with them.
_NO_LENGTH = re.compile(
    r"head|dim|layer|rank|num_|hidden|intermediate|vocab|expert|position|inner|width|ffn|embd|scal|_id$|^n_|^d_"
)

_JOINT = "; "


@dataclass(frozen=True, slots=True)
class Choice:
    """How to generate: `way` None means slots; `reasons` says what ruled out the ways before it."""

    way: Way | None
    reasons: str | None

    @property
    def path(self) -> GenerationPath:
        return "slots" if self.way is None else self.way.path


_chosen: WeakKeyDictionary[nn.Module, dict[tuple[int, bool, bool], Choice]] = WeakKeyDictionary()


def choose_way(model: nn.Module, capacity_tokens: int, context_tokens: int | None, alone: bool = False) -> Choice:
    """The fastest right way for sequences up to `capacity_tokens`, for a model in evaluation mode without gradients.

    `alone`: one row only, so neither slots nor padding matter, and the proof is shorter.
    """
    ties = indexer_obstacle(model, capacity_tokens)
    if ties is not None:
        return Choice(UNCACHED, ties)
    tokens = _probe_tokens(model, capacity_tokens, context_tokens)
    obstacle = slots_obstacle(model, capacity_tokens)
    known = _chosen.setdefault(inner_model(model), {})
    key = (tokens, obstacle is None, alone)
    if key not in known:
        known[key] = _choose(_Probe(model, tokens), obstacle, alone)
    choice = known[key]
    if obstacle is None or alone or choice.reasons is None:
        return choice
    # The remembered obstacle may speak of another capacity.
    return Choice(choice.way, _JOINT.join([obstacle, *choice.reasons.split(_JOINT)[1:]]))


def _choose(probe: _Probe, obstacle: str | None, alone: bool) -> Choice:
    faults: dict[str, list[str]] = {}
    if not alone and obstacle is None:
        fault = probe.fault_of_slots()
        if fault is None:
            return Choice(None, None)
        faults[fault] = ["slots"]
    way = UNCACHED
    for candidate in CACHED_WAYS:
        if (alone and candidate is PADDED) or not probe.takes(candidate):
            continue
        fault = probe.fault_of(candidate, alone)
        if fault is None:
            way = candidate
            break
        faults.setdefault(fault, []).append(candidate.name)
    reasons = [] if obstacle is None else [obstacle]
    reasons += [f"{', '.join(names)}: {fault}" for fault, names in faults.items()]
    return Choice(way, _JOINT.join(reasons) or None)


def _probe_tokens(model: nn.Module, capacity_tokens: int, context_tokens: int | None) -> int:
    """How long the longest row of the proof is: longer than every length in the config that sequences outgrow."""
    outgrown = [number for number in _lengths(text_config(model).to_dict()) if 1 < number < capacity_tokens]
    longest = max(outgrown, default=0) + LONG_TOKENS + STEPS
    return longest if context_tokens is None else min(longest, context_tokens)


def _lengths(settings: dict[str, Any]) -> Iterator[int]:
    """The whole numbers of a config that may be compared with the length of a sequence."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _lengths(value)
        elif _NO_LENGTH.search(str(name)):
            continue
        else:
            for entry in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(entry, int) and not isinstance(entry, bool):
                    yield entry


class _Forced:
    """A chooser that remembers the logits and hands out the tokens that the reference knows."""

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        self.rows = rows
        self.logits: list[list[Tensor]] = [[] for _ in rows]

    def choose(self, logits: Tensor, prompts: Sequence[int]) -> list[int]:
        tokens = []
        for row_logits, prompt in zip(logits, prompts, strict=True):
            seen = self.logits[prompt]
            if len(seen) < STEPS:
                seen.append(row_logits.detach().float().cpu())
            tokens.append(self.rows[prompt][len(self.rows[prompt]) - STEPS + len(seen) - 1])
        return tokens

    def forget(self, prompt: int) -> None:
        pass


_Run = Callable[[list[list[int]], _Forced, GenerationStats], None]


class _Probe:
    """Rows of random tokens, and the logits that whole forwards give for the last `STEPS` of each."""

    def __init__(self, model: nn.Module, tokens: int) -> None:
        self.model = model
        self.parameters = forward_parameters(model)
        self.device = device_of(model)
        drawn = _plain_tokens(model, 4 * tokens)
        long, other, middle, short = (drawn[start * tokens : (start + 1) * tokens] for start in range(4))
        # Rows of unequal length that share their beginning; the middle one outgrows what the long one does.
        middle[:SHARED_TOKENS] = short[:SHARED_TOKENS] = long[:SHARED_TOKENS]
        self.unequal = [long, middle[: tokens - 4], short[: SHARED_TOKENS + SHORT_TOKENS]]
        self.equal = [long, other]
        self.low_precision = _low_precision(model)
        self.tolerance = TOLERANCE
        if self.low_precision is not None:
            layers = getattr(text_config(model), "num_hidden_layers", None) or 1
            self.tolerance = min(ROUNDING_FACTOR * torch.finfo(self.low_precision).eps * layers**0.5, MOST_ROUNDING)
        self._expected: dict[tuple[int, ...], Tensor] = {}

    def fault_of_slots(self) -> str | None:
        """What is wrong with slots; None: nothing."""

        def run(prompts: list[list[int]], forced: _Forced, stats: GenerationStats) -> None:
            SlotBatch(self.model, prompts, STEPS, frozenset(), 0, forced, stats).run(len(prompts), None)

        return self._fault(self.unequal, run)

    def takes(self, way: Way) -> bool:
        return way.cache != "ours" or "past_key_values" in self.parameters

    def fault_of(self, way: Way, alone: bool) -> str | None:
        """What is wrong with a way in lockstep; None: nothing."""
        rows = self.unequal if way is PADDED else self.equal
        return self._fault(rows[:1] if alone else rows, self._run(way))

    def _fault(self, rows: list[list[int]], run: _Run) -> str | None:
        try:
            error = self._error(rows, run)
        except Exception as raised:  # a model may stumble over anything; what it says is the reason
            line = next(iter(str(raised).strip().splitlines()), "")[:150]
            return line if isinstance(raised, FituneError) else f"{type(raised).__name__}: {line}"
        return None if error <= self.tolerance else "other logits than a whole forward"

    def _error(self, rows: list[list[int]], run: _Run) -> float:
        """How far the logits of a way of generating are from the whole forwards', in the worst row."""
        expected = [self._logits_after(row) for row in rows]
        forced = _Forced(rows)
        run([row[:-STEPS] for row in rows], forced, GenerationStats(len(rows)))
        pairs = zip(forced.logits, expected, strict=True)
        return max(self._difference(torch.stack(found), truth) for found, truth in pairs)

    def _run(self, way: Way) -> _Run:
        def run(prompts: list[list[int]], forced: _Forced, stats: GenerationStats) -> None:
            generate_lockstep(self.model, prompts, STEPS, frozenset(), 0, len(prompts), forced, stats, None, way)

        return run

    def _logits_after(self, row: list[int]) -> Tensor:
        """The logits [STEPS, V] after `row` without its last STEPS tokens, without its last STEPS - 1, ..."""
        key = tuple(row)
        if key not in self._expected:
            tokens = torch.tensor([row[:-1]], device=self.device)
            output = forward(self.model, self.parameters, tokens, last_tokens=STEPS, use_cache=False)
            self._expected[key] = output.logits[0, -STEPS:].float().cpu()
        return self._expected[key]

    def _difference(self, found: Tensor, expected: Tensor) -> float:
        """Of two tables of logits [STEPS, V]; infinite if one is not a number."""
        scale = (expected - expected.mean(dim=-1, keepdim=True)).norm(dim=-1).clamp_min(1e-30)
        errors = torch.nan_to_num((found - expected).norm(dim=-1) / scale, nan=float("inf"))
        # In low precision a router near a tie may send a token to other experts, but hardly at every step.
        return float(errors.max() if self.low_precision is None else errors[1:].min())


def _plain_tokens(model: nn.Module, count: int) -> list[int]:
    """Tokens at random, none of them special to the config."""
    config = inner_model(model).config
    text = text_config(model)
    special = {
        token
        for part in (config, text)
        for name, value in vars(part).items()
        if name.endswith("token_id")
        for token in (value if isinstance(value, (list, tuple)) else [value])
    }
    rows = int(text.vocab_size)
    # Special tokens lie at the ends of the vocabulary; some models treat them apart.
    plain = [token for token in range(rows // 4, max(rows // 2, rows // 4 + 1)) if token not in special] or [0]
    places = torch.randint(len(plain), (count,), generator=torch.Generator().manual_seed(0)).tolist()
    return [plain[place] for place in places]


def _low_precision(model: nn.Module) -> torch.dtype | None:
    """The coarsest floating type among the parameters, if it is less than float32."""
    found = {parameter.dtype for parameter in model.parameters()}
    return next((dtype for dtype in (torch.bfloat16, torch.float16) if dtype in found), None)
