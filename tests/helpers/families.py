"""Tiny random models of every causal LM family in transformers."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

DEPTH = 4
VOCAB_SIZE = 64
FIRST_TOKEN = 32
"""Smaller ids may be special tokens (padding, BOS, images, ...)."""
WEIGHT_NOISE = 0.15

SMALL: dict[str, int] = {}
"""Maximum values of settings: models are small, and windows shorter than the inputs of tests."""
for _value, _keys in (
    (
        VOCAB_SIZE,
        "vocab_size decoder_vocab_size vocab_size_per_layer_input pronunciation_vocab_size "
        "shape_vocab_size unpadded_vocab_size encoder_hash_byte_group_vocab ngram_vocab_size_base",
    ),
    (
        128,
        "max_position_embeddings n_positions n_ctx max_seq_len model_max_length max_source_positions "
        "max_target_positions context_length original_max_position_embeddings bias_max_distance "
        "rel_extent",
    ),
    (
        32,
        "hidden_size d_model n_embd embedding_size input_embedding_size output_embedding_size emb_dim "
        "adapter_in_dim adapter_out_dim adapter_input_size hidden_size_global pronunciation_embed_dim "
        "shape_embed_dim input_size output_channels ext_pw_out_channel depthwise_separable_out_channel "
        "nemo_conv_channels image_size router_hidden_size",
    ),
    (
        64,
        "intermediate_size ffn_dim decoder_ffn_dim ffn_hidden_size mlp_dim dense_intermediate_size "
        "intermediate_size_mlp d_inner feed_forward_size dff dim_ff mamba_d_ssm",
    ),
    (
        DEPTH,
        "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers encoder_layers "
        "num_blocks",
    ),
    (
        4,
        "num_attention_heads n_head n_heads decoder_attention_heads encoder_attention_heads "
        "attention_heads num_decoder_attention_heads num_heads linear_num_value_heads "
        "swa_num_attention_heads linear_num_heads rotary_dim mamba_dt_rank time_step_rank index_topk "
        "chunk_size mamba_chunk_size block_size prompt_length",
    ),
    (
        2,
        "num_key_value_heads num_kv_heads linear_num_key_heads num_experts_per_tok num_experts_per_token "
        "moe_topk moe_k moe_top_k swa_num_key_value_heads n_groups n_group num_expert_group "
        "num_kv_shared_layers o_groups zero_expert_num",
    ),
    (1, "topk_group first_k_dense_replace num_dense_layers"),
    (
        8,
        "index_n_heads head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim linear_key_head_dim "
        "linear_value_head_dim linear_head_dim attention_head_size kv_channels dim_head swa_head_dim "
        "index_head_dim mamba_n_heads mamba_num_heads mamba_head_dim mamba_d_state state_size "
        "ssm_state_size d_rel hidden_size_per_layer_input laurel_rank gated_norm_rank adapter_rank "
        "hc_lowrank",
    ),
    (
        16,
        "q_lora_rank kv_lora_rank o_lora_rank moe_intermediate_size shared_expert_intermediate_size "
        "shared_intermediate_size expert_ffn_hidden_size shared_experts_intermediate_size patch_size "
        "moe_shared_expert_intermediate_size num_mel_bins",
    ),
    (
        6,
        "sliding_window sliding_window_size attention_window_size window_size keep_window_size "
        "attention_chunk_size num_experts local_attention_window_len n_routed_experts num_local_experts "
        "moe_num_experts",
    ),
):
    SMALL |= dict.fromkeys(_keys.split(), _value)


def families() -> list[str]:
    """Return all model types that transformers can build as a causal LM."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny(family: str, seed: int = 0) -> nn.Module:
    """Return a tiny random model of one family, in float32, eager attention and eval mode."""
    config = tiny_config(family)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if hasattr(config, "decoder"):  # MusicGen: the auto class does not handle its config
            model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
            model = model_class._from_config(config.decoder, attn_implementation="eager")
        else:
            model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        scatter(model)
    model.generation_config.update(
        bos_token_id=1, pad_token_id=3, eos_token_id=None, forced_eos_token_id=None
    )
    return model.eval()


@torch.no_grad()
def scatter(model: nn.Module) -> None:
    """Add noise to every weight, because initial zeros and ones would hide errors."""
    for weight in model.parameters():
        if weight.is_floating_point():
            weight += WEIGHT_NOISE * torch.randn_like(weight)
    for name, table in model.named_buffers():
        if name.endswith("tid2eid"):  # DeepSeek-V4 loads this table of experts by token from its checkpoint
            table.random_(SMALL["n_routed_experts"])


def tiny_config(family: str) -> transformers.PreTrainedConfig:
    """Return the default config of a family, made small."""
    return shrink(transformers.CONFIG_MAPPING[family](), OVERRIDES.get(family, {}))


def shrink(config: transformers.PreTrainedConfig, overrides: dict[str, Any]) -> Any:
    """Return a smaller config of the same class; nested configs are shrunk, too, with nested overrides."""
    kept = typical_layers(config)
    settings: dict[str, Any] = {}
    for key, value in vars(config).items():
        if key in overrides and not isinstance(value, transformers.PreTrainedConfig):
            continue
        if isinstance(value, transformers.PreTrainedConfig):
            smaller = shrink(value, overrides.get(key, {}))
        elif key == "is_decoder":
            smaller = True
        elif is_per_layer(value, config):
            smaller = type(value)(at_most(key, value[layer]) for layer in kept)
        else:
            smaller = at_most(key, value)
        if smaller is not value:
            settings[key] = smaller
    if "kv_lora_rank" in settings:  # latent attention has a key for each query head
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    return type(config)(**{**overrides, **settings})


