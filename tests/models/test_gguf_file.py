"""GGUF files against three independent readers: the gguf package, transformers' own loader, and llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fitune.errors import InputError
from fitune.models.bundled import open_bundled
from fitune.models.gguf_file import GGUFSource
from fitune.models.gguf_header import read_header
from fitune.models.gguf_tokenizer import build_tokenizer
from fitune.process_memory import resident_bytes

TEXTS = [
    "",
    " ",
    "   leading   and  trailing  \n\n\t tabs\t\t",
    "\n\n\n",
    "Hello world 12345 67.8 and 2024-11-21",
    "don't we'll I'M IT'S they'Re",
    "SELECT * FROM t WHERE a='x''y' AND b>=2023;\r\n",
    "foo_bar(baz)->qux::quux<T>\n    return x+1;",
    "中文字符测试,你好世界。",
    "日本語 と ελληνικά Привет عربي",
    "🦙🚀 emoji é ñ ü Ünïcödé e\u0301 ﬁ",
    "１２ ١٢٣ ½ ² ⅷ 三",
    "\u00a0nbsp\u2003em",
    "<|im_start|>user\nhi<|im_end|>\n<repo_name>x<|endoftext|>",
]
F32 = gguf.GGMLQuantizationType.F32
ARCHITECTURES = ["llama", "qwen2", "qwen3", "phi3"]


@pytest.fixture(scope="module")
def bundled() -> GGUFSource:
    try:
        return open_bundled()
    except InputError as error:
        pytest.skip(str(error))


def byte_tokens() -> list[str]:
    """The byte-level alphabet, one token a byte, and two control tokens: 258 in all."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spelled = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in spelled]
    spelled |= {byte: chr(256 + place) for place, byte in enumerate(others)}
    return [spelled[byte] for byte in range(256)] + ["<|end|>", "<|start|>"]


