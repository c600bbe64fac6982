"""Tiny sizes for every causal language model that transformers carries: data only, read by `tiny_configs`.

`SIZES` holds by the meaning of a setting's name, `OVERRIDES` by model type where a name is not enough.
"""

from __future__ import annotations

from typing import Any

HIDDEN = 64  # one NF4 block
VOCABULARY = 256
POSITIONS = 256
WINDOW_TOKENS = 12  # no power of two, so that a window that is off by one shows
CHUNK_TOKENS = 16

# value -> the settings that take it. A default below the value stays as it is; a default of None stays None.
_BY_SIZE: list[tuple[int, str]] = [
    # Width of the residual stream, and what must equal it.
    (HIDDEN, "hidden_size d_model n_embd emb_dim embed_dim text_hidden_size out_hidden_size backbone_hidden_size"),
    (HIDDEN, "projector_hidden_size hidden_size_global lru_width word_embed_proj_dim output_proj_dims"),
    (32, "embedding_size input_embedding_size"),
    (96, "output_embedding_size"),
    # Feed-forward widths, each kind its own, so that none passes for another.
    (192, "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim n_inner d_inner dff dim_ff ffn_hidden_size"),
    (192, "feed_forward_size"),
    (256, "intermediate_size_mlp dense_intermediate_size prefix_dense_intermediate_size"),
    (320, "shared_expert_intermediate_size shared_intermediate_size shared_experts_intermediate_size"),
    (320, "moe_shared_expert_intermediate_size"),
    (128, "moe_intermediate_size expert_ffn_hidden_size"),
    # Vocabulary and positions.
    (VOCABULARY, "vocab_size unpadded_vocab_size vocab_size_per_layer_input"),
    (POSITIONS, "max_position_embeddings n_positions n_ctx max_seq_len context_length model_max_length"),
    (POSITIONS, "max_source_positions max_target_positions"),
    # Mixtures of experts.
    (4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    (2, "num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k top_k_experts zero_expert_num"),
    (1, "first_k_dense_replace num_dense_layers"),
    (4, "n_group"),
    (2, "topk_group"),
    # Windows and chunks, all shorter than the 48 tokens of the audit.
    (WINDOW_TOKENS, "sliding_window sliding_window_size attention_window_size window_size local_attention"),
    (CHUNK_TOKENS, "attention_chunk_size chunk_size mamba_chunk_size"),
    # Low ranks: multi-head latent attention and others, each of its own size.
    (48, "q_lora_rank"),
    (32, "kv_lora_rank qk_nope_head_dim o_lora_rank"),
    (24, "v_head_dim"),
    (16, "qk_rope_head_dim hc_lowrank"),
    (16, "laurel_rank gated_norm_rank adapter_rank"),
    # Sparse attention's indexer: fewer keys than tokens.
    (2, "index_n_heads o_groups"),
    (64, "index_head_dim"),
    (CHUNK_TOKENS, "index_topk"),
    # State space and linear attention.
    (16, "mamba_d_state state_size ssm_state_size"),
    (4, "mamba_n_heads mamba_num_heads linear_num_value_heads linear_num_heads"),
    (32, "mamba_head_dim linear_value_head_dim"),
    (16, "linear_key_head_dim linear_head_dim"),
    (2, "n_groups linear_num_key_heads"),
    # Others.
    (16, "query_pre_attn_scalar hidden_size_per_layer_input router_hidden_size d_rel rotary_dim"),
    # Towers for images and sound, which a text never reaches.
    (2, "depth encoder_layers num_encoder_layers conf_num_hidden_layers num_blocks num_global_layers"),
    (32, "image_size crop_size"),
]
SIZES: dict[str, int] = {name: size for size, names in _BY_SIZE for name in names.split()}

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers")
HEADS = (
    *("num_attention_heads", "attention_heads", "n_head", "n_heads", "num_heads", "swa_num_attention_heads"),
    *("encoder_attention_heads", "decoder_attention_heads", "conf_num_attention_heads"),
    *("num_encoder_attention_heads", "num_decoder_attention_heads"),
)
# key/value heads -> the query heads that they divide
KEY_VALUE_HEADS = {
    "num_key_value_heads": "num_attention_heads",
    "num_kv_heads": "num_attention_heads",
    "swa_num_key_value_heads": "swa_num_attention_heads",
}
HEAD_DIMS = {"head_dim": "num_attention_heads", "swa_head_dim": "swa_num_attention_heads"}

# Said of a model type (or of one part of a composite one) where its names do not say enough.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},  # the default has no attention at all, every checkpoint has
    "big_bird": {"attention_type": "original_full"},  # a switch: block-sparse attention sees the future
    "blt": {"encoder_hash_byte_group_vocab": VOCABULARY, "local_attention_window_len": WINDOW_TOKENS},
    "blt_global_transformer": {"hidden_size": 128},  # the encoder's width times cross_attn_k, as in the default
    "blt_local_decoder": {"hidden_size_global": 128, "num_hidden_layers": 2},
    "blt_local_encoder": {"hidden_size_global": 128, "intermediate_size": 192, "num_hidden_layers": 1},
    "codegen": {"rotary_dim": 8},  # half a head
    "cohere_compass_text": {  # the default lacks the rotary settings by layer that its own code needs
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
            "full_attention": None,
        },
    },
    "cpmant": {
        "dim_head": 32,
        "position_bias_num_buckets": 32,
        "position_bias_max_distance": 128,
        "prompt_length": 8,
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},  # its code needs both, the default lacks them
    "deepseek_v2": {"num_experts_per_tok": 2},  # the default is None, which its code cannot run
    "deepseek_v4": {
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 16},
        "index_topk": 4,  # of 12 compressed blocks
    },
    "doge": {"keep_window_size": CHUNK_TOKENS},
    "dots1": {  # the default names no experts, which its code cannot run
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    "dots3_note_audio_encoder": {"adapter_input_size": HIDDEN, "adapter_out_dim": HIDDEN},
    "dots3_note_text": {
        "head_dim": 64,  # a quarter of it rotary
        "sliding_window": WINDOW_TOKENS,
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
        "swa_q_lora_rank": 32,
        "swa_kv_lora_rank": 64,
        "swa_head_dim": 48,
        "swa_qk_nope_head_dim": 32,
        "swa_v_head_dim": 16,
    },
    "dots3_note_vision_encoder": {
        "pyramid_num_routed": [-1, 4],
        "adapter_in_dim": HIDDEN,
        "adapter_out_dim": HIDDEN,
        "num_hidden_layers": 2,
    },
    "falcon_h1": {"mamba_d_ssm": 128},
    "falcon_mamba": {"time_step_rank": 16},
    "fuyu": {"patch_size": 8},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "gemma4_text": {"num_hidden_layers": 6, "global_head_dim": 64},
    "gemma4_unified_text": {"num_hidden_layers": 6, "global_head_dim": 64},
    "got_ocr2_vision": {"output_channels": 16, "mlp_dim": 192, "global_attn_indexes": [1]},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8},  # half a head
    "granitemoehybrid": {  # the default has no attention at all, every checkpoint has
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "hunyuan_v1_dense": {"head_dim": 16},  # the default is None, which its code cannot run
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},  # the default has one expert
    "inkling2_text": {"log_scaling_n_floor": CHUNK_TOKENS, "rel_extent": 32, "n_layers_per_attn_res_block": 2},
    "inkling_text": {  # the windows have twice the key/value heads
        "rel_extent": 32,
        "num_attention_heads": 8,
        "swa_num_attention_heads": 8,
        "num_key_value_heads": 2,
        "swa_num_key_value_heads": 4,
        "head_dim": 16,
        "swa_head_dim": 16,
    },
    "jamba": {"mamba_dt_rank": 16},
    "jetmoe": {"kv_channels": 32},
    "laguna": {  # the default is full attention only, though it carries the settings of sliding windows
        "num_hidden_layers": 3,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "lfm2": {"num_hidden_layers": 3, "full_attn_idxs": [1]},  # the default has no convolution, every checkpoint has
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "llama4_text": {"floor_scale": CHUNK_TOKENS},
    "longcat_flash": {"head_dim": 16},  # its rotary part
    "mamba": {"time_step_rank": 16},
    "mamba2": {"head_dim": 32},
    "mellum": {  # the default is full attention only, though it carries the settings of sliding windows
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "minimax": {"block_size": CHUNK_TOKENS},
    "minimax_m3_vl_text": {  # the default is full attention only, though it carries the indexer's settings
        "num_hidden_layers": 3,
        "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "index_block_size": 4,
        "index_topk_blocks": 4,
    },
    "ministral": {"head_dim": 32},  # the default is None, which its code cannot run
    "ministral3": {  # the default with short positions, so that the growth of its queries shows within the audit
        "max_position_embeddings": POSITIONS,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 16,
            "max_position_embeddings": POSITIONS,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale_all_dim": 1.0,
            "mscale": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
    "mllama_text_model": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
    "nemotron": {"num_key_value_heads": 2},  # the default is None, which its code cannot run
    "phi4_multimodal_audio": {
        "ext_pw_out_channel": HIDDEN,
        "depthwise_separable_out_channel": HIDDEN,
        "nemo_conv_channels": HIDDEN,
    },
    "qwen4_exp_text": {  # the default is None, which its code cannot run
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 32,
        "indexer_budget": CHUNK_TOKENS,
        "indexer_compress_ratio": 4,
        "ple_layer_ids": [2],
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": VOCABULARY,
        "make_ngram_vocab_size_divisible_by": 16,
        "split_ngram_parts": 2,
        "eos_token_id": 2,
    },
    "reformer": {
        "attention_head_size": 16,
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [6, 8],  # their product is the only length it trains at
        "axial_pos_embds_dim": [16, 48],
        "local_attn_chunk_length": CHUNK_TOKENS,
        "lsh_attn_chunk_length": CHUNK_TOKENS,
        "hash_seed": 0,  # the same buckets every time
    },
    "roc_bert": {
        "pronunciation_vocab_size": 64,
        "pronunciation_embed_dim": 64,
        "shape_vocab_size": 64,
        "shape_embed_dim": 32,
    },
    "smollm3": {"num_hidden_layers": 4},  # every fourth has no rotary embedding
    "xlm": {"causal": True},  # a switch
    "xlnet": {"attn_type": "uni"},  # a switch
    "xmod": {"default_language": "en_XX"},  # whose adapters a text goes through
    "zamba": {"num_hidden_layers": 8, "mamba_dt_rank": 16},  # the shared block twice
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
}
