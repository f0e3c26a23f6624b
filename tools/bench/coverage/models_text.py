"""Models of transformers that read text, each from a tiny configuration."""

from __future__ import annotations

from typing import Any, Final

import torch

from torchlathe.tools.bench.coverage.configured import BART, BERT, tiny
from torchlathe.tools.bench.coverage.entry import VOCABULARY, Entry, Inputs, text

__all__ = ["TEXT"]


def _layout(batch: int) -> Inputs:
    kwargs = text(12)(batch)[1]
    corner = torch.randint(0, 20, (batch, 12, 2))
    return (), {**kwargs, "bbox": torch.cat([corner, corner + 5], dim=-1)}


def _tapas(batch: int) -> Inputs:
    kwargs = text(12)(batch)[1]
    return (), {**kwargs, "token_type_ids": torch.zeros(batch, 12, 7, dtype=torch.int64)}


_LLAMA: Final[dict[str, Any]] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOE: Final[dict[str, Any]] = {**_LLAMA, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
_T5: Final[dict[str, Any]] = {
    "vocab_size": VOCABULARY,
    "d_model": 48,
    "d_kv": 12,
    "d_ff": 72,
    "num_layers": 2,
    "num_heads": 4,
    "use_cache": False,
}
_GPT2: Final[dict[str, Any]] = {
    "vocab_size": VOCABULARY,
    "n_positions": 40,
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 4,
    "use_cache": False,
}
_ENCODERS: Final = (
    tiny("bert", "BertForSequenceClassification", "Bert", text(), **BERT),
    tiny("roberta", "RobertaForTokenClassification", "Roberta", text(), **BERT, pad_token_id=1),
    tiny("albert", "AlbertForSequenceClassification", "Albert", text(), **BERT, embedding_size=24),
    tiny(
        "distilbert",
        "DistilBertForSequenceClassification",
        "DistilBert",
        text(),
        vocab_size=VOCABULARY,
        dim=48,
        hidden_dim=72,
        n_layers=2,
        n_heads=4,
        max_position_embeddings=40,
    ),
    tiny(
        "electra", "ElectraForSequenceClassification", "Electra", text(), **BERT, embedding_size=24
    ),
    tiny(
        "deberta",
        "DebertaForSequenceClassification",
        "Deberta",
        text(),
        **BERT,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
    ),
    tiny(
        "deberta_v2",
        "DebertaV2ForSequenceClassification",
        "DebertaV2",
        text(),
        **BERT,
        relative_attention=True,
        position_buckets=8,
        pos_att_type=["c2p", "p2c"],
        share_att_key=True,
        norm_rel_ebd="layer_norm",
    ),
    tiny("mpnet", "MPNetForSequenceClassification", "MPNet", text(), **BERT),
    tiny("convbert", "ConvBertForSequenceClassification", "ConvBert", text(), **BERT,
        embedding_size=24, conv_kernel_size=3, head_ratio=2),
    tiny("squeezebert", "SqueezeBertForSequenceClassification", "SqueezeBert", text(), **BERT,
        embedding_size=48),
    tiny("mobilebert", "MobileBertForSequenceClassification", "MobileBert", text(),
        **{**BERT, "hidden_size": 64}, embedding_size=32, true_hidden_size=32,
        intra_bottleneck_size=32),
    tiny("nystromformer", "NystromformerForSequenceClassification", "Nystromformer",
        text(16, mask=False), **{**BERT, "max_position_embeddings": 64},
        segment_means_seq_len=16, num_landmarks=4, conv_kernel_size=3),
    tiny("fnet", "FNetForSequenceClassification", "FNet", text(mask=False), **BERT,
        tpu_short_seq_length=12),
    tiny("funnel", "FunnelForSequenceClassification", "Funnel", text(), vocab_size=VOCABULARY,
        block_sizes=[1, 1], num_decoder_layers=1, d_model=48, n_head=4, d_head=12, d_inner=72,
        num_labels=3),
    tiny("xlnet", "XLNetForSequenceClassification", "XLNet", text(), vocab_size=VOCABULARY,
        d_model=48, n_layer=2, n_head=4, d_inner=72, num_labels=3, use_mems_eval=False),
    tiny("xlm", "XLMForSequenceClassification", "XLM", text(), vocab_size=VOCABULARY, emb_dim=48,
        n_layers=2, n_heads=4, max_position_embeddings=40, num_labels=3, gelu_activation=True),
    tiny("modernbert", "ModernBertForSequenceClassification", "ModernBert", text(), **BERT,
        pad_token_id=0, local_attention=4, bos_token_id=1, eos_token_id=2, cls_token_id=1,
        sep_token_id=2),
    tiny("ibert", "IBertForSequenceClassification", "IBert", text(), **BERT, pad_token_id=1),
    tiny("roformer", "RoFormerForSequenceClassification", "RoFormer", text(), **BERT),
    tiny("rembert", "RemBertForSequenceClassification", "RemBert", text(), **BERT,
        input_embedding_size=24, output_embedding_size=24),
    tiny("longformer", "LongformerForSequenceClassification", "Longformer", text(16), **{**BERT,
        "max_position_embeddings": 64}, attention_window=[4, 4], pad_token_id=1),
    tiny("big_bird", "BigBirdForSequenceClassification", "BigBird", text(16), **{**BERT,
        "max_position_embeddings": 64}, attention_type="original_full"),
    tiny("canine", "CanineForSequenceClassification", "Canine", text(32), **{**BERT,
        "max_position_embeddings": 64}, num_hash_buckets=64, num_hash_functions=4,
        downsampling_rate=4, upsampling_kernel_size=4, local_transformer_stride=16),
    tiny("esm", "EsmForSequenceClassification", "Esm", text(), **BERT, pad_token_id=1,
        mask_token_id=4, position_embedding_type="rotary"),
    tiny("xmod", "XmodForSequenceClassification", "Xmod", text(), **BERT, pad_token_id=1,
        languages=["en_XX"], default_language="en_XX"),
    tiny("tapas", "TapasModel", "Tapas", _tapas, **{k: v for k, v in BERT.items()
        if k != "num_labels"}, type_vocab_sizes=[3, 8, 8, 2, 8, 8, 4]),
    tiny("layoutlm", "LayoutLMForTokenClassification", "LayoutLM", _layout, **BERT,
        max_2d_position_embeddings=64),
    tiny("luke", "LukeModel", "Luke", text(), **BERT, entity_vocab_size=20, entity_emb_size=16,
        pad_token_id=1),
)  # fmt: skip

_DECODERS: Final = (
    tiny("gpt2", "GPT2LMHeadModel", "GPT2", text(), **_GPT2),
    tiny("gpt_neo", "GPTNeoForCausalLM", "GPTNeo", text(), vocab_size=VOCABULARY, hidden_size=48,
        num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=4,
        max_position_embeddings=40, use_cache=False),
    tiny("gpt_neox", "GPTNeoXForCausalLM", "GPTNeoX", text(), **{**BERT, "num_labels": 2},
        use_cache=False),
    tiny("gptj", "GPTJForCausalLM", "GPTJ", text(), **_GPT2, rotary_dim=4),
    tiny("gpt_bigcode", "GPTBigCodeForCausalLM", "GPTBigCode", text(), **_GPT2),
    tiny("opt", "OPTForCausalLM", "OPT", text(), vocab_size=VOCABULARY, hidden_size=48,
        num_hidden_layers=2, ffn_dim=72, num_attention_heads=4, max_position_embeddings=40,
        word_embed_proj_dim=48, use_cache=False),
    tiny("bloom", "BloomForCausalLM", "Bloom", text(), vocab_size=VOCABULARY, hidden_size=48,
        n_layer=2, n_head=4, use_cache=False),
    tiny("mpt", "MptForCausalLM", "Mpt", text(), vocab_size=VOCABULARY, d_model=48, n_layers=2,
        n_heads=4, max_seq_len=40, expansion_ratio=2, use_cache=False),
    tiny("falcon", "FalconForCausalLM", "Falcon", text(), vocab_size=VOCABULARY, hidden_size=48,
        num_hidden_layers=2, num_attention_heads=4, use_cache=False),
    tiny("llama", "LlamaForCausalLM", "Llama", text(), **_LLAMA),
    tiny("mistral", "MistralForCausalLM", "Mistral", text(), **_LLAMA, sliding_window=4),
    tiny("qwen2", "Qwen2ForCausalLM", "Qwen2", text(), **_LLAMA),
    tiny("qwen3", "Qwen3ForCausalLM", "Qwen3", text(), **_LLAMA, head_dim=12),
    tiny("gemma", "GemmaForCausalLM", "Gemma", text(), **_LLAMA, head_dim=12),
    tiny("gemma3", "Gemma3ForCausalLM", "Gemma3Text", text(), **_LLAMA, head_dim=12,
        sliding_window=4),
    tiny("phi", "PhiForCausalLM", "Phi", text(), **{**_LLAMA, "num_key_value_heads": 6},
        partial_rotary_factor=0.5),
    tiny("phi3", "Phi3ForCausalLM", "Phi3", text(), **_LLAMA),
    tiny("cohere2", "Cohere2ForCausalLM", "Cohere2", text(), **_LLAMA, sliding_window=4),
    tiny("olmo2", "Olmo2ForCausalLM", "Olmo2", text(), **_LLAMA),
    tiny("smollm3", "SmolLM3ForCausalLM", "SmolLM3", text(), **_LLAMA),
    tiny("granite", "GraniteForCausalLM", "Granite", text(), **_LLAMA, embedding_multiplier=2.0,
        residual_multiplier=0.5, logits_scaling=2.0),
    tiny("stablelm", "StableLmForCausalLM", "StableLm", text(), **_LLAMA),
    tiny("starcoder2", "Starcoder2ForCausalLM", "Starcoder2", text(), **_LLAMA),
    tiny("nemotron", "NemotronForCausalLM", "Nemotron", text(), **_LLAMA),
    tiny("persimmon", "PersimmonForCausalLM", "Persimmon", text(), **{**_LLAMA,
        "num_key_value_heads": 6}),
    tiny("mixtral", "MixtralForCausalLM", "Mixtral", text(), **_LLAMA, num_local_experts=4),
    tiny("qwen2_moe", "Qwen2MoeForCausalLM", "Qwen2Moe", text(), **_MOE, num_experts=4,
        shared_expert_intermediate_size=40),
    tiny("qwen3_moe", "Qwen3MoeForCausalLM", "Qwen3Moe", text(), **_MOE, num_experts=4, head_dim=8),
    tiny("olmoe", "OlmoeForCausalLM", "Olmoe", text(), **_LLAMA, num_experts=4,
        num_experts_per_tok=2),
    tiny("deepseek_v2", "DeepseekV2ForCausalLM", "DeepseekV2", text(), **{**_MOE,
        "num_key_value_heads": 6}, n_routed_experts=4, n_shared_experts=1, kv_lora_rank=16,
        q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
        first_k_dense_replace=1, n_group=1, topk_group=1),
    tiny("deepseek_v3", "DeepseekV3ForCausalLM", "DeepseekV3", text(), **{**_MOE,
        "num_key_value_heads": 6}, n_routed_experts=4, n_shared_experts=1, kv_lora_rank=16,
        q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
        first_k_dense_replace=1, n_group=2, topk_group=1),
    tiny("gpt_oss", "GptOssForCausalLM", "GptOss", text(), **_LLAMA, head_dim=8,
        num_local_experts=4, num_experts_per_tok=2, sliding_window=4),
    tiny("mamba", "MambaForCausalLM", "Mamba", text(mask=False), vocab_size=VOCABULARY,
        hidden_size=32, num_hidden_layers=2, state_size=4, use_cache=False),
    tiny("mamba2", "Mamba2ForCausalLM", "Mamba2", text(mask=False), vocab_size=VOCABULARY,
        hidden_size=32, num_hidden_layers=2, state_size=8, num_heads=8, head_dim=8, n_groups=2,
        chunk_size=4, use_cache=False),
    tiny("jamba", "JambaForCausalLM", "Jamba", text(mask=False), **{**_LLAMA,
        "num_attention_heads": 4}, num_experts=2, num_experts_per_tok=1, attn_layer_period=2,
        attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, mamba_d_state=4,
        mamba_dt_rank=4, use_mamba_kernels=False),
    tiny("bamba", "BambaForCausalLM", "Bamba", text(mask=False), **{**_LLAMA,
        "num_attention_heads": 4}, mamba_n_heads=8, mamba_d_head=12, mamba_n_groups=1,
        mamba_d_state=8, mamba_chunk_size=4, attn_layer_indices=[1]),
    tiny("recurrent_gemma", "RecurrentGemmaForCausalLM", "RecurrentGemma", text(),
        vocab_size=VOCABULARY, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=1, lru_width=48, attention_window_size=8,
        use_cache=False),
    tiny("rwkv", "RwkvForCausalLM", "Rwkv", text(8, mask=False), vocab_size=VOCABULARY,
        hidden_size=48, num_hidden_layers=2, attention_hidden_size=48, intermediate_size=72,
        context_length=16, use_cache=False),
    tiny("reformer", "ReformerModelWithLMHead", "Reformer", text(16), vocab_size=VOCABULARY,
        hidden_size=48, attention_head_size=12, num_attention_heads=4, feed_forward_size=72,
        attn_layers=["local", "local"], local_attn_chunk_length=4, axial_pos_embds=False,
        max_position_embeddings=64, is_decoder=True, use_cache=False),
)  # fmt: skip

_SEQ2SEQ: Final = (
    tiny("t5", "T5ForConditionalGeneration", "T5", text(decoder_input_ids=7), **_T5),
    tiny("t5_encoder", "T5EncoderModel", "T5", text(), **_T5),
    tiny("bart", "BartForConditionalGeneration", "Bart", text(decoder_input_ids=7), **BART),
    tiny("mbart", "MBartForConditionalGeneration", "MBart", text(decoder_input_ids=7), **BART),
    tiny("pegasus", "PegasusForConditionalGeneration", "Pegasus", text(decoder_input_ids=7),
        **BART),
    tiny("led", "LEDForConditionalGeneration", "LED", text(16, decoder_input_ids=7),
        **{k: v for k, v in BART.items() if k != "max_position_embeddings"},
        max_encoder_position_embeddings=64, max_decoder_position_embeddings=64,
        attention_window=4),
    tiny("prophetnet", "ProphetNetForConditionalGeneration", "ProphetNet",
        text(decoder_input_ids=7), vocab_size=VOCABULARY, hidden_size=48, encoder_ffn_dim=72,
        num_encoder_layers=2, num_encoder_attention_heads=4, decoder_ffn_dim=72,
        num_decoder_layers=2, num_decoder_attention_heads=4, max_position_embeddings=40,
        use_cache=False),
    tiny("switch_transformers", "SwitchTransformersForConditionalGeneration", "SwitchTransformers",
        text(decoder_input_ids=7), **_T5, num_experts=2, num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1),
)  # fmt: skip

TEXT: Final[tuple[Entry, ...]] = (*_ENCODERS, *_DECODERS, *_SEQ2SEQ)
