"""One new token of every row in a native call: against the passes that it stands for, and against float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fitune.fuse import decoder_layer
from fitune.generate import batch_generation, generate_detailed
from fitune.kernels import decode_native
from fitune.kernels.decode_native import DecodeLayer
from tiny_models import FAMILIES, VOCABULARY, adapted, model_of

pytestmark = pytest.mark.skipif(not decode_native.available(), reason="no dot products of bfloat16 here")
NEW = 6
# Windows longer than the sequences: shorter ones are not generated in slots.
SETTINGS: dict[str, dict[str, Any]] = {
    **{family: {} for family in FAMILIES},
    "mistral": {"sliding_window": 200},
    "gemma2": {"sliding_window": 200},
    "olmo2": {},
    "smollm3": {"no_rope_layers": [0, 1]},
}


class Forced:
    """Chooses the tokens it was told, whatever the logits; keeps the logits."""

    def __init__(self) -> None:
        self.seen: dict[tuple[int, int], Tensor] = {}
        self.count: dict[int, int] = {}

    def choose(self, logits: Tensor, prompts: list[int]) -> list[int]:
        chosen = []
        for row, prompt in enumerate(prompts):
            turn = self.count.get(prompt, 0)
            self.seen[prompt, turn] = logits[row].float().clone()
            self.count[prompt] = turn + 1
            chosen.append((7 * prompt + 13 * turn) % 250)
        return chosen

    def forget(self, prompt: int) -> None:
        pass


def prompts_of(count: int, shared: int = 70) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    beginning = torch.randint(250, (shared,), generator=generator).tolist()
    return [beginning + torch.randint(250, (3 + 2 * i,), generator=generator).tolist() for i in range(count)]


def logits_of(model: Any, monkeypatch: pytest.MonkeyPatch, batch_size: int = 4) -> dict[tuple[int, int], Tensor]:
    chooser = Forced()
    monkeypatch.setattr(batch_generation, "TokenChooser", lambda *_: chooser)
    found: list[Any] = []
    generate_detailed(
        model,
        prompts_of(5),
        max_new_tokens=NEW,
        eos_ids=[],
        pad_id=0,
        batch_size=batch_size,
        on_progress=found.append,
    )
    assert found[-1].path == "slots", found[-1].why_not_slots
    return chooser.seen


def error(found: dict[tuple[int, int], Tensor], exact: dict[tuple[int, int], Tensor]) -> float:
    assert found.keys() == exact.keys()
    one, two = (torch.stack([seen[key] for key in sorted(seen)]) for seen in (found, exact))
    assert one.shape == (5 * NEW, VOCABULARY)
    return float((one - two).norm() / two.norm())


@pytest.mark.parametrize("family", list(SETTINGS))
def test_as_near_to_float32_as_the_passes_in_parts(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[DecodeLayer | None] = []
    pack = decoder_layer.packed_step

    def watched(*arguments: Any) -> DecodeLayer | None:
        taken.append(pack(*arguments))
        return taken[-1]

    narrow = model_of(family, torch.bfloat16, **SETTINGS[family])
    wide = model_of(family, torch.float32, **SETTINGS[family])
    wide.load_state_dict({name: value.float() for name, value in narrow.state_dict().items()})
    exact = logits_of(adapted(wide)[0].graph, monkeypatch)
    model, _ = adapted(narrow, torch.bfloat16)
    assert model.report.replaced["layer"] == 2
    monkeypatch.setattr(decoder_layer, "packed_step", watched)
    stepped = logits_of(model.graph, monkeypatch)
    assert len([step for step in taken if step is not None]) >= 2
    monkeypatch.setattr(decoder_layer, "packed_step", lambda *_: None)
    in_parts = logits_of(model.graph, monkeypatch)
    assert error(stepped, exact) <= 1.3 * error(in_parts, exact) + 1e-4
    assert error(stepped, exact) < 0.05


@pytest.mark.parametrize("change", ["residual", "scale", "turned", "norm", "adapter"])
def test_a_wrong_step_is_noticed(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the proof that chooses the way of generation: it takes another way, or the step's error is plain."""
    model, _ = adapted(model_of("qwen3", torch.bfloat16), torch.bfloat16)
    monkeypatch.setattr(decoder_layer, "packed_step", lambda *_: None)
    in_parts = logits_of(model.graph, monkeypatch)
    pack = decode_native.DecodeLayer.__init__

    def wrong(self: Any, norms: Any, head_norms: Any, segments: Any, hidden: int, inner: int, form: Any, *rest: Any
              ) -> None:  # fmt: skip
        from dataclasses import replace

        if change == "residual":
            form = replace(form, residual=0.5)
        elif change == "scale":
            form = replace(form, scale=form.scale * 2)
        elif change == "turned":
            form = replace(form, half=0)
        elif change == "norm":
            norms = [norms[2], *norms[1:]]
        else:
            rest[2][0][1][1].mul_(3)  # B of the queries' adapter, which the descriptors point at
        pack(self, norms, head_norms, segments, hidden, inner, form, *rest)

    monkeypatch.undo()
    monkeypatch.setattr(decode_native.DecodeLayer, "__init__", wrong)
    try:
        stepped = logits_of(model.graph, monkeypatch)
    except AssertionError as other_way:
        assert "slots" in str(other_way)  # noqa: PT017 - the proof found it
        return
    assert error(stepped, in_parts) > 0.03


def test_a_batch_changes_nothing_but_the_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = adapted(model_of("llama", torch.bfloat16), torch.bfloat16)
    one, many = (logits_of(model.graph, monkeypatch, batch_size) for batch_size in (1, 5))
    assert error(one, many) < 0.01
