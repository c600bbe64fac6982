"""The scale of losses in float16: when it falls and grows, what it saves, and that it changes nothing else."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from fitune.data.collation import collate
from fitune.fuse.loss_scale import FIRST, LARGEST, STEPS_TO_GROW, LossScale
from fitune.fuse.model import FusedModel
from fitune.step.optimizer import make_optimizer
from fitune.step.update import NonFiniteError, StepResult, update
from fitune.train.checkpoint import Progress, load_checkpoint, save_checkpoint
from tiny_models import adapted, distance, model_of, random_samples

SAMPLES = random_samples([200] * 4)


class Recording(torch.optim.SGD):
    """Keeps the gradients it was given, and changes nothing (rate 0)."""

    def step(self, closure: object = None) -> None:
        self.seen = torch.cat([p.grad.flatten().clone() for group in self.param_groups for p in group["params"]])


def in_float16(scale: float = FIRST, dropout: float = 0.0) -> FusedModel:
    model, _ = adapted(model_of("llama", torch.float16), torch.float16, dropout=dropout)
    model.loss_scale.value = scale
    return model


def gradient(model: FusedModel, limit: float = 0.0) -> tuple[torch.Tensor, StepResult]:
    optimizer = Recording(model.trainable, lr=0.0)
    torch.manual_seed(3)
    result = update(model, [collate([[sample]], 512, 0) for sample in SAMPLES], optimizer, 0.0, limit)
    return optimizer.seen, result


def test_only_float16_has_one() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert adapted(model_of("llama", dtype), dtype)[0].loss_scale is None
    assert in_float16().loss_scale == LossScale()


def test_it_falls_to_one_and_grows_again() -> None:
    scale = LossScale(4.0)
    assert [scale.fall(), scale.fall(), scale.fall(), scale.value] == [True, True, False, 1.0]
    for _ in range(STEPS_TO_GROW):
        assert scale.value == 1.0
        scale.note_step()
    assert scale == LossScale(2.0, 0)
    full = LossScale(LARGEST, STEPS_TO_GROW)
    full.note_step()
    assert full.value == LARGEST


def test_gradients_are_float32s_with_it_and_lost_without() -> None:
    wide, expected = gradient(adapted(model_of("llama"))[0])
    found, result = gradient(in_float16())
    assert distance(found, wide) < 5e-3
    assert result.loss == pytest.approx(expected.loss, rel=1e-4)
    assert result.grad_norm == pytest.approx(expected.grad_norm, rel=1e-3)
    # As gradients of losses are that are means over some million tokens.
    lost, _ = gradient(in_float16(2.0**-12))
    assert distance(lost, wide) > 0.1


def test_clipping_is_of_the_gradients_without_their_scale() -> None:
    whole, result = gradient(in_float16())
    clipped, other = gradient(in_float16(), limit=result.grad_norm / 4)
    assert other.grad_norm == result.grad_norm
    torch.testing.assert_close(clipped, whole / 4, rtol=1e-5, atol=1e-9)


def test_what_overflows_is_computed_again_with_half_as_much_and_the_same_dropout() -> None:
    model = in_float16(2.0**40, dropout=0.3)
    found, result = gradient(model)
    settled = model.loss_scale
    assert settled.value < 2.0**40
    assert settled.steps == 1
    again, same = gradient(in_float16(settled.value, dropout=0.3))
    assert torch.equal(found, again)
    assert result == same
    assert not torch.equal(found, gradient(in_float16(settled.value, dropout=0.0))[0])


def test_a_loss_that_is_not_finite_is_no_matter_of_scale() -> None:
    model = in_float16()
    model.graph.model.layers[1].input_layernorm.weight.data[3] = torch.nan
    with pytest.raises(NonFiniteError):
        gradient(model)
    assert model.loss_scale == LossScale()


def test_it_is_in_the_checkpoint(tmp_path: Path) -> None:
    model = in_float16()
    optimizer = make_optimizer("adamw", model.trainable, (0.9, 0.999), 0.0, "reference")
    update(model, [collate([SAMPLES[:1]], 512, 0)], optimizer, 1e-3, 1.0)
    model.loss_scale = LossScale(1024.0, 17)
    path = save_checkpoint(tmp_path, model, optimizer, Progress(1), {}, 2)
    other = copy.deepcopy(in_float16())
    load_checkpoint(path, other, make_optimizer("adamw", other.trainable, (0.9, 0.999), 0.0, "reference"))
    assert other.loss_scale == LossScale(1024.0, 17)