def write_tiny(path: Path, graph: str, seed: int = 0, **changed: Any) -> Path:
    """A random two-layer float32 model: C 64, H 4, K 2, D 16, F 96, V 258."""
    generator = np.random.default_rng(seed)
    width, heads, kv_heads, head_dim, feed_forward = 64, 4, 2, 16, 96
    tokens = byte_tokens()
    writer = gguf.GGUFWriter(str(path), changed.get("architecture", graph))
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_block_count(2)
    writer.add_feed_forward_length(feed_forward)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(50000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    if graph == "qwen3":
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if graph == "phi3":
        writer.add_sliding_window(0)
    if "linear_factor" in changed:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(changed["linear_factor"])
    if "experts" in changed:
        writer.add_expert_count(changed["experts"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(changed.get("pre", "smollm"))
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3, 3])
    writer.add_token_merges(["h e"])
    writer.add_eos_token_id(256)
    writer.add_bos_token_id(257)

    def add(name: str, *shape: int, scale: float = 0.3, about: float = 0.0) -> None:
        values = (about + scale * generator.standard_normal(shape)).astype(np.float32)
        type_ = changed.get("storage", F32) if len(shape) > 1 else F32
        if type_ in (F32, gguf.GGMLQuantizationType.F16):
            writer.add_tensor(name, gguf.quants.quantize(values, type_))
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, type_), raw_dtype=type_)

    add("token_embd.weight", len(tokens), width, scale=1.0)
    add("output_norm.weight", width, scale=0.1, about=1.0)
    if graph != "llama":
        add("output.weight", len(tokens), width)
    if "rotary_factors" in changed:
        writer.add_tensor("rope_freqs.weight", np.array(changed["rotary_factors"], np.float32))
    if "extra" in changed:
        add(changed["extra"], width)
    for layer in range(2):
        at = f"blk.{layer}"
        add(f"{at}.attn_norm.weight", width, scale=0.1, about=1.0)
        add(f"{at}.ffn_norm.weight", width, scale=0.1, about=1.0)
        add(f"{at}.attn_output.weight", width, width)
        add(f"{at}.ffn_down.weight", width, feed_forward)
        if graph == "phi3":
            add(f"{at}.attn_qkv.weight", (heads + 2 * kv_heads) * head_dim, width)
            add(f"{at}.ffn_up.weight", 2 * feed_forward, width)
            continue
        for part, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            add(f"{at}.attn_{part}.weight", count * head_dim, width)
            if graph == "qwen2":
                add(f"{at}.attn_{part}.bias", count * head_dim)
        if graph == "qwen3":
            add(f"{at}.attn_q_norm.weight", head_dim, scale=0.1, about=1.0)
            add(f"{at}.attn_k_norm.weight", head_dim, scale=0.1, about=1.0)
        add(f"{at}.ffn_gate.weight", feed_forward, width)
        add(f"{at}.ffn_up.weight", feed_forward, width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def model_of(source: GGUFSource, weights: dict[str, torch.Tensor] | None = None) -> torch.nn.Module:
    """The transformers model with the source's exact values, in float32."""
    weights = weights or {name: source.read_float32(name) for name in source.tensor_names()}
    model, report = MODEL_FOR_CAUSAL_LM_MAPPING[type(source.config)].from_pretrained(
        None, config=source.config, state_dict=weights, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval()


@torch.no_grad()
def logits_of(model: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([tokens])).logits[0].float()


def llama_cpp_logits(path: Path, tokens: list[int]) -> torch.Tensor:
    llama_cpp = pytest.importorskip("llama_cpp")
    model = llama_cpp.Llama(
        str(path), n_ctx=128, n_batch=128, logits_all=True, verbose=False, n_threads=1, type_k=0, type_v=0
    )
    model.eval(tokens)
    return torch.from_numpy(np.array(model.scores[: len(tokens)]))


def test_header_equals_the_gguf_packages_reader(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", "qwen2")
    header, reader = read_header(path), gguf.GGUFReader(str(path))
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            found = header.metadata[key]
            assert (found.tolist() if isinstance(found, np.ndarray) else found) == field.contents(), key
    assert len(header.tensors) == len(reader.tensors)
    for tensor in reader.tensors:
        entry = header.tensors[tensor.name]
        assert entry.shape == tuple(int(size) for size in tensor.shape[::-1])
        assert (entry.type, entry.start_byte, entry.size_bytes) == (
            tensor.tensor_type,
            tensor.data_offset,
            tensor.n_bytes,
        )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_equal_llama_cpps(tmp_path: Path, architecture: str) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", architecture)
    tokens = [3, 200, 17, 65, 65, 257, 99, 4, 31, 150, 8, 9]
    found = logits_of(model_of(GGUFSource(path)), tokens)
    expected = llama_cpp_logits(path, tokens)
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()


def test_permuted_query_and_key_rows_would_be_noticed(tmp_path: Path) -> None:
    """The mutation that the comparison above must catch: rotary pairs left as llama.cpp stores them."""
    path = write_tiny(tmp_path / "tiny.gguf", "llama")
    source = GGUFSource(path)
    weights = {name: source.read_float32(name) for name in source.tensor_names()}
    stored = gguf.GGUFReader(str(path))
    raw = next(t.data for t in stored.tensors if t.name == "blk.0.attn_q.weight")
    weights["model.layers.0.self_attn.q_proj.weight"] = torch.from_numpy(np.array(raw))
    tokens = [3, 200, 17, 65, 65, 257]
    expected = llama_cpp_logits(path, tokens)
    assert (logits_of(model_of(source, weights), tokens) - expected).abs().max() > 1e-2 * expected.abs().max()


def llama3_factors(theta: float, head_dim: int, factor: float) -> list[float]:
    """transformers' own Llama 3 frequencies, as the divisors that a GGUF file stores."""
    config = LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    return (plain / scaled).tolist()


@pytest.mark.parametrize("scaling", ["linear", "llama3"])
def test_scaled_rotary_equals_llama_cpps(tmp_path: Path, scaling: str) -> None:
    changed: dict[str, Any] = {"linear_factor": 4.0}
    if scaling == "llama3":
        changed = {"rotary_factors": llama3_factors(50000.0, 16, 32.0)}
    path = write_tiny(tmp_path / "tiny.gguf", "llama", **changed)
    source = GGUFSource(path)
    assert source.config.rope_parameters["rope_type"] == scaling
    tokens = torch.randint(0, 256, (100,), generator=torch.Generator().manual_seed(0)).tolist()
    expected = llama_cpp_logits(path, tokens)
    assert (logits_of(model_of(source), tokens) - expected).abs().max() < 1e-3 * expected.abs().max()
    plain = GGUFSource(write_tiny(tmp_path / "plain.gguf", "llama"))
    assert (logits_of(model_of(plain), tokens) - expected).abs().max() > 1e-2 * expected.abs().max()


def test_rotary_factors_that_are_not_llama3s_are_refused(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", "llama", rotary_factors=[1, 1, 1, 1, 2, 4, 8, 16])
    with pytest.raises(InputError, match="not Llama 3's"):
        GGUFSource(path)


@pytest.mark.parametrize("storage", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
def test_stored_types_equal_transformers_own_loading(tmp_path: Path, storage: str) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", "llama", storage=gguf.GGMLQuantizationType[storage])
    source = GGUFSource(path)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).state_dict()
    expected = {"F32": torch.float32, "F16": torch.float16}.get(storage, torch.bfloat16)
    assert source.config.dtype == expected
    assert (source.note is None) == (storage in ("F32", "F16", "BF16"))
    for name in source.tensor_names():
        assert torch.equal(source.read_float32(name), theirs[name]), name
        assert source.read(name).dtype == source.dtype(name) == (expected if theirs[name].ndim > 1 else torch.float32)
        assert torch.equal(source.read(name), theirs[name].to(source.dtype(name)))


@pytest.mark.slow
def test_bundled_weights_and_logits_equal_transformers_own_loading(bundled: GGUFSource) -> None:
    theirs = LlamaForCausalLM.from_pretrained(
        bundled.path.parent, gguf_file=bundled.path.name, dtype=torch.float32
    ).eval()
    weights = theirs.state_dict()
    for name in [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.29.self_attn.k_proj.weight",
        "model.layers.7.self_attn.v_proj.weight",
        "model.layers.13.mlp.down_proj.weight",
        "model.layers.29.input_layernorm.weight",
    ]:
        assert torch.equal(bundled.read_float32(name), weights[name]), name
        assert torch.equal(bundled.read(name), weights[name].to(bundled.dtype(name))), name
        assert bundled.shape(name) == tuple(weights[name].shape)
    assert set(bundled.tensor_names()) == set(weights) - {"lm_head.weight"}
    tokens = bundled.tokenizer()("The capital of France is")["input_ids"]
    assert torch.equal(logits_of(model_of(bundled), tokens), logits_of(theirs, tokens))


def test_bundled_configuration(bundled: GGUFSource) -> None:
    config = bundled.config
    assert (config.model_type, config.architectures, config.dtype) == (
        "llama",
        ["LlamaForCausalLM"],
        torch.bfloat16,
    )
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (576, 30, 49152)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (9, 3, 64)
    assert config.rms_norm_eps == 1e-5
    assert config.rope_parameters == {"rope_theta": 100000.0, "rope_type": "default"}
    assert config.tie_word_embeddings
    assert bundled.dtype("model.norm.weight") == torch.float32
    assert bundled.dtype("model.layers.0.mlp.up_proj.weight") == torch.bfloat16
    assert bundled.kind == "bundled"
    assert "de-quantised Q4_1" in str(bundled.note)
    assert bundled.generation_eos_ids() == [2]


def test_bundled_tokenizer_equals_llama_cpps(bundled: GGUFSource) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    reference = llama_cpp.Llama(str(bundled.path), vocab_only=True, verbose=False)
    tokenizer = bundled.tokenizer()
    for text in TEXTS:
        expected = reference.tokenize(text.encode(), add_bos=False, special=True)
        assert tokenizer(text)["input_ids"] == expected, text
        assert tokenizer.decode(expected) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.model_max_length == 8192


def test_digits_are_split_one_by_one_as_smollm_was_trained(bundled: GGUFSource) -> None:
    tokenizer = bundled.tokenizer()
    # Non-ASCII digits show it: without the split a blank would be merged with the digit's first byte.
    assert tokenizer.tokenize(" ١٢") == ["Ġ", "Ù", "¡", "Ù", "¢"]
    assert tokenizer.tokenize(" 42") == ["Ġ", "4", "2"]


def test_chat_template_renders(bundled: GGUFSource) -> None:
    text = bundled.tokenizer().apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_tokenizer_survives_saving(bundled: GGUFSource, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    bundled.write_companions(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    for text in TEXTS:
        assert again(text)["input_ids"] == bundled.tokenizer()(text)["input_ids"], text
    assert again.chat_template == bundled.tokenizer().chat_template


@pytest.mark.parametrize("name", ["qwen2", "phi-3"])
def test_real_vocabularies_against_their_published_pairs(shared_data: Path, name: str) -> None:
    path = shared_data / "vocab_gguf" / f"ggml-vocab-{name}.gguf"
    tokenizer = build_tokenizer(read_header(path))
    texts = path.with_name(path.name + ".inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = path.with_name(path.name + ".out").read_text().split("\n")[: len(texts)]
    assert len(texts) == 47
    for text, line in zip(texts, lines, strict=True):
        found = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert found == [int(token) for token in line.split()], text


def test_sentencepiece_vocabulary_equals_llama_cpps(shared_data: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    for name in ("baichuan", "phi-3"):
        path = shared_data / "vocab_gguf" / f"ggml-vocab-{name}.gguf"
        tokenizer = build_tokenizer(read_header(path))
        reference = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
        for text in [*TEXTS, "<|user|>\nhi there<|end|>\n<|assistant|>\n", "a<s> b</s>\n c"]:
            expected = reference.tokenize(text.encode(), add_bos=True, special=True)
            assert tokenizer(text)["input_ids"] == expected, (name, text)


@pytest.mark.parametrize("share", [0.0001, 0.3, 0.9, 0.99999])
def test_a_file_cut_short_is_named(tmp_path: Path, share: float) -> None:
    whole = write_tiny(tmp_path / "tiny.gguf", "llama").read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[: max(5, int(len(whole) * share))])
    with pytest.raises(InputError, match="cut short") as caught:
        GGUFSource(cut)
    assert str(cut) in str(caught.value)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"PK\x03\x04 a zip file", "not a GGUF file"),
        (b"GGUF" + (99).to_bytes(4, "little") + bytes(32), "version 99"),
        (b"GGUF" + (3).to_bytes(4, "big") + bytes(32), "big-endian"),
        (b"GGUF" + (3).to_bytes(4, "little") + b"\xff" * 40, "damaged"),
    ],
)
def test_what_is_not_gguf_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "odd.gguf"
    path.write_bytes(content)
    with pytest.raises(InputError, match=words):
        GGUFSource(path)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"architecture": "mamba"}, "architecture 'mamba'.*llama, phi3, qwen2, qwen3"),
        ({"experts": 8}, "mixture of 8 experts"),
        ({"extra": "blk.0.attn_sinks.weight"}, "no place in architecture llama: blk.0.attn_sinks.weight"),
    ],
)
def test_a_model_that_is_not_covered_is_refused_by_name(tmp_path: Path, changed: dict[str, Any], words: str) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", "llama", **changed)
    with pytest.raises(InputError, match=words):
        GGUFSource(path)


def test_an_unknown_way_of_splitting_text_is_refused(tmp_path: Path) -> None:
    source = GGUFSource(write_tiny(tmp_path / "tiny.gguf", "llama", pre="of-my-own"))
    with pytest.raises(InputError, match=r"'of-my-own'.*smollm"):
        source.tokenizer()


def test_fingerprint_follows_the_file(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", "llama")
    first = GGUFSource(path).fingerprint()
    assert GGUFSource(path).fingerprint() == first
    write_tiny(path, "llama", seed=1)
    assert GGUFSource(path).fingerprint() != first


def test_pages_that_were_read_are_given_back() -> None:
    source = open_bundled()
    names = [name for name in source.tensor_names() if "mlp" in name][:30]
    before = {name: source.read(name).clone() for name in names}
    size = sum(source.header.tensors[entry].size_bytes for entry in source.header.tensors if "ffn" in entry)
    full = resident_bytes()
    source.release()
    assert full - resident_bytes() > 0.2 * size
    assert all(torch.equal(source.read(name), value) for name, value in before.items())
