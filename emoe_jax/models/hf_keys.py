"""Keys of `config.json` that no family reads: which of them cannot change a forward, and which values of the others."""

import re
from collections.abc import Mapping
from typing import Any

# Keys that describe training, provenance or defaults of other tools and cannot change what a forward computes.
IRRELEVANT = frozenset(
    {
        "_attn_implementation_autoset",
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "auto_map",
        "chunk_size_feed_forward",
        "dtype",
        "finetuning_task",
        "id2label",
        "initializer_range",
        "is_decoder",
        "label2id",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "prefix",
        "problem_type",
        "return_dict",
        "router_aux_loss_coef",
        "sep_token_id",
        "task_specific_params",
        "tf_legacy_loss",
        "tokenizer_class",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "use_bfloat16",
        "use_cache",
        "bad_words_ids",
        "begin_suppress_tokens",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "length_penalty",
        "max_length",
        "min_length",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_scores",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict_in_generate",
        "suppress_tokens",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
    }
)

_BOOKKEEPING = re.compile(
    r"""_.*  # private to the tool that wrote the file: _commit_hash, _attn_implementation
    | (unsloth|axolotl|mergekit|peft|lora|trl|vllm|sglang|onnx|openvino|neuron|deepspeed|megatron|mlx|gguf)_.*
    | transformers[._-]?js.*
    | .*_(version|implementation|dropout|dropout_prob|prob_dropout|loss_coef|loss_weight|loss_factor|z_loss)
    | (.*_)?(use_)?flash_?attn.* | (.*_)?flash_attention(_2)?
    | (input|router)_jitter(_noise)? | .*_initializer_range | init_.* | initializer_.*
    | gradient_checkpointing.* | ddp_.* | torch_compile.* | fsdp.*
    | base_model | (model_|base_model_|base_|checkpoint_)?(name|id|path|name_or_path|revision|author|license)
    | license | authors? | language | tags | description | version | created(_by|_at)? | date | quantized_by
    | training.* | train_.* | finetun.* | dataset.* | seq(uence)?_length | model_max_length | max_seq(uence)?_len(gth)?
    | chat_template | tokenizer.* | loss_type | num_labels | classifier_.* | summary_.*
    | generation_config | pipeline.* | processor_class | keys_to_ignore.* | (un)?pad_token | (bos|eos|unk|mask)_token
    | (unk|mask|cls|image|video|vision_start|vision_end)_token_id | ep_size | pad_to_multiple_of
    """,
    re.VERBOSE,
)
"""Names of the same kind, as tools make them up."""

# Options of transformers' base class and their one value that leaves a decoder as it is.
NEUTRAL: dict[str, Any] = {
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "partial_rotary_factor": 1.0,
    "pretraining_tp": 1,
    "pruned_heads": {},
    "tie_encoder_decoder": False,
}

SIBLINGS: dict[str, tuple[Any, ...]] = {
    "add_bias_linear": (False,),
    "add_qkv_bias": (False,),
    "alibi": (False,),
    "attention_bias": (False,),
    "attention_chunk_size": (0,),
    "attention_k_eq_v": (False,),
    "attention_out_bias": (False,),
    "attention_output_bias": (False,),
    "attention_sinks": (False,),
    "attn_logit_softcapping": (0,),
    "bias": (False,),
    "decoder_sparse_step": (1,),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (0,),
    "first_k_dense_replace": (0,),
    "interleave_moe_layer_step": (1,),
    "lm_head_bias": (False,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "mlp_bias": (False,),
    "mlp_only_layers": ([],),
    "moe_layer_freq": (1,),
    "moe_layer_interval": (1,),
    "n_group": (0, 1),
    "n_shared_experts": (0,),
    "norm_bias": (False,),
    "num_expert_group": (0, 1),
    "num_mtp_layers": (0,),
    "num_nextn_predict_layers": (0,),
    "num_shared_experts": (0,),
    "output_bias": (False,),
    "parallel_attn": (False,),
    "qk_layernorm": (False,),
    "qk_norm": (False,),
    "qkv_bias": (False,),
    "residual_multiplier": (1,),
    "rope_interleave": (False,),
    "rope_interleaved": (False,),
    "rotary_pct": (1,),
    "routed_scaling_factor": (1,),
    "router_bias": (False,),
    "router_scale": (1,),
    "scale_embeddings": (False,),
    "scoring_func": ("softmax",),
    "shared_expert_intermediate_size": (0,),
    "shared_intermediate_size": (0,),
    "topk_group": (0, 1),
    "topk_method": ("greedy",),
    "use_alibi": (False,),
    "use_attention_bias": (False,),
    "use_attention_sinks": (False,),
    "use_bias": (False,),
    "use_expert_bias": (False,),
    "use_mlp_bias": (False,),
    "use_mrope": (False,),
    "use_parallel_residual": (False,),
    "use_qk_norm": (False,),
    "use_qkv_bias": (False,),
    "use_sliding_window": (False,),
}
"""Options of other families, and the values that ask for nothing. A family that has the option reads it itself."""


def is_bookkeeping(key: str) -> bool:
    """Whether the key cannot change a forward, whatever its value."""
    return key not in SIBLINGS and (key in IRRELEVANT or _BOOKKEEPING.fullmatch(key) is not None)


def without_bookkeeping(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The file without the keys of which a reader warns."""
    return {key: value for key, value in raw.items() if key in IRRELEVANT or not is_bookkeeping(key)}


def is_neutral(key: str, value: Any) -> bool:
    """Whether this value of a sibling family's option asks for nothing."""
    return any(
        value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in SIBLINGS.get(key, ())
    )
