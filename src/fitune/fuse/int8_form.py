"""What a frozen layer needs to be multiplied in 8-bit integers, and where it is kept: beside the layer, not in it.

A form is a plain attribute of the frozen `nn.Linear` itself: adapters wrap that module and keep it, and what is
neither parameter nor buffer is in no state dict, is not saved, and does not learn. The weight stays where it is and
is reached through its lease.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from fitune.errors import FituneError

_ATTRIBUTE = "int8_form"


@dataclass(frozen=True)
class Int8Form:
    """A frozen weight's scales, and the columns of its input that are too large for integers.

    Attributes:
        scales: of each row of the weight [N], float32.
        outliers: columns of the input, increasing, int32; one tensor for all layers that share the input.
        columns: the weight's at the outliers [N, outliers], bfloat16.
        forward, backward: in which passes of training integers are used; the others are in floating point.
    """

    scales: Tensor
    outliers: Tensor
    columns: Tensor
    forward: bool = True
    backward: bool = True

    @property
    def size_bytes(self) -> int:
        """What it takes beside the weight, in bytes (the outliers' places left out)."""
        return 4 * self.scales.numel() + 2 * self.columns.numel()


class ColumnPeaks:
    """Collects the largest magnitude of each column of every input that layers share.

    Attributes:
        found: the layers that share an input, and its peaks [K] so far, in the order they were met.
    """

    def __init__(self) -> None:
        self.found: dict[tuple[nn.Linear, ...], Tensor] = {}

    def note(self, bases: tuple[nn.Linear, ...], x: Tensor) -> None:
        """x [M, K], the input of `bases`."""
        peaks = x.detach().abs().amax(0).float()
        before = self.found.get(bases)
        self.found[bases] = peaks if before is None else before.maximum(peaks)


def attach(base: nn.Linear, form: Int8Form | ColumnPeaks | None) -> None:
    """Gives a frozen layer its form, or what collects for one; None takes it away."""
    if form is None:
        vars(base).pop(_ATTRIBUTE, None)
    else:
        vars(base)[_ATTRIBUTE] = form


def forms_of(bases: Sequence[nn.Linear]) -> tuple[Int8Form, ...]:
    """The forms of layers that share an input, where all have one and are being trained with; else none.

    Outside of training mode everything is computed in floating point, as it is where the model is used.
    Raises FituneError where their outliers are not the same.
    """
    found = [vars(base).get(_ATTRIBUTE) for base in bases if base.training]
    forms = tuple(form for form in found if isinstance(form, Int8Form))
    if len(forms) != len(bases):
        return ()
    if any(form.outliers is not forms[0].outliers for form in forms):
        raise FituneError("layers that share an input were recoded for different outliers")
    return forms


def peaks_of(bases: Sequence[nn.Linear]) -> ColumnPeaks | None:
    """What collects for these layers now."""
    found = vars(bases[0]).get(_ATTRIBUTE)
    return found if isinstance(found, ColumnPeaks) else None
