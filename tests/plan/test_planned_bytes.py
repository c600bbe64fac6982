"""What the plan says of a model against the model itself: bytes of its weights, and of its step, really run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from fitune.audit.tiny_configs import tiny_config
from fitune.audit.tiny_settings import LAYERS
from fitune.config.schema import RunConfig
from fitune.data.collation import collate
from fitune.errors import InputError
from fitune.models.folder import FolderSource
from fitune.plan.anatomy import Anatomy, Layers, read_anatomy
from fitune.plan.computation import Computation
from fitune.plan.dry_run import Shape, StepMemory, step_memory
from fitune.plan.live_bytes import LiveBytes
from fitune.step.optimizer import make_optimizer
from fitune.train.prepare import build_for_training
from tiny_models import BACKEND, random_samples

ROWS, TOKENS, TRAINED = 2, 96, 70
SHAPE = Shape(ROWS, TOKENS, TOKENS // 2, TRAINED)
# Wide enough that what a layer keeps outweighs everything that is there once.
SIZES = {
    "hidden_size": 256, "n_embd": 256, "intermediate_size": 768, "moe_intermediate_size": 256, "vocab_size": 2048,
}  # fmt: skip
DERIVED = (
    "layer_types",
    "mlp_layer_types",
    "no_rope_layers",
    "moe_layers",
    "n_inner",
)  # from the number of layers and the width
FAST = ["llama", "gpt2", "gemma2", "mixtral", "deepseek_v3"]
SLOW = ["qwen3_next", "jamba", "gemma3_text", "gpt_oss", "phimoe", "jetmoe", "llama4_text"]
WAYS = [("qlora", "none"), ("lora", "layers"), ("full", "none")]
CASES = [
    *((name, *WAYS[number % 3]) for number, name in enumerate(FAST)),
    *(
        pytest.param(name, *way, marks=pytest.mark.slow)
        for name in (*FAST, *SLOW)
        for way in WAYS
        if (name, way[1]) != ("jetmoe", "layers")  # refused: the test below
    ),
]  # fmt: skip


def config_of(model_type: str, layers: int = 8) -> PretrainedConfig:
    """The audit's tiny configuration, scaled up."""
    tiny = tiny_config(model_type)
    known = {name: value for name, value in tiny.to_dict().items() if name not in DERIVED}
    wider = {name: value for name, value in SIZES.items() if known.get(name) is not None}
    deeper = dict.fromkeys((name for name in LAYERS if name in known), layers)
    unwanted = ("model_type", "transformers_version", "architectures", "dtype")
    return type(tiny)(**{name: value for name, value in {**known, **wider, **deeper}.items() if name not in unwanted})


def run_of(method: str, recompute: str = "none", compute: str = "auto", **lora: object) -> RunConfig:
    train = {"recompute": recompute, "compute": compute}
    return RunConfig.model_validate(
        {"model": "tiny", "method": method, "data": {"train": "a"}, "train": train, "lora": lora}
    )


def planned(run: RunConfig, config: PretrainedConfig, dtype: torch.dtype) -> tuple[Anatomy, StepMemory]:
    anatomy = read_anatomy(run, config, dtype)
    return anatomy, step_memory(run, config, anatomy, SHAPE, dtype, BACKEND)


