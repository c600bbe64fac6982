"""Modules of the base that are trained whole beside an adapter and saved in it: PEFT's `modules_to_save`."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

import torch
from peft import PeftModel
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from fitune.errors import InputError
from fitune.quant.linear import QuantisedLinear
from fitune.quant.parameter import QuantisedParameter

FIELD = "lora.modules_to_save"
T = TypeVar("T")


class WholeModule(ModulesToSaveWrapper):
    """PEFT's wrapper with a trained copy in float32, which computes in the original's dtype.

    Every tensor that learns is the one in `made` (original parameter's id -> trained one), so that modules which
    share a weight share its copy too.
    """

    def __init__(self, module: nn.Module, adapter: str, made: dict[int, nn.Parameter], with_values: bool) -> None:
        self.__dict__["_made"] = (made, with_values)
        super().__init__(module, adapter)
        del self.__dict__["_made"]

    def update(self, adapter_name: str, tied_module: nn.Module | None = None, **kwargs: Any) -> None:
        """Adds the trained copy."""
        made, with_values = self.__dict__["_made"]
        self._adapters.add(adapter_name)
        memo = {
            id(parameter): _master(parameter, made, with_values) for parameter in self.original_module.parameters()
        }
        self.modules_to_save[adapter_name] = copy.deepcopy(self.original_module, memo)
        self.original_module.requires_grad_(False)

    def _forward_wrapped(self, *args: Any, **kwargs: Any) -> Any:
        module = self.modules_to_save[self.active_adapters[0]]
        dtypes = {name: parameter.dtype for name, parameter in self.original_module.named_parameters()}
        if type(module) is nn.Embedding and module.max_norm is None:  # rows are chosen first: few, of a large table
            return module(*args, **kwargs).to(dtypes["weight"])
        narrow = {
            name: parameter.to(dtypes[name])
            for name, parameter in module.named_parameters() if parameter.dtype != dtypes[name]
        }  # fmt: skip
        return functional_call(module, narrow, args, kwargs) if narrow else module(*args, **kwargs)


def _master(parameter: nn.Parameter, made: dict[int, nn.Parameter], with_values: bool) -> nn.Parameter:
    if id(parameter) not in made:
        if not parameter.is_floating_point():
            value = parameter.detach().clone()
        elif with_values:
            value = parameter.detach().to(torch.float32, copy=True)
        else:
            value = torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device)
        made[id(parameter)] = nn.Parameter(value, requires_grad=parameter.is_floating_point())
    return made[id(parameter)]


def whole_names(
    model: PreTrainedModel, asked: Sequence[str] | None, quantised: Collection[str] = (), where: str = FIELD
) -> list[str]:
    """Full names of the modules to train whole, in the model's order; of embeddings and a head that are tied both.

    Args:
        asked: names as in the model ("embed_tokens", or longer ends of a full name).
        quantised: names of the parameters that are in 4 bits, where the model does not show it yet.

    Raises:
        InputError: a name fits no module that has weights of its own, or one that cannot be trained whole.
    """
    if not asked:
        return []
    modules = dict(model.named_modules())
    able = [name for name, module in modules.items() if name and _has_weights_alone(module)]
    chosen: set[str] = set()
    problems: list[str] = []
    for one in asked:
        found = [name for name in able if name == one or name.endswith(f".{one}")]
        if found:
            chosen.update(found)
        else:
            problems.append(_unknown(one, modules, able))
    for name in sorted(chosen):
        if _is_quantised(modules[name], name, quantised):
            problems.append(
                f"{name} is in 4 bits, and cannot be trained whole: take method lora, or leave it to the adapter "
                "(lora.targets)"
            )
    if not problems:
        problems += _join_tied(model, modules, chosen)
    if problems:
        raise InputError(problems, where=where)
    return [name for name in modules if name in chosen]


def _has_weights_alone(module: nn.Module) -> bool:
    """Whether it has floating-point weights, or 4-bit ones, and no modules inside but those."""
    if any(not isinstance(child, QuantisedParameter) for child in module.children()) and not isinstance(
        module, QuantisedLinear
    ):
        return False
    own = list(module.parameters(recurse=False))
    return isinstance(module, QuantisedLinear) or any(p.is_floating_point() for p in own) or any(module.children())


def _is_quantised(module: nn.Module, name: str, quantised: Collection[str]) -> bool:
    parts = isinstance(module, QuantisedLinear) or any(isinstance(m, QuantisedParameter) for m in module.modules())
    return parts or any(f"{name}.{leaf}" in quantised for leaf, _ in module.named_parameters())


def _unknown(asked: str, modules: Mapping[str, nn.Module], able: Sequence[str]) -> str:
    if any(name == asked or name.endswith(f".{asked}") for name in modules):
        return f"{asked!r} has modules inside, or no weights; name modules that have weights of their own"
    known = sorted({name.rsplit(".", 1)[-1] for name in able})
    near = difflib.get_close_matches(asked, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{asked!r} matches no module with weights{hint} (there are: {', '.join(known)})"


def _join_tied(model: PreTrainedModel, modules: Mapping[str, nn.Module], chosen: set[str]) -> list[str]:
    """Adds what shares its weight with a chosen module, where PEFT ties it too; else says why it cannot be."""
    users: dict[int, set[str]] = {}
    for name, module in modules.items():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), set()).add(name)
    ends = end_names(model)
    for name in sorted(chosen):
        for parameter in modules[name].parameters(recurse=False):
            sharing = users[id(parameter)] - {name}
            if not sharing:
                continue
            if len(ends) != 2 or not sharing | {name} <= set(ends):
                return [f"{name} shares its weights with {', '.join(sorted(sharing))}; leave it to the adapter"]
            head = modules[ends[1]]
            if type(head) is not nn.Linear or head.bias is not None:
                return [
                    f"{ends[0]} and {ends[1]} share their weights, and the head does more than multiply with them: "
                    "PEFT cannot train them as one; leave both out"
                ]
            if not {one.rsplit(".", 1)[-1] for one in ends} & set(EMBEDDING_LAYER_NAMES):
                return [
                    f"{ends[0]} and {ends[1]} share their weights, and PEFT, which knows such modules by the names "
                    f"{' and '.join(EMBEDDING_LAYER_NAMES)}, would load them as two; leave both out"
                ]
            chosen.update(ends)
    return []


def end_names(model: PreTrainedModel) -> list[str]:
    """Names of the table of embeddings and of the output head, where there are such modules."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    named = {id(module): name for name, module in model.named_modules()}
    return [named[id(end)] for end in ends if id(end) in named]


def are_tied(model: PreTrainedModel) -> bool:
    """Whether embeddings and head are one weight."""
    ends = [getattr(end, "weight", None) for end in (model.get_input_embeddings(), model.get_output_embeddings())]
    return isinstance(ends[0], Tensor) and ends[0] is ends[1]


def without_whole(names: Mapping[str, T], whole: Collection[str], targets: str | Sequence[str]) -> dict[str, T]:
    """The layers to adapt but for those trained whole. Raises InputError where a run names one for both."""
    both = [name for name in names if name in whole]
    if both and (not isinstance(targets, str) or len(both) == len(names)):
        raise InputError(
            f"{len(both)} modules, such as {both[0]}, are named for the adapter (lora.targets) and to be trained "
            "whole; name them in one of the two",
            where=FIELD,
        )
    return {name: value for name, value in names.items() if name not in whole}


def check_not_quantised(model: PreTrainedModel, asked: Sequence[str], where: Any) -> None:
    """Raises InputError where an adapter's `modules_to_save` are of layers that are in 4 bits."""
    found = [
        name for name, module in model.named_modules()
        if isinstance(module, QuantisedLinear | QuantisedParameter) and any(name.endswith(one) for one in asked)
    ]  # fmt: skip
    if found:
        raise InputError(
            f"this adapter has {len(found)} modules whole, such as {found[0]}, that are in 4 bits here; load the "
            "base in 16 bits (method lora)",
            where=where,
        )


def train_whole(adapted: PeftModel, names: Sequence[str], adapter: str, with_values: bool = True) -> None:
    """Has the modules `names` of the base learn, in float32 copies beside the originals, as parts of the adapter.

    `with_values=False` is for dry runs: the copies' memory is not touched.
    """
    if not names:
        return
    graph = adapted.get_base_model()
    tied = are_tied(graph) and set(end_names(graph)) <= set(names)
    made: dict[int, nn.Parameter] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        owner = graph.get_submodule(parent)
        setattr(owner, leaf, WholeModule(getattr(owner, leaf), adapter, made, with_values))
    config = adapted.peft_config[adapter]
    config.modules_to_save, config.ensure_weight_tying = list(names), tied


def learn_on(adapted: PeftModel, adapter: str) -> None:
    """Makes the copies of a loaded adapter what `train_whole` makes; their values are to be set again."""
    made: dict[int, nn.Parameter] = {}
    graph = adapted.get_base_model()
    # All at once: what was copied must live on until all is, for it is known by its id.
    wrappers = [(name, one) for name, one in graph.named_modules() if isinstance(one, ModulesToSaveWrapper)]
    for name, module in wrappers:
        mine = WholeModule(module.original_module, adapter, {}, with_values=False)
        loaded = module.modules_to_save[adapter]
        for leaf, parameter in list(loaded.named_parameters()):
            inner, _, last = leaf.rpartition(".")
            mine.modules_to_save[adapter].get_submodule(inner)._parameters[last] = _master(parameter, made, True)
        parent, _, last = name.rpartition(".")
        setattr(graph.get_submodule(parent), last, mine)


def whole_parameters(adapted: PeftModel, adapter: str) -> dict[str, nn.Parameter]:
    """The parameters of trained copies, by their names in an adapter's file."""
    return {
        f"{name}.{leaf}": parameter
        for name, module in adapted.named_modules() if isinstance(module, ModulesToSaveWrapper)
        for leaf, parameter in module.modules_to_save[adapter].named_parameters()
    }  # fmt: skip
