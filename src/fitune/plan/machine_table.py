"""Graphics cards by name: the memory a program finds on each, with its source. Data only; `machines` reads it.

`mebibytes` is what the driver shows (nvidia-smi's total), which is less than the size on the box: some cards keep a
part for error correction or firmware. Where the source is a maker's page it gives the size on the box, and the MiB
are what nvidia-smi shows for that card.
"""

from __future__ import annotations

from dataclasses import dataclass

_MODAL = "https://github.com/modal-labs/modal-client/pull/2797"
_GEFORCE = "https://www.nvidia.com/en-us/geforce/graphics-cards/compare/"


@dataclass(frozen=True)
class Card:
    """One kind of card.

    Attributes:
        name: as users write it; a size at its end where there are several.
        mebibytes: memory that a program finds.
        computes_bfloat16: whether its tensor cores do (compute capability 8.0 and newer; AMD since MI200).
    """

    name: str
    mebibytes: int
    source: str
    computes_bfloat16: bool = True


CARDS: tuple[Card, ...] = (
    Card("rtx2080ti", 11264, "https://www.nvidia.com/en-us/geforce/20-series/", computes_bfloat16=False),
    Card("rtx3060", 12288, "https://github.com/geerlingguy/raspberry-pi-pcie-devices/issues/790"),
    Card("rtx3070", 8192, _GEFORCE),
    Card("rtx3080", 10240, _GEFORCE),
    Card("rtx3080-12gb", 12288, _GEFORCE),
    Card("rtx3090", 24576, "https://github.com/noonghunna/club-3090/issues/1128"),
    Card("rtx3090ti", 24564, _GEFORCE),
    Card("rtx4060", 8188, _GEFORCE),
    Card("rtx4060ti-8gb", 8188, _GEFORCE),
    Card("rtx4060ti-16gb", 16380, _GEFORCE),
    Card("rtx4070", 12282, _GEFORCE),
    Card("rtx4070ti", 12282, _GEFORCE),
    Card("rtx4070tisuper", 16376, _GEFORCE),
    Card("rtx4080", 16376, _GEFORCE),
    Card("rtx4090", 24564, "https://github.com/RLinf/RLinf/issues/255"),
    Card("rtx5060ti-16gb", 16311, _GEFORCE),
    Card("rtx5070", 12227, "https://github.com/shkhln/libc6-shim/issues/14"),
    Card("rtx5070ti", 16303, _GEFORCE),
    Card("rtx5080", 16303, _GEFORCE),
    Card("rtx5090", 32607, "https://github.com/noonghunna/club-3090/issues/1261"),
    Card("a6000", 49140, "https://www.nvidia.com/en-us/design-visualization/rtx-a6000/"),
    Card("rtx6000ada", 49140, "https://www.nvidia.com/en-us/design-visualization/rtx-6000/"),
    Card("rtxpro6000", 97887, "https://github.com/vllm-project/vllm/issues/27542"),
    Card("t4", 15360, _MODAL, computes_bfloat16=False),
    Card("v100-16gb", 16160, "https://github.com/4paradigm/k8s-vgpu-scheduler/issues/7", computes_bfloat16=False),
    Card("v100-32gb", 32510, "https://www.nvidia.com/en-us/data-center/v100/", computes_bfloat16=False),
    Card("a10", 23028, _MODAL),
    Card("a10g", 23028, "https://github.com/NVIDIA/DCGM/issues/232"),
    Card("a40", 46068, "https://www.nvidia.com/en-us/data-center/a40/"),
    Card("a100-40gb", 40960, _MODAL),
    Card("a100-80gb", 81920, _MODAL),
    Card("l4", 23034, _MODAL),
    Card("l40s", 46068, _MODAL),
    Card("h100", 81559, _MODAL),
    Card("h200", 143771, "https://www.nvidia.com/en-us/data-center/h200/"),
    Card("mi300x", 206_141_652_992 >> 20, "https://github.com/ROCm/legacy-rocm-build/issues/4750"),
)
