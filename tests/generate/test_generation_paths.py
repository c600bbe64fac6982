"""Every path of generation against whole forwards without a cache, over models of every kind."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from fitune.audit.tiny_configs import NOT_AUDITED, model_types, tiny_config
from fitune.errors import InputError
from fitune.generate import GenerationStats, batch_generation, generate, stream
from fitune.generate.forward_call import context_tokens, undisturbed
from fitune.generate.lockstep_generation import EQUAL_LENGTHS, PADDED, UNCACHED
from fitune.generate.path_proof import Choice, choose_way
from fitune.generate.slot_cache import SlotLayer

# One or two types for every path, and for every cause of it.
PATHS = {
    "qwen2": ("slots", None),
    "gpt_bigcode": ("slots", None),
    "gemma3n_text": ("padded", "its attention window of 12 tokens is shorter than"),
    "bamba": ("padded", "LinearAttentionLayer"),
    "falcon_h1": ("padded", "LinearAttentionAndFullAttentionLayer"),  # whose layers cannot give up rows
    "gpt_neo": ("padded", "slots: other logits than a whole forward"),  # local layers count columns
    "bart": ("equal lengths", "takes no position_ids; left padding: other logits"),
    "roberta": ("equal lengths", "slots, left padding, rows of one length: other logits"),  # positions from 2 on
    "llama4_text": ("equal lengths", "left padding: other logits"),  # chunks are counted from the first column
    "mamba": ("equal lengths", "takes no past_key_values"),
    "minimax": ("equal lengths", "cache of its own"),
    "rwkv": ("one by one", "a cache of its own: other logits"),  # its state mixes the rows of a batch
    "deepseek_v32": ("uncached", "16 best-scored tokens"),
    "doge": ("uncached", "other logits"),  # sparse with a cache otherwise than without, in transformers too
    "openai-gpt": ("uncached", "holds no state"),
}  # fmt: skip
NEW_TOKENS = 8
LENGTHS = (6, 10, 10, 17, 1, 24)


def audited_model(model_type: str) -> nn.Module:
    """The audit's tiny model of a type, no parameter constant and no branch dead."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_((0.1 if parameter.dim() < 2 else 0.5 * parameter.shape[-1] ** -0.5) * noise)
    return model.eval()


