"""Decoder architectures of transformers, one row each, as tiny random models: what the tap is measured on."""

from dataclasses import dataclass
from typing import Any

VOCAB, WIDTH, HEADS, KV_HEADS, LAYERS = 101, 32, 4, 2, 3
WINDOW = 8  # sliding windows are much shorter than the sequences of the tests


@dataclass(frozen=True, eq=False)
class Architecture:
    """A row: its name, the config class, what is special about it, what differs from the common tiny sizes."""

    name: str
    config: str
    special: str
    kwargs: dict[str, Any]
    auto: str = "AutoModelForCausalLM"
    left_padding: bool = True  # false where the model's own recurrent layers read the padding

    def __str__(self) -> str:
        return self.name


COMMON = dict(vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=LAYERS)
COMMON |= dict(num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=128)
COMMON |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)


def row(name: str, config: str, special: str = "", left_padding: bool = True, **kwargs: Any) -> Architecture:
    return Architecture(name, config, special, {**COMMON, **kwargs}, left_padding=left_padding)


def with_eyes(name: str, config: str, text: dict[str, Any], vision: dict[str, Any]) -> Architecture:
    kwargs = {"text_config": {**COMMON, **text}, "vision_config": vision}
    return Architecture(name, config, "text half of a vision-language model", kwargs, "AutoModelForImageTextToText")


MIXED = dict(sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention", "sliding_attention"])
PAIRS = dict(sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"] * 2, num_hidden_layers=4)
SHARED = dict(num_kv_shared_layers=2, vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=8)
CAPPED = dict(head_dim=16, sliding_window=WINDOW, attn_logit_softcapping=5.0, query_pre_attn_scalar=12)
LINEAR = dict(num_hidden_layers=4, layer_types=["linear_attention", "full_attention"] * 2)
DELTA = dict(linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4)
DELTA |= dict(head_dim=16, **LINEAR)
MAMBA = dict(use_mamba_kernels=False, mamba_d_state=8, mamba_dt_rank=4)
MAMBA2 = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
ROUTED = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, n_shared_experts=1)
GROUPS = dict(n_group=2, topk_group=1)
LATENT = dict(num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8)
LATENT |= dict(v_head_dim=12)
GPT2 = dict(n_embd=WIDTH, n_head=HEADS, n_layer=LAYERS, n_positions=128)
ZAMBA = dict(num_hidden_layers=5, layers_block_type=["mamba", "hybrid", "mamba", "hybrid", "mamba"])
ZAMBA |= dict(num_key_value_heads=4, attention_head_dim=16, attention_hidden_size=64)
SECTIONS = dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2]))
EYE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=28)
EYE |= dict(patch_size=14)
QWEN_EYE = dict(depth=1, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=WIDTH, patch_size=14)
DEEP_EYE = dict(deepstack_visual_indexes=[0], num_position_embeddings=16)

