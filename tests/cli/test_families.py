"""Every family that must work whole goes the whole road through the command line, from a folder as its makers publish
it: train, the adapter in PEFT, evaluate, chat, merge, the merged folder opened again."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import call, facts_of
from peft import PeftModel
from published_families import CONVERTED, FAMILIES, write_family
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from fitune.models.converted_folder import ConvertedFolder
from fitune.models.find import find_model
from fitune.models.graph import build_graph, quantised_names
from fitune.models.source import ModelSource
from fitune.plan.computation import Computation
from fitune.quant.nf4 import quantise
from fitune.train.prepare import build_for_answers
from fitune.train.trained_model import find_trained
from tiny_models import BACKEND, distance

TAUGHT = {
    "Colour of the sky?": "blue",
    "Colour of grass?": "green",
    "Colour of snow?": "white",
    "Colour of coal?": "black",
}
QUESTION = "Colour of snow?"
DEFAULT = ("llama-2", "gemma2", "chatglm3", "baichuan2")
STEPS = 48
RATES = {"qlora": 2e-2, "lora": 2e-2, "full": 2e-3}


def families() -> list[Any]:
    """(family, method) pairs; those outside `DEFAULT` slow."""
    pairs = [(family, "qlora") for family in (*FAMILIES, *CONVERTED)] + [("llama-3.2", "lora")]
    return [
        pytest.param(*pair, id="-".join(pair), marks=() if pair[0] in DEFAULT else pytest.mark.slow) for pair in pairs
    ]


def train(base: Path, method: str) -> tuple[Path, dict[str, Any]]:
    """A run on `TAUGHT` beside its base, and what `fitune train` said of it."""
    place = base.parent
    lines = [json.dumps({"instruction": question, "output": answer}) for question, answer in TAUGHT.items()]
    (place / "colours.jsonl").write_text("\n".join(lines) + "\n")
    (place / "run.yaml").write_text(
        f"model: {base}\nmethod: {method}\n"
        "data:\n  train: colours.jsonl\n  max_tokens: 512\n"
        + ("" if method == "full" else "lora:\n  rank: 8\n  alpha: 16\n")
        + f"train:\n  steps: {STEPS}\n  micro_batch: 1\n  learning_rate: {RATES[method]}\n  threads: 1\n"
    )
    return place / "run", facts_of("train", place / "run.yaml", f"output={place / 'run'}")


def answer(*model: object) -> str:
    """What a model answers to `QUESTION`, greedily; of thoughts only what comes after."""
    facts = facts_of("chat", *model, "--prompt", QUESTION, "--max-new-tokens", 24)
    return str(facts["answer"]).rpartition("</think>")[2].strip()


def transformers_model(source: ModelSource) -> nn.Module:
    """transformers' own model of the folder in float32, of a multimodal one the whole; where transformers does not
    read the layout, its class with the converted tensors."""
    if not isinstance(source, ConvertedFolder):
        return AutoModelForCausalLM.from_pretrained(source.reference, dtype=torch.float32)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(source.config), dtype=torch.float32)
    missing, unexpected = model.load_state_dict({n: source.read(n) for n in source.tensor_names()}, strict=False)
    assert unexpected == []
    assert set(missing) <= set(model.all_tied_weights_keys)
    model.tie_weights()
    return model


@torch.no_grad()
def round_to_nf4(model: nn.Module, source: ModelSource) -> None:
    """The weights that the store holds in 4 bits, as those 4 bits give them back."""
    for name in quantised_names(build_graph(source.config, torch.bfloat16)):
        weight = model.get_parameter(source.outer_module(name))
        weight.copy_(quantise(weight.to(source.config.dtype), BACKEND).dense(torch.float32, BACKEND))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """[T, V] over bytes, longer than every window."""
    tokens = torch.randint(32, 127, (1, 48), generator=torch.Generator().manual_seed(0))
    return model.eval()(input_ids=tokens, use_cache=False).logits[0].float()


def check_against_transformers(run: Path) -> None:
    """The run's model is transformers' with the adapter as PEFT loads it."""
    found = find_trained(str(run))
    computation = Computation(torch.float32, BACKEND, 1, "a test")
    ours = logits(build_for_answers(found.source, found.method, computation, found.adapter).graph)
    model = transformers_model(found.source)
    if found.method == "qlora":
        round_to_nf4(model, found.source)
    if found.adapter is not None:
        assert distance(ours, logits(model)) > 0.1
        model = PeftModel.from_pretrained(model, str(found.adapter))
    assert distance(ours, logits(model)) < 1e-3


def check_evaluation(run: Path) -> None:
    facts = facts_of("evaluate", run, "--task", "perplexity", "--data", run.parent / "colours.jsonl")
    assert facts["samples"] == len(TAUGHT)
    assert facts["tuned"]["loss"]["value"] < 0.2 * facts["base"]["loss"]["value"]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    return found


@pytest.mark.parametrize(("family", "method"), families())
def test_a_family_goes_the_whole_road(tmp_path: Path, family: str, method: str) -> None:
    base = write_family(family, tmp_path / "base")
    run, facts = train(base, method)
    assert facts["final_loss"] < 0.15 * facts["first_loss"]
    check_against_transformers(run)
    check_evaluation(run)
    assert answer(run) == TAUGHT[QUESTION]
    merged = facts_of("merge", run)
    assert merged["merged_tensors"] > 0
    assert answer(run / "merged") == answer(run, "--sixteen-bit")
    source, original = find_model(str(run / "merged")), find_model(str(base))
    assert source.config.model_type == original.config.model_type
    if family not in CONVERTED:  # under the published names; what the adapter does not touch to the bit
        before, after = tensors_of(base), tensors_of(run / "merged")
        assert after.keys() == before.keys()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert 0 < len(changed) <= merged["merged_tensors"]
        assert not changed & set(original.carried_names())
        assert all("proj" in name for name in changed)


@pytest.mark.slow
def test_a_full_run_is_a_model_of_its_own(tmp_path: Path) -> None:
    run, facts = train(write_family("llama-3.2", tmp_path / "base"), "full")
    assert facts["final_loss"] < 0.15 * facts["first_loss"]
    check_against_transformers(run)
    check_evaluation(run)
    assert answer(run) == TAUGHT[QUESTION] == answer(run / "model")
    code, _, err = call("merge", run)
    assert code == 2
    assert "was fully fine-tuned: its model folder is whole" in err


def test_a_model_without_a_template_says_so_to_a_chat_file(tmp_path: Path) -> None:
    base = write_family("llama-2", tmp_path / "base")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    (tmp_path / "run.yaml").write_text(f"model: {base}\ndata:\n  train: chat.jsonl\n  max_tokens: 512\n")
    code, _, err = call("train", tmp_path / "run.yaml")
    assert code == 2
    assert "the model has no chat template" in err