def real(run: RunConfig, config: PretrainedConfig, dtype: torch.dtype, folder: Path) -> dict[str, int]:
    """Bytes of the model as `train` builds it, and of its second step, counted while it runs."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(torch.bfloat16).save_pretrained(folder)
    computation = Computation(dtype, BACKEND, 1, "a test", run.train.compute == "int8")
    batch = collate([random_samples([TOKENS])], TOKENS, 0)
    model = build_for_training(run, FolderSource(folder), computation, calibration=[batch])
    found = {"trained": sum(p.numel() * p.element_size() for p in model.trainable)}
    held = (*model.graph.parameters(), *model.graph.buffers())
    found["frozen"] = sum(value.numel() * value.element_size() for value in held) - found["trained"]
    forms = [form for module in model.graph.modules() if (form := vars(module).get("int8_form")) is not None]
    found["int8"] = sum(form.size_bytes for form in forms)
    tokens = torch.randint(700, 1400, (ROWS, TOKENS))
    positions = (torch.arange(TOKENS) % (TOKENS // 2)).expand(ROWS, -1)
    optimizer = make_optimizer(
        run.train.optimizer, model.trainable, run.train.betas, run.train.weight_decay, model.backend
    )

    def loss() -> Tensor:
        return -model.logprobs_at(tokens, positions, SHAPE.documents(), torch.arange(1, TRAINED + 1)).sum()

    with LiveBytes() as live:
        for _ in range(2):
            found["optimizer"] = live.current
            live.reset_peak()
            value = loss()
            found["saved"] = live.current - found["optimizer"]
            value.backward()
            del value
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        found["peak"] = live.peak
    return found


def check(run: RunConfig, config: PretrainedConfig, dtype: torch.dtype, folder: Path) -> None:
    """What is planned is what a run really holds."""
    anatomy, memory = planned(run, config, dtype)
    found = real(run, config, dtype, folder)
    assert (anatomy.frozen_bytes, anatomy.trained_bytes) == (found["frozen"], found["trained"])
    assert memory.optimizer == pytest.approx(found["optimizer"], rel=0.001)
    assert memory.saved == pytest.approx(found["saved"], rel=0.05)
    assert memory.peak == pytest.approx(found["peak"], rel=0.05)


@pytest.mark.parametrize(("model_type", "method", "recompute"), CASES)
def test_planned_bytes_are_the_real_ones(
    model_type: str, method: str, recompute: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path / "cache"))
    run, config = run_of(method, recompute), config_of(model_type)
    dtype = torch.float32 if method == "full" else torch.bfloat16
    check(run, config, dtype, tmp_path / "model")


def test_a_model_that_cannot_compute_its_layers_again_is_refused_by_the_plan() -> None:
    with pytest.raises(InputError, match="JetMoeForCausalLM cannot compute its layers again"):
        planned(run_of("lora", "layers"), config_of("jetmoe"), torch.bfloat16)


def test_planned_bytes_of_int8_are_the_real_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path / "cache"))
    run, config, dtype = run_of("qlora", compute="int8"), config_of("llama"), torch.bfloat16
    anatomy, memory = planned(run, config, dtype)
    found = real(run, config, dtype, tmp_path / "model")
    assert anatomy.int8_bytes == found["int8"] > 0
    assert memory.saved == pytest.approx(found["saved"], rel=0.05)
    assert memory.peak == pytest.approx(found["peak"], rel=0.05)


@pytest.mark.parametrize(
    ("model_type", "method", "recompute", "dropout"),
    [("llama", "qlora", "none", 0.0), ("llama", "lora", "layers", 0.1), ("deepseek_v3", "qlora", "none", 0.0)],
)
def test_planned_bytes_of_dora_are_the_real_ones(
    model_type: str, method: str, recompute: str, dropout: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path / "cache"))
    run, config = run_of(method, recompute, dora=True, dropout=dropout), config_of(model_type)
    anatomy, memory = planned(run, config, torch.bfloat16)
    found = real(run, config, torch.bfloat16, tmp_path / "model")
    assert (anatomy.frozen_bytes, anatomy.trained_bytes) == (found["frozen"], found["trained"])
    plain = read_anatomy(run_of(method), config, torch.bfloat16)
    assert anatomy.trained_bytes > plain.trained_bytes
    assert memory.optimizer == pytest.approx(found["optimizer"], rel=0.001)
    assert memory.saved == pytest.approx(found["saved"], rel=0.05)
    assert memory.peak == pytest.approx(found["peak"], rel=0.05)


def test_planned_bytes_of_float32_weights_computed_in_bfloat16_are_the_real_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer by layer: a copy of all weights in bfloat16 would add a tenth to the peak."""
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path / "cache"))
    run, config, dtype = run_of("full", "layers"), config_of("llama"), torch.bfloat16
    anatomy, memory = planned(run, config, dtype)
    found = real(run, config, dtype, tmp_path / "model")
    assert anatomy.trained_bytes == found["trained"]
    assert memory.saved == pytest.approx(found["saved"], rel=0.05)
    assert memory.peak == pytest.approx(found["peak"], rel=0.05)
    assert memory.saved < 0.25 * anatomy.trained_bytes


def test_layers_that_differ_do_not_stand_for_each_other() -> None:
    """A dense first layer and sliding windows: as many layers are kept as show every kind."""
    run = run_of("qlora")
    found = read_anatomy(run, config_of("deepseek_v3"), torch.bfloat16).layers
    assert found.twins == (0, 1, 1, 1, 1, 1, 1, 1)
    found = read_anatomy(run, config_of("gemma2"), torch.bfloat16).layers
    assert (found.twins, found.kept) == ((0, 1, 2, 1, 2, 1, 2, 1), 3)


def test_taking_one_kind_for_another_shows() -> None:
    """The mutation: seven layers of experts counted as if they were the dense first one."""
    run, config = run_of("lora"), config_of("deepseek_v3")
    anatomy = read_anatomy(run, config, torch.bfloat16)
    assert anatomy.layers.path is not None
    wrong = replace(anatomy, layers=Layers(anatomy.layers.path, (0,) * 8, 1))
    right_memory, wrong_memory = (
        step_memory(run, config, a, SHAPE, torch.bfloat16, BACKEND) for a in (anatomy, wrong)
    )
    assert abs(wrong_memory.saved / right_memory.saved - 1) > 0.05


def test_a_list_that_cannot_be_cut_is_run_whole() -> None:
    run, config = run_of("lora"), tiny_config("xlm")
    anatomy, memory = planned(run, config, torch.bfloat16)
    assert anatomy.layers.path is None
    assert memory.peak > memory.saved > 0


@pytest.mark.parametrize(
    ("model_type", "method", "names"),
    [
        ("llama", "qlora", ["embed_tokens", "lm_head"]),
        ("gemma", "lora", ["lm_head", "input_layernorm"]),  # tied: the table too
        ("llama", "lora", ["norm", "layers.6.mlp.up_proj"]),
    ],
)
def test_planned_bytes_of_modules_trained_whole_are_the_real_ones(
    model_type: str, method: str, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path / "cache"))
    run, config, dtype = run_of(method, modules_to_save=names), config_of(model_type), torch.bfloat16
    check(run, config, dtype, tmp_path / "model")