# fmt: off
SUPPORTED = [
    row("Llama", "LlamaConfig"),
    row("Llama 4", "Llama4TextConfig", "chunked attention, experts", head_dim=8, attention_chunk_size=WINDOW,
        layer_types=["chunked_attention", "full_attention", "chunked_attention"], num_local_experts=4,
        intermediate_size_mlp=48),
    row("Mistral", "MistralConfig", "sliding window", sliding_window=WINDOW),
    row("Ministral", "MinistralConfig", "sliding and full layers", head_dim=8, **MIXED),
    row("Mixtral", "MixtralConfig", "experts", num_local_experts=4),
    row("Qwen2", "Qwen2Config", "biases"),
    row("Qwen2-MoE", "Qwen2MoeConfig", "experts", shared_expert_intermediate_size=24, **EXPERTS),
    row("Qwen3", "Qwen3Config", "query and key norm", head_dim=16),
    row("Qwen3-MoE", "Qwen3MoeConfig", "query and key norm, experts", head_dim=16, **EXPERTS),
    row("Qwen3-Next", "Qwen3NextConfig", "gated attention, linear layers, experts",
        shared_expert_intermediate_size=24, **DELTA, **EXPERTS),
    row("Qwen3.5", "Qwen3_5TextConfig", "gated attention, linear layers", **DELTA),
    with_eyes("Qwen2.5-VL", "Qwen2_5_VLConfig", SECTIONS, QWEN_EYE),
    with_eyes("Qwen3-VL", "Qwen3VLConfig", SECTIONS | dict(head_dim=8), QWEN_EYE | DEEP_EYE),
    with_eyes("LLaVA", "LlavaConfig", dict(model_type="llama"), dict(model_type="clip_vision_model", **EYE)),
    with_eyes("SmolVLM", "SmolVLMConfig", dict(model_type="llama"), EYE),
    row("Gemma", "GemmaConfig", "one key/value head", head_dim=16, num_key_value_heads=1),
    row("Gemma 2", "Gemma2Config", "soft cap, sliding and full layers", **CAPPED),
    row("Gemma 3", "Gemma3TextConfig", "query and key norm, sliding and full layers", head_dim=16,
        query_pre_attn_scalar=12, **MIXED),
    row("Gemma 3n", "Gemma3nTextConfig", "layers that share keys", head_dim=16, laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 4, **PAIRS, **SHARED),
    row("Gemma 4", "Gemma4TextConfig", "layers that share keys", head_dim=4, global_head_dim=4, sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention", "full_attention"], **SHARED | dict(num_kv_shared_layers=1)),
    row("VaultGemma", "VaultGemmaConfig", "soft cap, sliding and full layers", **CAPPED),
    row("RecurrentGemma", "RecurrentGemmaConfig", "recurrent layers, sliding window", num_hidden_layers=4, head_dim=8,
        block_types=["recurrent", "attention"], attention_window_size=WINDOW, lru_width=WIDTH, left_padding=False),
    row("Phi", "PhiConfig", "part of the head rotates"),
    row("Phi-3", "Phi3Config", "one matrix for query, key, value; sliding window", sliding_window=WINDOW),
    row("Phi-3.5-MoE", "PhimoeConfig", "experts", num_local_experts=4),
    row("OLMo", "OlmoConfig", "clipped query, key, value", clip_qkv=2.0),
    row("OLMo 2", "Olmo2Config", "query and key norm"),
    row("OLMo 3", "Olmo3Config", "query and key norm, sliding and full layers", **MIXED),
    row("OLMoE", "OlmoeConfig", "query and key norm, experts", num_experts=4, num_experts_per_tok=2),
    row("OLMo Hybrid", "OlmoHybridConfig", "linear layers", **DELTA),
    row("Granite", "GraniteConfig", "own scale", attention_multiplier=0.3),
    row("GraniteMoE", "GraniteMoeConfig", "own scale, experts", attention_multiplier=0.3, num_local_experts=4),
    row("Granite 4", "GraniteMoeHybridConfig", "own scale, Mamba layers, experts", num_hidden_layers=4,
        layer_types=["mamba", "attention"] * 2, attention_multiplier=0.3, num_local_experts=4,
        shared_intermediate_size=24, **MAMBA2),
    row("Command R", "CohereConfig", "query and key norm", use_qk_norm=True),
    row("Command R7B", "Cohere2Config", "sliding and full layers", **MIXED),
    row("GLM", "GlmConfig", "part of the head rotates", head_dim=16),
    row("GLM-4", "Glm4Config", "part of the head rotates", head_dim=16),
    row("GLM-4.5", "Glm4MoeConfig", "query and key norm, experts", head_dim=16, use_qk_norm=True, **ROUTED),
    row("SmolLM3", "SmolLM3Config", "a layer without positions", no_rope_layers=[1, 0, 1]),
    row("GPT-OSS", "GptOssConfig", "sinks, sliding and full layers, experts", head_dim=16, num_local_experts=4,
        **MIXED),
    row("StableLM", "StableLmConfig", "part of the head rotates", use_qkv_bias=True),
    row("StarCoder2", "Starcoder2Config", "sliding window", sliding_window=WINDOW),
    row("GPT-NeoX", "GPTNeoXConfig", "one matrix for query, key, value"),
    row("GPT-2", "GPT2Config", "learned positions", scale_attn_by_inverse_layer_idx=True, **GPT2),
    row("GPTBigCode", "GPTBigCodeConfig", "one key/value head, learned positions", **GPT2),
    row("OPT", "OPTConfig", "learned positions", ffn_dim=48, word_embed_proj_dim=WIDTH),
    row("BioGPT", "BioGptConfig", "learned positions"),
    row("Nemotron", "NemotronConfig", "part of the head rotates"),
    row("Nemotron-H", "NemotronHConfig", "Mamba layers, layers without attention", head_dim=16, mamba_num_heads=8,
        layers_block_type=["mamba", "attention", "moe", "attention"], ssm_state_size=8, mamba_head_dim=8, n_groups=1,
        chunk_size=8, n_routed_experts=4, moe_intermediate_size=24, moe_shared_expert_intermediate_size=24),
    row("EXAONE 4", "Exaone4Config", "query and key norm, sliding and full layers", **MIXED),
    row("DeepSeek-V2", "DeepseekV2Config", "latent attention, experts", topk_method="greedy", **LATENT, **ROUTED),
    row("DeepSeek-V3", "DeepseekV3Config", "latent attention, experts", **LATENT, **ROUTED, **GROUPS),
    row("DeepSeek-V3.2", "DeepseekV32Config", "latent attention to a few chosen keys", index_topk=6, index_n_heads=2,
        index_head_dim=16, **LATENT, **ROUTED, **GROUPS),
    row("MiniCPM3", "MiniCPM3Config", "latent attention", **LATENT),
    row("Kimi Linear", "KimiLinearConfig", "latent attention, linear layers, experts", num_local_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=24, linear_head_dim=8, linear_num_heads=4, **LINEAR, **LATENT),
    row("Falcon-H1", "FalconH1Config", "attention and Mamba side by side", mamba_d_ssm=64, **MAMBA2),
    row("Bamba", "BambaConfig", "Mamba layers", num_hidden_layers=4, attn_layer_indices=[1, 3], **MAMBA2),
    row("Jamba", "JambaConfig", "Mamba layers, experts, no positions", num_hidden_layers=4, attn_layer_period=2,
        attn_layer_offset=1, num_experts=4, **MAMBA),
    row("LFM2", "Lfm2Config", "convolution layers", num_hidden_layers=4, layer_types=["conv", "full_attention"] * 2),
    row("LFM3", "Lfm3Config", "convolution layers, gated attention", head_dim=8, sliding_window=WINDOW,
        layer_types=["conv", "full_attention", "sliding_attention"]),
    row("MiniMax", "MiniMaxConfig", "linear layers, experts", num_local_experts=4, block_size=8, head_dim=8, **LINEAR),
    row("Helium", "HeliumConfig", head_dim=8),
    row("ERNIE 4.5", "Ernie4_5Config", head_dim=8),
    row("Seed-OSS", "SeedOssConfig", "biases", head_dim=8),
    row("Hunyuan", "HunYuanDenseV1Config", "query and key norm", head_dim=8),
    row("Apertus", "ApertusConfig", "query and key norm"),
    row("Arcee", "ArceeConfig"),
    row("BitNet", "BitNetConfig", "norm inside attention"),
    row("dots.llm1", "Dots1Config", "query and key norm, experts", first_k_dense_replace=1, **ROUTED),
    row("ModernBERT decoder", "ModernBertDecoderConfig", "sliding and full layers", local_attention=WINDOW * 2,
        layer_types=MIXED["layer_types"], cls_token_id=1, sep_token_id=2),
    row("Persimmon", "PersimmonConfig", "query and key norm"),
    row("NanoChat", "NanoChatConfig", "query and key norm"),
    row("CWM", "CwmConfig", "sliding and full layers", head_dim=8, **MIXED),
    row("JetMoE", "JetMoeConfig", "experts inside attention", kv_channels=8, num_local_experts=4),
    row("Doge", "DogeConfig", "learned mask"),
]
UNSUPPORTED = [
    row("BLOOM", "BloomConfig", "attention of its own, position bias", n_layer=LAYERS, n_head=HEADS),
    row("Falcon", "FalconConfig", "attention of its own"),
    row("MPT", "MptConfig", "attention of its own, position bias", d_model=WIDTH, n_heads=HEADS, n_layers=LAYERS),
    row("GPT-J", "GPTJConfig", "attention of its own", rotary_dim=8, **GPT2),
    row("CodeGen", "CodeGenConfig", "attention of its own", rotary_dim=8, **GPT2),
    row("GPT-Neo", "GPTNeoConfig", "attention of its own", num_layers=LAYERS, num_heads=HEADS,
        attention_types=[[["global"], 3]]),
    row("DiffLlama", "DiffLlamaConfig", "attends twice per layer"),
    row("Zamba", "ZambaConfig", "one attention module in several layers", **MAMBA, **ZAMBA),
    row("Zamba2", "Zamba2Config", "one attention module in several layers", n_mamba_heads=8, chunk_size=8,
        mamba_d_state=8, num_mem_blocks=1, use_mamba_kernels=False, **ZAMBA),
    row("Mamba", "MambaConfig", "no attention"),
    row("RWKV", "RwkvConfig", "no attention", attention_hidden_size=WIDTH),
]
# fmt: on