def at_most(key: str, value: Any) -> Any:
    """Limit a value by ``SMALL``, and token ids by ``FIRST_TOKEN``."""
    if key.endswith(("token_id", "token_index")):
        if isinstance(value, list):
            return [at_most(key, token) for token in value]
        return value if value is None else value % FIRST_TOKEN
    return min(value, SMALL[key]) if key in SMALL and isinstance(value, int) else value


def is_per_layer(value: Any, config: transformers.PreTrainedConfig) -> bool:
    """Return whether a setting lists a value for each layer, and not the indices of layers."""
    depth = getattr(config, "num_hidden_layers", 0)
    return (
        isinstance(value, list | tuple) and depth == len(value) > DEPTH and list(value) != list(range(depth))
    )


def typical_layers(config: transformers.PreTrainedConfig) -> list[int]:
    """Return the indices of ``DEPTH`` layers that include every kind of layer."""
    kinds = list(zip(*[value for value in vars(config).values() if is_per_layer(value, config)], strict=True))
    chosen: list[int] = []
    for layer, kind in enumerate(kinds):
        if any(part not in [kinds[i][place] for i in chosen] for place, part in enumerate(kind)):
            chosen.append(layer)
    later = [layer for layer in range(len(kinds)) if layer > chosen[-1]]
    return sorted([*chosen, *later][:DEPTH])


HYBRID = ["linear_attention", "full_attention"] * 2
SLIDING = ["sliding_attention", "full_attention"] * 2
QWEN4_EXP = {
    "eos_token_id": 2,
    "ple_layer_ids": [1],
    "make_ngram_vocab_size_divisible_by": 8,
    "split_ngram_parts": 2,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
}
DOTS3_NOTE = {
    "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 2,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 8,
}
GEMMA4 = {"layer_types": SLIDING, "num_kv_shared_layers": 2, "global_head_dim": 16}
GEMMA4_MOE = {
    "num_experts": 6,
    "layer_types": SLIDING,
    "global_head_dim": 16,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
    "enable_moe_block": True,
    "top_k_experts": 2,
    "moe_intermediate_size": 16,
}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "blenderbot": {"encoder_layers": DEPTH},
    "bloom": {"n_layer": DEPTH},
    "blt": {"num_hidden_layers": DEPTH, "patching_threshold": 3.4},
    "cohere2_moe": {"mlp_layer_types": ["dense", *["sparse"] * 3], "num_shared_experts": 1},
    "cohere_compass_text": {
        "layer_types": SLIDING,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": None,
        },
    },
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}},
    "dots1": {
        "n_routed_experts": 6,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "layer_types": SLIDING,
    },
    "dots3_note": {"text_config": DOTS3_NOTE},
    "dots3_note_text": DOTS3_NOTE,
    "gemma3n_text": {"layer_types": SLIDING},
    "gemma4": {
        "text_config": GEMMA4_MOE,
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "position_embedding_size": 128,
        },
    },
    "gemma4_text": {**GEMMA4, "use_double_wide_mlp": True},
    "gemma4_unified": {"text_config": GEMMA4},
    "gemma4_unified_text": GEMMA4,
    "glm_moe_dsa": {"indexer_types": ["full", "shared"] * 2},
    "gpt_neo": {"attention_types": [[["global", "local"], DEPTH // 2]]},
    "granite_swa": {"layer_rope_theta": [10000.0, 100.0] * 2},
    "granitemoe_swa": {"layer_rope_theta": [10000.0, 100.0] * 2, "shared_intermediate_size": 16},
    "granitemoehybrid": {"layer_types": HYBRID},
    "granitemoeshared": {"shared_intermediate_size": 16},
    "hrm_text": {"num_hidden_layers": 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 6, "moe_topk": 2},
    "inkling2_text": {"n_layers_per_attn_res_block": 2, "log_scaling_n_floor": 4},
    "inkling_text": {"mlp_layer_types": ["dense", *["sparse"] * 3]},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 3,
        "expert_layer_offset": 0,
    },
    "laguna": {"layer_types": SLIDING, "num_attention_heads_per_layer": [2, 4, 2, 4]},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "llama4": {"text_config": {"moe_layers": [1, 3], "floor_scale": 4}},
    "llama4_text": {"moe_layers": [1, 3], "floor_scale": 4},
    "mamba2": {"num_heads": 8},
    "mellum": {"layer_types": SLIDING},
    "mimo_v2_flash": {"v_head_dim": 4},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
        "mlp_layer_types": ["dense", *["sparse"] * 3],
        "index_block_size": 2,
        "index_topk_blocks": 2,
    },
    "ministral": {"head_dim": 8, "layer_types": SLIDING},
    "mllama": {"text_config": {"cross_attention_layers": [1]}},
    "modernbert-decoder": {"local_attention": 12},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {"text_config": QWEN4_EXP},
    "qwen4_exp_text": QWEN4_EXP,
    "reformer": {
        "attn_layers": ["local", "lsh"] * 2,
        "axial_pos_shape": [16, 8],
        "axial_pos_embds_dim": [16, 16],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 32,
    },
    "rwkv": {"rescale_every": 2},
    "xlm": {"causal": True},
    "xlnet": {"attn_type": "uni"},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_head_dim": 16},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"layer_types": ["hybrid", "hybrid_sliding"] * 2, "sliding_window": 6},
}
