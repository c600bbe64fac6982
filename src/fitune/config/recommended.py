"""Settings that were published for fine-tuning a family of models, each with its source.

A small table, family x size x method. Every row says only what its source says, in the run file's own field names;
what it does not name stays at fitune's default. A recipe of other tools is a place to start from, not a proof.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Method = Literal["qlora", "lora", "full"]
METHODS: tuple[Method, ...] = ("qlora", "lora", "full")


@dataclass(frozen=True)
class Recommendation:
    """One published recipe.

    Attributes:
        method: what it trains.
        families: of `models.presets`; empty: any.
        settings: run file fields (`lora.rank`) and their values.
        source: where it is published.
        note: what it was published for, and what of it has no place here.
        above, up_to: the sizes it is for, in parameters.
    """

    method: Method
    families: tuple[str, ...]
    settings: Mapping[str, Any]
    source: str
    note: str
    above: float = 0
    up_to: float = float("inf")

    def fits(self, family: str | None, parameters: int) -> bool:
        """Whether it is for a model of this family (None: unknown) and size."""
        return (not self.families or family in self.families) and self.above < parameters <= self.up_to


def recommendations(family: str | None, parameters: int, method: str | None = None) -> tuple[Recommendation, ...]:
    """What was published for a family and a number of parameters, the most specific first, method by method."""
    found = [row for row in TABLE if row.fits(family, parameters) and method in (None, row.method)]
    return tuple(sorted(found, key=lambda row: (METHODS.index(row.method), not row.families)))


def _lora(rank: int, alpha: float, dropout: float | None, targets: str | tuple[str, ...]) -> dict[str, Any]:
    settings = {"lora.rank": rank, "lora.alpha": float(alpha), "lora.targets": targets}
    return settings if dropout is None else {**settings, "lora.dropout": dropout}


def _train(learning_rate: float, micro_batch: int, accumulation: int, **more: Any) -> dict[str, Any]:
    settings = {"learning_rate": learning_rate, "micro_batch": micro_batch, "accumulation": accumulation, **more}
    return {f"train.{name}": value for name, value in settings.items()}


_QKV = ("q_proj", "k_proj", "v_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_WITHOUT_K = ("q_proj", "v_proj", "o_proj", *_MLP)


def _at(repository: str, commit: str, path: str) -> str:
    """The version that was read: later ones may say something else."""
    return f"https://github.com/{repository}/blob/{commit}/{path}"


def _torchtune(commit: str, recipe: str) -> str:
    return _at("pytorch/torchtune", commit, f"recipes/configs/{recipe}.yaml")


def _handbook(commit: str, recipe: str) -> str:
    return _at("huggingface/alignment-handbook", commit, f"recipes/{recipe}")


def _qwen(commit: str, script: str) -> str:
    return _at("QwenLM/Qwen", commit, f"finetune/finetune_{script}.sh")


_QLORA = _at("artidoro/qlora", "0b46ca80a0bb57b255e59bd0e19b190e51751d82", "scripts")
# The script's full and LoRA runs are kept there as comments.
_DBGPT = _at("eosphoros-ai/DB-GPT-Hub", "0892ec47bcaf9dbc60e256242032bcca6e6fed64", "dbgpt_hub/scripts/train_sft.sh")
_GEMMA_GUIDE = _at(
    "google-gemini/gemma-cookbook", "1683855cd48b4af4af12c97df2cd39a8283dfed3",
    "docs/core/huggingface_text_finetune_qlora.ipynb",
)  # fmt: skip
_ALPACA = {"schedule": "cosine", "weight_decay": 0.01, "epochs": 1.0}
_QWEN_TRAIN = {"schedule": "cosine", "weight_decay": 0.1, "epochs": 5.0, "warmup_share": 0.01, "betas": (0.9, 0.95)}
_GUANACO = {"schedule": "constant", "warmup_share": 0.03, "max_grad_norm": 0.3, "betas": (0.9, 0.999)}
_BAICHUAN = {
    "schedule": "constant", "epochs": 4.0, "warmup_share": 0.0, "weight_decay": 1e-4, "betas": (0.9, 0.98),
    "max_grad_norm": 1.0,
}  # fmt: skip

TABLE: tuple[Recommendation, ...] = (
    # Any family: the QLoRA paper (arXiv 2305.14314, appendix B) and its scripts.
    Recommendation(
        "qlora", (), {**_lora(64, 16, 0.1, "all-linear"), **_train(2e-4, 4, 4, **_GUANACO)},
        f"{_QLORA}/finetune_guanaco_7b.sh", "LLaMA 7B and 13B on OASST1, 1,875 steps (arXiv 2305.14314)", up_to=20e9,
    ),
    Recommendation(
        "qlora", (), {**_lora(64, 16, 0.05, "all-linear"), **_train(1e-4, 4, 4, **_GUANACO)},
        f"{_QLORA}/finetune_guanaco_65b.sh", "LLaMA 33B and 65B on OASST1, 1,875 steps (arXiv 2305.14314)",
        above=20e9,
    ),
    # LLaMA 2, CodeLlama.
    Recommendation(
        "lora", ("llama-2",), {**_lora(8, 32, 0.05, ("q_proj", "v_proj")), **_train(1e-4, 4, 1, epochs=3.0)},
        _at("meta-llama/llama-recipes", "44e082073ea19c158f1be5049f0d87a047f1b6b0",
            "src/llama_recipes/configs/peft.py"),
        "Meta's llama-recipes (peft.py, training.py); it lowers the rate by 15 % an epoch", up_to=20e9,
    ),
    Recommendation(
        "lora", ("llama-2",), {**_lora(16, 32, 0.0, _WITHOUT_K), **_train(3e-4, 2, 1, **_ALPACA)},
        _torchtune("0377ca65a4b8bee9267ef4b92eed1e6d51590e80", "llama2/70B_lora"),
        "Llama 2 70B on Alpaca, on 8 GPUs", above=20e9,
    ),
    Recommendation(
        "full", ("llama-2",), _train(1e-5, 2, 1, schedule="cosine", epochs=3.0),
        _torchtune("033177875786d2530912185c5c7ceccaadd1d615", "llama2/7B_full_low_memory"),
        "Llama 2 7B on Alpaca", up_to=10e9,
    ),
    Recommendation(
        "qlora", ("codellama",),
        {**_lora(64, 32, None, ("q_proj", "v_proj")), **_train(2e-4, 1, 16, schedule="cosine")},
        _DBGPT, "DB-GPT-Hub, text-to-SQL; how long to train is not said", up_to=20e9,
    ),
    Recommendation(
        "lora", ("codellama",),
        {**_lora(64, 32, None, ("q_proj", "v_proj")), **_train(2e-4, 1, 16, schedule="cosine", epochs=8.0)},
        _DBGPT, "DB-GPT-Hub, text-to-SQL (Spider)", up_to=20e9,
    ),
    Recommendation(
        "full", ("codellama",), _train(2e-5, 4, 16, schedule="cosine", epochs=4.0),
        _DBGPT, "DB-GPT-Hub, text-to-SQL with CodeLlama 7B Instruct, on 4 GPUs", up_to=10e9,
    ),
    # Llama 3.
    Recommendation(
        "qlora", ("llama-3", "llama-3.1"), {**_lora(8, 16, 0.0, "all-linear"), **_train(3e-4, 2, 16, **_ALPACA)},
        _torchtune("051f4723be7b5d9fde7b3bace51d266842ba6ddb", "llama3/8B_qlora_single_device"),
        "Llama 3 8B Instruct on Alpaca", up_to=20e9,
    ),
    Recommendation(
        "lora", ("llama-3", "llama-3.1"), {**_lora(8, 16, 0.0, _WITHOUT_K), **_train(3e-4, 2, 8, **_ALPACA)},
        _torchtune("0ca812b499006ff57587f090206623846812f7b8", "llama3/8B_lora_single_device"),
        "Llama 3 8B Instruct on Alpaca", up_to=20e9,
    ),
    Recommendation(
        "lora", ("llama-3", "llama-3.1"), {**_lora(16, 32, 0.0, _QKV), **_train(3e-4, 2, 1, **_ALPACA)},
        _torchtune("0031bfb080bd35ec533c412df883cf2bf7bf7fe4", "llama3/70B_lora"),
        "Llama 3 70B Instruct on Alpaca, on 8 GPUs", above=20e9,
    ),
    Recommendation(
        "full", ("llama-3", "llama-3.1"), _train(1e-5, 2, 1, schedule="cosine", epochs=3.0),
        _torchtune("033177875786d2530912185c5c7ceccaadd1d615", "llama3/8B_full_single_device"),
        "Llama 3 8B Instruct on Alpaca", up_to=20e9,
    ),
    Recommendation(
        "lora", ("llama-3.2",), {**_lora(64, 128, 0.0, _WITHOUT_K), **_train(3e-4, 4, 8, **_ALPACA)},
        _torchtune("01bc4bef1dfb3ec714565abb1e6923233cd37ba2", "llama3_2/1B_lora_single_device"),
        "Llama 3.2 1B Instruct on Alpaca", up_to=2e9,
    ),
    # Mistral.
    Recommendation(
        "qlora", ("mistral",),
        {**_lora(16, 16, 0.05, (*_QKV, "o_proj", *_MLP)),
         **_train(2e-4, 4, 2, schedule="cosine", epochs=1.0, warmup_share=0.1)},
        _handbook("0213b5be27f9f60c2f64438244ff8e2fefcba9d0", "zephyr-7b-beta/sft/config_qlora.yaml"),
        "Zephyr: Mistral 7B v0.1 on UltraChat",
    ),
    Recommendation(
        "full", ("mistral",), _train(2e-5, 16, 1, schedule="cosine", epochs=1.0, warmup_share=0.1),
        _handbook("19f03455e1b7c0450db769f841ced8e650610c06", "zephyr-7b-beta/sft/config_full.yaml"),
        "Zephyr: Mistral 7B v0.1 on UltraChat; the micro-batch is that of large GPUs",
    ),
    # Gemma.
    Recommendation(
        "qlora", ("gemma-3", "gemma-2", "gemma"),
        {**_lora(16, 16, 0.05, "all-linear"),
         **_train(2e-4, 1, 4, schedule="constant", epochs=3.0, warmup_share=0.03, max_grad_norm=0.3)},
        _GEMMA_GUIDE,
        "Google's guide (ai.google.dev/gemma), text-to-SQL with Gemma 3 1B; it trains embeddings and head as well",
    ),
    Recommendation(
        "qlora", ("gemma-2",),
        {**_lora(64, 128, 0.0, _WITHOUT_K), **_train(2e-5, 4, 8, schedule="cosine", epochs=1.0)},
        _torchtune("0ca812b499006ff57587f090206623846812f7b8", "gemma2/9B_qlora_single_device"),
        "Gemma 2 9B on Alpaca",
    ),
    Recommendation(
        "qlora", ("gemma",),
        {**_lora(64, 16, None, (*_QKV, *_MLP)), **_train(2e-5, 4, 4, schedule="cosine", epochs=3.0)},
        _torchtune("0dc0c23bf06c903e49e931df48baa50fc141d5c0", "gemma/7B_qlora_single_device"), "Gemma 7B on Alpaca",
    ),
    Recommendation(
        "full", ("gemma",), _train(2e-5, 1, 1, schedule="constant", epochs=1.0),
        _torchtune("03a19788a5ddba7d3ddea2a40f7ec952d3f4d558", "gemma/7B_full"), "Gemma 7B on Alpaca, on 4 GPUs",
    ),
    # Phi: its projections are fused, so torchtune's list of them is all linear layers here.
    Recommendation(
        "qlora", ("phi-3",), {**_lora(8, 16, None, "all-linear"), **_train(3e-4, 2, 16, **_ALPACA)},
        _torchtune("0fd885e372eda47da397cb1171b8b2ba73c8fb6e", "phi3/mini_qlora_single_device"),
        "Phi-3 mini on Alpaca",
    ),
    Recommendation(
        "full", ("phi-3",), _train(5e-6, 2, 1, schedule="constant", epochs=1.0),
        _torchtune("01cbd6be52f1d0d2c6de70c2478ffef1d570b363", "phi3/mini_full_low_memory"),
        "Phi-3 mini on Alpaca", up_to=10e9,
    ),
    Recommendation(
        "qlora", ("phi-4",), {**_lora(8, 16, 0.0, "all-linear"), **_train(3e-4, 2, 8, **_ALPACA)},
        _torchtune("10ff7cd2e2415a9ebb462a10cf7ed149bf531054", "phi4/14B_qlora_single_device"),
        "Phi-4 on Alpaca; it leaves the key projection out, which is one layer with query and value here",
    ),
    # Qwen.
    Recommendation(
        "qlora", ("qwen1.5", "qwen2"), {**_lora(64, 16, 0.05, "all-linear"), **_train(3e-4, 2, 8, **_QWEN_TRAIN)},
        _qwen("05577dea695d1cd36a24daf51a9607adfbde0160", "qlora_single_gpu"),
        "Qwen's own script (and finetune.py), for the first Qwen 7B",
        up_to=20e9,
    ),
    Recommendation(
        "lora", ("qwen1.5", "qwen2"), {**_lora(64, 16, 0.05, "all-linear"), **_train(3e-4, 2, 8, **_QWEN_TRAIN)},
        _qwen("343017c4ce2e00a7f0ca8468a9d4173b9feae700", "lora_single_gpu"),
        "Qwen's own script (and finetune.py), for the first Qwen 7B",
        up_to=20e9,
    ),
    Recommendation(
        "full", ("qwen1.5", "qwen2"), _train(1e-5, 1, 16, **_QWEN_TRAIN),
        _qwen("0400505d060aea70437b55412aa02f8eae91ca5f", "ds"),
        "Qwen's own script, for the first Qwen 7B", up_to=20e9,
    ),
    Recommendation(
        "lora", ("qwen2.5",), {**_lora(32, 64, 0.0, _WITHOUT_K), **_train(2e-3, 2, 8, **_ALPACA)},
        _torchtune("10ff7cd2e2415a9ebb462a10cf7ed149bf531054", "qwen2_5/0.5B_lora_single_device"),
        "Qwen2.5 0.5B Instruct on Alpaca", up_to=1e9,
    ),
    Recommendation(
        "lora", ("qwen2.5",), {**_lora(8, 16, 0.0, _WITHOUT_K), **_train(3e-4, 2, 8, **_ALPACA)},
        _torchtune("0e08081eebce48e37d3dd56cb0b57dc67c6cdfc9", "qwen2_5/7B_lora_single_device"),
        "Qwen2.5 7B Instruct on Alpaca; its 14B has the same",
        above=5e9, up_to=20e9,
    ),
    Recommendation(
        "full", ("qwen2.5",), _train(5e-6, 2, 1, schedule="constant", epochs=1.0),
        _torchtune("03a19788a5ddba7d3ddea2a40f7ec952d3f4d558", "qwen2_5/7B_full_single_device"),
        "Qwen2.5 7B Instruct on Alpaca", above=5e9, up_to=10e9,
    ),
    Recommendation(
        "lora", ("qwen3",), {**_lora(8, 16, 0.0, _WITHOUT_K), **_train(3e-4, 2, 8, **_ALPACA)},
        _torchtune("53950c7f30b764ca287c2d6ac3b9842918cbfdcf", "qwen3/8B_lora_single_device"),
        "Qwen3 8B on Alpaca", above=5e9, up_to=10e9,
    ),
    # GLM, Baichuan: their packed query_key_value and W_pack are three projections here.
    Recommendation(
        "lora", ("chatglm3",), {**_lora(8, 32, 0.1, _QKV), **_train(5e-5, 4, 1, steps=3000)},
        _at("THUDM/ChatGLM3", "5cb05d0880b8d1776d270e30735f7a85fc560d8f", "finetune_demo/configs/lora.yaml"),
        "ChatGLM3's own demo",
    ),
    Recommendation(
        "full", ("chatglm3",), _train(5e-5, 4, 1, steps=3000),
        _at("THUDM/ChatGLM3", "b54a62df1bd90762d2bd0fe46f7bf532715d3c81", "finetune_demo/configs/sft.yaml"),
        "ChatGLM3's own demo",
    ),
    Recommendation(
        "lora", ("glm-4",), {**_lora(8, 32, 0.1, _QKV), **_train(5e-4, 1, 1, steps=3000)},
        _at("THUDM/GLM-4", "0b80c79b8c04ccbf78490211fb848e4a1b8c716e", "finetune_demo/configs/lora.yaml"),
        "GLM-4's own demo",
    ),
    Recommendation(
        "full", ("glm-4",), _train(5e-5, 1, 1, steps=3000),
        _at("THUDM/GLM-4", "0b80c79b8c04ccbf78490211fb848e4a1b8c716e", "finetune_demo/configs/sft.yaml"),
        "GLM-4's own demo",
    ),
    Recommendation(
        "lora", ("baichuan2",), {**_lora(1, 32, 0.1, _QKV), **_train(2e-5, 16, 1, **_BAICHUAN)},
        _at("pandong2011/Baichuan2", "e6f22eed7efcf156ddf5b1ba96f82474caf2178d", "fine-tune/fine-tune.py"),
        "Baichuan2's own script with --use_lora, read in a copy; rate and schedule are those of its README",
    ),
    Recommendation(
        "full", ("baichuan2",), _train(2e-5, 16, 1, **_BAICHUAN),
        _at("baichuan-inc/Baichuan2", "00268b4ba815adb548a8aaebcebe65a07e2a64bd", "README_EN.md"),
        "Baichuan2's own script",
    ),
    # SmolLM.
    Recommendation(
        "full", ("smollm2",), _train(1e-3, 4, 4, schedule="cosine", epochs=1.0, warmup_share=0.1),
        _handbook("0213b5be27f9f60c2f64438244ff8e2fefcba9d0", "smollm/sft/config.yaml"),
        "written for the first SmolLM 360M", up_to=1e9,
    ),
    Recommendation(
        "full", ("smollm2",), _train(3e-4, 4, 4, schedule="cosine", epochs=2.0, warmup_share=0.1),
        _handbook("0213b5be27f9f60c2f64438244ff8e2fefcba9d0", "smollm2/sft/config.yaml"),
        "SmolLM2 1.7B on SmolTalk", above=1e9,
    ),
    Recommendation(
        "full", ("smollm3",), _train(2e-5, 1, 2, schedule="cosine", epochs=5.0, warmup_share=0.03, max_grad_norm=0.2),
        _handbook("61d7a82ac7f29a8d3b626e8dea730ebf7dc0de2d", "smollm3/sft/sft.yaml"),
        "SmolLM3 3B, 128 rows a step on 8 machines; its cosine ends at a tenth of the rate",
    ),
)  # fmt: skip
