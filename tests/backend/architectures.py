"""Decoder architectures of transformers, one row each, as tiny random models: what the tap is measured on."""

from dataclasses import dataclass, field
from typing import Any

VOCAB, WIDTH, HEADS, KV_HEADS, LAYERS = 101, 32, 4, 2, 3
WINDOW = 8  # sliding windows are much shorter than the sequences of the tests


@dataclass(frozen=True, eq=False)  # a row is itself, whatever its kwargs
class Architecture:
    """A row: the config class by name, what differs from the common tiny sizes, and what is special about it."""

    name: str
    config: str
    special: str = ""
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
HYBRID = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
GATED_DELTA = {
    "num_hidden_layers": 4,
    "layer_types": HYBRID,
    "head_dim": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_shared_experts": 1}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "first_k_dense_replace": 1,
}

SUPPORTED = [
    Architecture("Llama", "LlamaConfig"),
    Architecture("Mistral", "MistralConfig", "sliding window", {"sliding_window": WINDOW}),
    Architecture("Ministral", "MinistralConfig", "sliding and full layers", {"sliding_window": WINDOW, "layer_types": MIXED, "head_dim": 8}),
    Architecture("Mixtral", "MixtralConfig", "experts", {"num_local_experts": 4}),
    Architecture("Qwen2", "Qwen2Config", "biases"),
    Architecture("Qwen2-MoE", "Qwen2MoeConfig", "experts", {**EXPERTS, "shared_expert_intermediate_size": 24}),
    Architecture("Qwen3", "Qwen3Config", "query and key norm", {"head_dim": 16}),
    Architecture("Qwen3-MoE", "Qwen3MoeConfig", "query and key norm, experts", {**EXPERTS, "head_dim": 16}),
    Architecture("Qwen3-Next", "Qwen3NextConfig", "gated attention, linear layers, experts",
        {**GATED_DELTA, **EXPERTS, "shared_expert_intermediate_size": 24}),
    Architecture("Qwen3.5", "Qwen3_5TextConfig", "gated attention, linear layers", GATED_DELTA),
    Architecture("Gemma", "GemmaConfig", "one key/value head", {"head_dim": 16, "num_key_value_heads": 1}),
    Architecture("Gemma 2", "Gemma2Config", "soft cap, sliding window",
        {"head_dim": 16, "sliding_window": WINDOW, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 12}),
    Architecture("Gemma 3", "Gemma3TextConfig", "query and key norm, sliding and full layers",
        {"head_dim": 16, "sliding_window": WINDOW, "layer_types": MIXED}),
    Architecture("Gemma 3n", "Gemma3nTextConfig", "layers that share keys",
        {"head_dim": 16, "sliding_window": WINDOW, "num_hidden_layers": 4, "num_kv_shared_layers": 2,
         "layer_types": ["sliding_attention", "full_attention"] * 2, "vocab_size_per_layer_input": VOCAB,
         "hidden_size_per_layer_input": 8, "laurel_rank": 4, "intermediate_size": 48, "activation_sparsity_pattern": [0.0] * 4}),
    Architecture("Gemma 4", "Gemma4TextConfig", "layers that share keys",
        {"head_dim": 16, "global_head_dim": 16, "sliding_window": WINDOW, "num_hidden_layers": 4, "num_kv_shared_layers": 2,
         "layer_types": ["sliding_attention", "full_attention"] * 2, "vocab_size_per_layer_input": VOCAB,
         "hidden_size_per_layer_input": 8}),
    Architecture("Phi", "PhiConfig", "part of the head rotates"),
    Architecture("Phi-3", "Phi3Config", "one matrix for query, key, value; sliding window", {"sliding_window": WINDOW}),
    Architecture("Phi-3.5-MoE", "PhimoeConfig", "experts", {"num_local_experts": 4}),
    Architecture("OLMo", "OlmoConfig", "clipped query, key, value", {"clip_qkv": 1.0}),
    Architecture("OLMo 2", "Olmo2Config", "query and key norm"),
    Architecture("OLMo 3", "Olmo3Config", "sliding and full layers", {"sliding_window": WINDOW, "layer_types": MIXED}),
    Architecture("OLMoE", "OlmoeConfig", "query and key norm, experts", {"num_experts": 4, "num_experts_per_tok": 2}),
    Architecture("Granite", "GraniteConfig", "own scale", {"attention_multiplier": 0.3}),
    Architecture("GraniteMoE", "GraniteMoeConfig", "own scale, experts", {"attention_multiplier": 0.3, "num_local_experts": 4}),
    Architecture("Granite 4", "GraniteMoeHybridConfig", "Mamba layers, experts",
        {**MAMBA2, "num_hidden_layers": 4, "layer_types": ["mamba", "attention"] * 2, "attention_multiplier": 0.3,
         "num_local_experts": 4, "shared_intermediate_size": 24}),
    Architecture("Command R", "CohereConfig", "query and key norm", {"use_qk_norm": True}),
    Architecture("Command R7B", "Cohere2Config", "sliding and full layers", {"sliding_window": WINDOW, "layer_types": MIXED}),
    Architecture("GLM", "GlmConfig", "part of the head rotates", {"head_dim": 16}),
    Architecture("GLM-4", "Glm4Config", "part of the head rotates", {"head_dim": 16}),
    Architecture("GLM-4.5", "Glm4MoeConfig", "query and key norm, experts",
        {**ROUTED, "head_dim": 16, "use_qk_norm": True, "n_group": 1, "topk_group": 1}),
    Architecture("SmolLM3", "SmolLM3Config", "a layer without positions", {"no_rope_layers": [1, 0, 1]}),
    Architecture("GPT-OSS", "GptOssConfig", "sinks, sliding and full layers, experts",
        {"head_dim": 16, "sliding_window": WINDOW, "layer_types": MIXED, "num_local_experts": 4}),
    Architecture("StableLM", "StableLmConfig", "part of the head rotates", {"use_qkv_bias": True}),
    Architecture("StarCoder2", "Starcoder2Config", "sliding window", {"sliding_window": WINDOW}),
    Architecture("GPT-NeoX", "GPTNeoXConfig", "one matrix for query, key, value"),
    Architecture("GPT-2", "GPT2Config", "learned positions",
        {"n_embd": WIDTH, "n_head": HEADS, "n_layer": LAYERS, "n_positions": 128}),
    Architecture("GPTBigCode", "GPTBigCodeConfig", "one key/value head",
        {"n_embd": WIDTH, "n_head": HEADS, "n_layer": LAYERS, "n_positions": 128}),
    Architecture("OPT", "OPTConfig", "learned positions", {"ffn_dim": 48, "word_embed_proj_dim": WIDTH}),
    Architecture("BioGPT", "BioGptConfig", "learned positions"),
    Architecture("Nemotron", "NemotronConfig", "part of the head rotates"),
    Architecture("Nemotron-H", "NemotronHConfig", "Mamba layers, layers without attention",
        {"layers_block_type": ["mamba", "attention", "moe", "attention"], "head_dim": 16, "ssm_state_size": 8, "mamba_num_heads": 8,
         "mamba_head_dim": 8, "n_groups": 1, "chunk_size": 8, "n_routed_experts": 4, "moe_intermediate_size": 24,
         "moe_shared_expert_intermediate_size": 24}),
    Architecture("Exaone 4", "Exaone4Config", "query and key norm, sliding and full layers",
        {"sliding_window": WINDOW, "layer_types": MIXED}),
    Architecture("DeepSeek-V2", "DeepseekV2Config", "latent attention, experts",
        {**LATENT, **ROUTED, "topk_method": "greedy"}),
    Architecture("DeepSeek-V3", "DeepseekV3Config", "latent attention, experts",
        {**LATENT, **ROUTED, "n_group": 2, "topk_group": 1}),
    Architecture("Falcon-H1", "FalconH1Config", "attention and Mamba side by side", {**MAMBA2, "mamba_d_ssm": 64}),
    Architecture("LFM2", "Lfm2Config", "convolution layers",
        {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2}),
    Architecture("Bamba", "BambaConfig", "Mamba layers", {**MAMBA2, "num_hidden_layers": 4, "attn_layer_indices": [1, 3]}),
    Architecture("Jamba", "JambaConfig", "Mamba layers, experts, no positions",
        {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4, "use_mamba_kernels": False,
         "mamba_d_state": 8, "mamba_dt_rank": 4}),
    Architecture("Zamba", "ZambaConfig", "Mamba layers, one attention module in several layers",
        {"num_hidden_layers": 5, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "mamba"], "num_key_value_heads": 4,
         "use_mamba_kernels": False, "mamba_d_state": 8, "mamba_dt_rank": 4, "attention_head_dim": 16, "attention_hidden_size": 64}),
    Architecture("Zamba2", "Zamba2Config", "Mamba layers, one attention module in several layers",
        {"num_hidden_layers": 5, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "mamba"], "num_key_value_heads": 4,
         "use_mamba_kernels": False, "mamba_d_state": 8, "n_mamba_heads": 8, "chunk_size": 8, "num_mem_blocks": 1,
         "attention_head_dim": 16, "attention_hidden_size": 64}),
    Architecture("RecurrentGemma", "RecurrentGemmaConfig", "recurrent layers, sliding window",
        {"num_hidden_layers": 4, "block_types": ["recurrent", "attention"], "attention_window_size": WINDOW, "lru_width": WIDTH,
         "head_dim": 8}),
    Architecture("MiniMax", "MiniMaxConfig", "linear layers, experts",
        {"num_hidden_layers": 4, "layer_types": HYBRID, "num_local_experts": 4, "block_size": 8, "head_dim": 8}),
    Architecture("OLMo Hybrid", "OlmoHybridConfig", "linear layers", GATED_DELTA),
    Architecture("Helium", "HeliumConfig", "", {"head_dim": 8}),
    Architecture("ERNIE 4.5", "Ernie4_5Config", "", {"head_dim": 8}),
    Architecture("Seed-OSS", "SeedOssConfig", "biases", {"head_dim": 8}),
    Architecture("Hunyuan", "HunYuanDenseV1Config", "query and key norm", {"head_dim": 8}),
    Architecture("Apertus", "ApertusConfig", "query and key norm"),
    Architecture("Arcee", "ArceeConfig", ""),
    Architecture("BitNet", "BitNetConfig", "norms inside attention"),
    Architecture("dots.llm1", "Dots1Config", "query and key norm, experts", {**ROUTED, "first_k_dense_replace": 1}),
    Architecture("Llama 4", "Llama4TextConfig", "chunked attention, experts",
        {"head_dim": 8, "attention_chunk_size": WINDOW, "num_local_experts": 4, "intermediate_size_mlp": 48,
         "layer_types": ["chunked_attention", "full_attention", "chunked_attention"]}),
    Architecture("ModernBERT decoder", "ModernBertDecoderConfig", "sliding and full layers",
        {"local_attention": WINDOW * 2, "layer_types": MIXED, "cls_token_id": 1, "sep_token_id": 2}),
    Architecture("Persimmon", "PersimmonConfig", "query and key norm"),
    Architecture("NanoChat", "NanoChatConfig", "query and key norm"),
    Architecture("CWM", "CwmConfig", "sliding and full layers", {"head_dim": 8, "sliding_window": WINDOW, "layer_types": MIXED}),
    Architecture("VaultGemma", "VaultGemmaConfig", "soft cap, sliding window",
        {"head_dim": 16, "sliding_window": WINDOW, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 12}),
    Architecture("DiffLlama", "DiffLlamaConfig", "differential attention"),
    Architecture("JetMoE", "JetMoeConfig", "experts", {"kv_channels": 8, "num_local_experts": 4}),
    Architecture("Doge", "DogeConfig", "dynamic mask"),
    Architecture("MiniCPM3", "MiniCPM3Config", "latent attention", {k: v for k, v in LATENT.items() if k != "first_k_dense_replace"}),
    Architecture("Kimi Linear", "KimiLinearConfig", "latent attention, linear layers, experts",
        {**LATENT, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_hidden_layers": 4,
         "layer_types": HYBRID, "linear_head_dim": 8, "linear_num_heads": 4}),
    Architecture("LFM3", "Lfm3Config", "convolution layers, gated attention",
        {"head_dim": 8, "sliding_window": WINDOW, "layer_types": ["conv", "full_attention", "sliding_attention"]}),
    Architecture("DeepSeek-V3.2", "DeepseekV32Config", "sparse attention", {**LATENT, **ROUTED, "n_group": 2, "topk_group": 1}),
]
UNSUPPORTED = [
    Architecture("BLOOM", "BloomConfig", "position bias of its own", {"n_layer": LAYERS, "n_head": HEADS}),
    Architecture("Falcon", "FalconConfig", "attention of its own"),
    Architecture("MPT", "MptConfig", "position bias of its own", {"d_model": WIDTH, "n_heads": HEADS, "n_layers": LAYERS}),
    Architecture("GPT-J", "GPTJConfig", "attention of its own",
        {"n_embd": WIDTH, "n_head": HEADS, "n_layer": LAYERS, "rotary_dim": 8, "n_positions": 128}),
    Architecture("CodeGen", "CodeGenConfig", "attention of its own",
        {"n_embd": WIDTH, "n_head": HEADS, "n_layer": LAYERS, "rotary_dim": 8, "n_positions": 128}),
    Architecture("GPT-Neo", "GPTNeoConfig", "attention of its own",
        {"num_layers": LAYERS, "num_heads": HEADS, "attention_types": [[["global"], 3]]}),
    Architecture("Mamba", "MambaConfig", "no attention at all"),
    Architecture("RWKV", "RwkvConfig", "no attention at all", {"attention_hidden_size": WIDTH}),
]
