"""Machines that are planned for without being here: what the user says of them, read."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Literal

from fitune.config.byte_size import ALLOWED, parse_bytes
from fitune.errors import InputError
from fitune.plan.machine_table import CARDS, Card

MOST_DEVICES = 1024
# The size on a card's box against what its driver shows: a card of 24 GB shows 22.5 to 24 GiB.
SOLD_SIZE_TOLERANCE = 0.1
_MAKERS = re.compile(r"nvidia|geforce|tesla|amd|instinct|quadro|radeon")


@dataclass(frozen=True)
class Machine:
    """What a run may use.

    Attributes:
        name: of the card, or what was said of it.
        memory_bytes: of each device.
        count: of devices that are alike.
        computes_bfloat16: whether products in bfloat16 are quicker than in float32.
        source: where the memory's size is from: an address, or "you".
    """

    name: str
    kind: Literal["cpu", "gpu"]
    memory_bytes: int
    count: int
    computes_bfloat16: bool
    source: str


def find_machine(on: str | None, memory: str | None, count: int) -> Machine:
    """The machine of `--on` (a card's name, or cpu:SIZE) or of `--memory` (a GPU of that size), `count` of them.

    Raises InputError for an unknown card (with the nearest names), a size that is none, a count below 1, and for both
    or neither.
    """
    if count < 1 or count > MOST_DEVICES:
        raise InputError(f"{count} devices; allowed is a whole number from 1 to {MOST_DEVICES}", where="--count")
    if on is not None and memory is not None:
        raise InputError(
            "given together with --on; keep one: --on names a card, whose memory is known, or cpu:SIZE; "
            "--memory is a GPU of that memory",
            where="--memory",
        )
    if memory is not None:
        return Machine(f"GPU of {memory.strip()}", "gpu", _size(memory, "--memory"), count, True, "you")
    if on is None:
        raise InputError("says how many devices, not which; add --on CARD or --memory SIZE", where="--count")
    kind, separator, size = on.strip().partition(":")
    if kind.strip().lower() == "cpu":
        if not separator:
            raise InputError(f"{on!r} has no size; write cpu:SIZE, SIZE being {ALLOWED}", where="--on")
        if count > 1:
            raise InputError("is for GPUs; a run on CPUs has one memory, which is all of cpu:SIZE", where="--count")
        return Machine(f"CPU with {size.strip()}", "cpu", _size(size, "--on"), 1, True, "you")
    card = _find_card(on)
    return Machine(card.name, "gpu", card.mebibytes << 20, count, card.computes_bfloat16, card.source)


def _size(text: str, where: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise InputError(str(error), where=where) from None


def _find_card(words: str) -> Card:
    """The card of this name; case, joints, makers' names and a leading rtx do not matter."""
    key = _key(words)
    if key in _BY_KEY:
        return _BY_KEY[key]
    sized = re.fullmatch(r"(.*?)[\s_-]*(\d+)\s*gi?b", words.strip().lower())
    if sized and (card := _BY_KEY.get(_key(sized[1]))):
        if abs(int(sized[2]) * 1024 / card.mebibytes - 1) > SOLD_SIZE_TOLERANCE:
            raise InputError(
                f"a {card.name} has {card.mebibytes:,} MiB, not {sized[2]} GB; another size: --memory {sized[2]}GB",
                where="--on",
            )
        return card
    sizes = [card.name for card in CARDS if key and _without_size(card) in (key, f"rtx{key}")]
    if sizes:
        raise InputError(f"{words!r} comes with several sizes of memory: {', '.join(sizes)}", where="--on")
    if ":" in words:
        raise InputError(f"{words!r} is no machine; a CPU is cpu:SIZE, a GPU by its size is --memory", where="--on")
    near = difflib.get_close_matches(key, list(_BY_KEY), n=6, cutoff=0.5)
    names = list(dict.fromkeys(_BY_KEY[name].name for name in near))[:3]
    known = f"did you mean {' or '.join(names)}? " if names else ""
    raise InputError(
        f"no card called {words!r} is known; {known}Known are {', '.join(card.name for card in CARDS)}; any other: "
        "--memory SIZE",
        where="--on",
    )


def _key(words: str) -> str:
    return _MAKERS.sub("", re.sub(r"[^a-z0-9]+", "", words.lower()))


def _without_size(card: Card) -> str:
    return _key(re.sub(r"-\d+gb$", "", card.name))


def _names() -> dict[str, Card]:
    """Every way a card is called; its own name counts before what another is called for short."""
    names = {_key(card.name): card for card in CARDS}
    for card in CARDS:
        bare = _key(card.name)
        for name in (bare, bare.removesuffix("gb") if "-" in card.name else bare):
            names.setdefault(name, card)
            names.setdefault(name.removeprefix("rtx"), card)
            names.setdefault(f"rtx{name.removeprefix('rtx')}", card)
    return names


_BY_KEY = _names()