def make_prompts(model: nn.Module, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    """Prompts of these lengths after three tokens that all share."""
    rows = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(5)

    def draw(count: int) -> list[int]:
        return torch.randint(rows // 4, rows // 2, (count,), generator=generator).tolist()

    shared = draw(3)
    return [shared + draw(length) for length in lengths]


def whole_forwards(model: nn.Module, prompt: list[int], new_tokens: int = NEW_TOKENS) -> list[int]:
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(new_tokens):
            logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits
            tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def check(model: nn.Module) -> GenerationStats:
    """Holds `generate` and `stream` to whole forwards; which path it was."""
    prompts = make_prompts(model)
    expected = [whole_forwards(model, prompt) for prompt in prompts]
    seen: list[GenerationStats] = []
    found = generate(
        model, prompts, max_new_tokens=NEW_TOKENS, eos_ids=[], pad_id=0, batch_size=4, on_progress=seen.append
    )
    assert found == expected
    assert list(stream(model, prompts[3], max_new_tokens=NEW_TOKENS, eos_ids=[])) == expected[3]
    # Rows that end at different steps, in a batch smaller than the prompts.
    end = expected[0][2]
    cut = [tokens[: tokens.index(end)] if end in tokens else tokens for tokens in expected]
    assert generate(model, prompts, max_new_tokens=NEW_TOKENS, eos_ids=[end], pad_id=0, batch_size=3) == cut
    assert seen[-1].prompts_done == len(prompts)
    assert (seen[-1].path == "slots") == (seen[-1].why_not_slots is None)
    return seen[-1]


@pytest.mark.parametrize("model_type", PATHS)
def test_every_path_equals_whole_forwards(model_type: str) -> None:
    stats = check(audited_model(model_type))
    path, reason = PATHS[model_type]
    assert stats.path == path
    assert reason is None or reason in str(stats.why_not_slots)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", model_types())
def test_every_model_type_equals_whole_forwards(model_type: str) -> None:
    if model_type in NOT_AUDITED:  # types without a causal LM of text of their own; tests/audit proves each reason
        pytest.skip(NOT_AUDITED[model_type])
    check(audited_model(model_type))


def test_sequences_within_the_indexers_reach_need_no_whole_forwards() -> None:
    model = audited_model("deepseek_v32")
    prompts = make_prompts(model, (5, 2, 7))
    seen: list[GenerationStats] = []
    found = generate(model, prompts, max_new_tokens=4, eos_ids=[], pad_id=0, on_progress=seen.append)
    assert found == [whole_forwards(model, prompt, 4) for prompt in prompts]
    assert seen[-1].path == "padded"


@pytest.mark.parametrize(
    ("model_type", "choice"),
    [
        ("roberta", Choice(None, None)),
        ("roberta", Choice(EQUAL_LENGTHS, "")),
        ("blenderbot", Choice(PADDED, "")),
        ("gpt_neo", Choice(None, None)),
        ("moshi", Choice(EQUAL_LENGTHS, "")),
    ],
)
def test_the_paths_ruled_out_are_wrong(
    model_type: str, choice: Choice, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Mutation: without the proof other tokens come out."""
    model = audited_model(model_type)
    prompts = make_prompts(model)
    monkeypatch.setattr(batch_generation, "choose_way", lambda *_: choice)
    found = generate(model, prompts, max_new_tokens=NEW_TOKENS, eos_ids=[], pad_id=0)
    assert found != [whole_forwards(model, prompt) for prompt in prompts]


def test_a_fault_in_the_slots_is_found_and_gone_around(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: with every new key one head off, the proof must rule slots out."""
    model = audited_model("qwen2")
    update = SlotLayer.update
    monkeypatch.setattr(SlotLayer, "update", lambda self, k, v, *a, **n: update(self, k.roll(1, dims=1), v, *a, **n))
    stats = check(model)
    assert stats.path == "padded"
    assert stats.why_not_slots == "slots: other logits than a whole forward"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["qwen2", "mixtral", "roberta", "bart", "blenderbot-small", "git"])
def test_low_precision_proves_the_same(model_type: str, dtype: torch.dtype) -> None:
    model = audited_model(model_type).to(dtype)
    with undisturbed(model):
        choice = choose_way(model, 40, context_tokens(model))
    assert choice.path == {"qwen2": "slots", "mixtral": "slots"}.get(model_type, "equal lengths")


def test_a_proof_is_made_once_a_model() -> None:
    model = audited_model("qwen2")
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    with undisturbed(model):
        first = choose_way(model, 40, 256)
        assert len(calls) == 8  # three whole forwards, shared prefix, prompts, three steps
        assert choose_way(model, 50, 256) is first
    assert len(calls) == 8


@pytest.mark.parametrize("tokens", [8, 24, 60])
def test_a_rotary_embedding_that_changes_with_the_length(tokens: int) -> None:
    """LongRoPE: sequences below, across and above the switch, together and each alone."""
    half = 8
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.1 * place for place in range(half)],
        "long_factor": [4.0 + 2.0 * place for place in range(half)],
        "original_max_position_embeddings": 32,
        "factor": 8.0,
    }
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        "phi3", vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, original_max_position_embeddings=32, rope_parameters=rope,
        initializer_range=0.4, pad_token_id=0, bos_token_id=1, eos_token_id=2, sliding_window=None,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    prompts = make_prompts(model, (4, 7, 26, 40, 47, tokens))
    expected = [whole_forwards(model, prompt, 10) for prompt in prompts]
    seen: list[GenerationStats] = []
    found = generate(
        model, prompts, max_new_tokens=10, eos_ids=[], pad_id=0, batch_size=2, on_progress=seen.append
    )  # fmt: skip
    assert found == expected
    assert "rotary embedding changes" in str(seen[-1].why_not_slots)
    alone: list[GenerationStats] = []
    assert generate(
        model, prompts[-1:], max_new_tokens=10, eos_ids=[], pad_id=0, on_progress=alone.append
    ) == expected[-1:]  # fmt: skip
    assert alone[-1].path == {8: "slots", 24: "uncached", 60: "padded"}[tokens]
    assert list(stream(model, prompts[-1], max_new_tokens=10, eos_ids=[])) == expected[-1]
    with undisturbed(model):
        assert choose_way(model, 20, 256, alone=True).way is not UNCACHED


def test_sampling_does_not_depend_on_how_prompts_are_grouped() -> None:
    model = audited_model("bart")
    prompts = make_prompts(model)

    def sample(batch_size: int, seed: int = 3) -> list[list[int]]:
        return generate(
            model, prompts, max_new_tokens=6, eos_ids=[], pad_id=0, batch_size=batch_size, temperature=1.0, seed=seed
        )  # fmt: skip

    assert sample(1) == sample(4)
    assert sample(4) != sample(4, seed=4)


def test_the_context_of_a_composite_model_is_that_of_its_text() -> None:
    model = audited_model("llama4")
    assert context_tokens(model) == 256
    with pytest.raises(InputError, match="outgrows"):
        generate(model, [[5] * 250], max_new_tokens=10, eos_ids=[], pad_id=0)
