"""Tensor names that the checkpoints of several families share. A family file says only where its own differ."""

import re

from emoe_jax.checkpoint.family import DenseTensors, ExpertSource, Part
from emoe_jax.config import ModelConfig

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def decoder_tensors(
    config: ModelConfig, router: str = "mlp.gate.weight", shared_expert: str = "mlp.shared_expert"
) -> DenseTensors:
    """All weights but the experts; the configuration says which blocks a layer has.

    `router` is the name of its weight in a layer, and `shared_expert` that of the shared expert.
    """
    tensors = outer_tensors(config)
    for layer in range(config.num_layers):
        tensors |= attention_tensors(config, layer)
        if config.is_moe(layer):
            tensors |= moe_tensors(config, layer, router, shared_expert)
        else:
            ours, hub = f"layers.{layer}.mlp", f"model.layers.{layer}.mlp"
            tensors |= ffn_tensors(config, ours, hub, config.dense_hidden)
    return tensors


def moe_tensors(config: ModelConfig, layer: int, router: str, shared_expert: str) -> DenseTensors:
    """The router of a MoE layer, and what a row passes besides its experts: a shared expert, OpenMoE's FFN."""
    D, E = config.hidden_size, config.num_experts
    ours, hub = f"layers.{layer}", f"model.layers.{layer}"
    tensors: DenseTensors = {f"{ours}.router.weight": (Part(f"{hub}.{router}", (E, D)),)}
    of_router = f"{hub}.{router.removesuffix('.weight')}"
    if config.router.bias:
        tensors[f"{ours}.router.bias"] = (Part(f"{of_router}.bias", (E,)),)
    if config.router.choice_bias:
        tensors[f"{ours}.router.choice_bias"] = (Part(f"{of_router}.e_score_correction_bias", (E,)),)
    if config.shared_expert_hidden:
        shared = f"{hub}.{shared_expert}"
        tensors |= ffn_tensors(config, f"{ours}.shared_expert", shared, config.shared_expert_hidden)
    if config.shared_expert_gate:
        shared = f"{hub}.{shared_expert}"
        tensors[f"{ours}.shared_expert_gate.weight"] = (Part(f"{shared}_gate.weight", (1, D)),)
    if config.extra_ffn:
        tensors[f"{ours}.extra_norm.weight"] = (Part(f"{hub}.pre_extra_mlp_layernorm.weight", (D,)),)
        tensors |= ffn_tensors(config, f"{ours}.extra_mlp", f"{hub}.extra_mlp", config.dense_hidden)
    return tensors


def attention_tensors(config: ModelConfig, layer: int) -> DenseTensors:
    """The attention names and norms that Llama-like checkpoints share."""
    D, H = config.hidden_size, config.head_dim
    widths = {"q": config.num_heads * H, "k": config.num_kv_heads * H, "v": config.num_kv_heads * H}
    hub, ours = f"model.layers.{layer}", f"layers.{layer}"
    tensors: DenseTensors = {
        f"{ours}.input_norm.weight": (Part(f"{hub}.input_layernorm.weight", (D,)),),
        f"{ours}.ffn_norm.weight": (Part(f"{hub}.post_attention_layernorm.weight", (D,)),),
        f"{ours}.self_attention.qkv.weight": tuple(
            Part(f"{hub}.self_attn.{p}_proj.weight", (width, D)) for p, width in widths.items()
        ),
        f"{ours}.self_attention.out.weight": (Part(f"{hub}.self_attn.o_proj.weight", (D, widths["q"])),),
    }
    if config.qkv_bias:
        tensors[f"{ours}.self_attention.qkv.bias"] = tuple(
            Part(f"{hub}.self_attn.{p}_proj.bias", (width,)) for p, width in widths.items()
        )
    if config.output_bias:
        tensors[f"{ours}.self_attention.out.bias"] = (Part(f"{hub}.self_attn.o_proj.bias", (D,)),)
    if config.attention_sinks:
        tensors[f"{ours}.self_attention.sinks"] = (Part(f"{hub}.self_attn.sinks", (config.num_heads,)),)
    if config.qk_norm != "none":
        for p in "qk":
            size = H if config.qk_norm == "head" else widths[p]
            tensors[f"{ours}.self_attention.{p}_norm.weight"] = (Part(f"{hub}.self_attn.{p}_norm.weight", (size,)),)
    return tensors


def ffn_tensors(config: ModelConfig, ours: str, hub: str, hidden: int) -> DenseTensors:
    """A dense FFN under the names `gate_proj`, `up_proj`, `down_proj`; the gate is twice as wide in a double GLU."""
    D, gate_rows = config.hidden_size, (config.ffn_in_factor - 1) * hidden
    return {
        f"{ours}.w_in.weight": (
            Part(f"{hub}.gate_proj.weight", (gate_rows, D)),
            Part(f"{hub}.up_proj.weight", (hidden, D)),
        ),
        f"{ours}.w_out.weight": (Part(f"{hub}.down_proj.weight", (D, hidden)),),
    }


def outer_tensors(config: ModelConfig) -> DenseTensors:
    """Embedding, final norm and head."""
    V, D = config.vocab_size, config.hidden_size
    tensors: DenseTensors = {
        "embedding": (Part("model.embed_tokens.weight", (V, D)),),
        "norm.weight": (Part("model.norm.weight", (D,)),),
    }
    if not config.tie_embeddings:
        tensors["head"] = (Part("lm_head.weight", (V, D)),)
    return tensors


def is_of_layers_behind(config: ModelConfig, name: str) -> bool:
    """Whether a tensor is of a layer behind the model's last: one that guesses tokens ahead, which is not done here."""
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return match is not None and int(match[1]) >= config.num_layers


def expert_sources(config: ModelConfig, layer: int, expert: int) -> tuple[ExpertSource, ...]:
    """OLMoE, Qwen and GLM: under `mlp.experts`, one tensor per expert and projection, or the fused stacks."""
    hub = f"model.layers.{layer}.mlp.experts"
    return per_expert_source(config, f"{hub}.{expert}"), fused_source(config, hub, expert)


def per_expert_source(config: ModelConfig, hub: str, names: tuple[str, str, str] = PROJECTIONS) -> ExpertSource:
    """One tensor per projection of the expert at `hub`; `names` are its gate, up and down projections."""
    D, F = config.hidden_size, config.expert_hidden
    gate, up, down = (f"{hub}.{name}.weight" for name in names)
    return ExpertSource((Part(gate, ((config.ffn_in_factor - 1) * F, D)), Part(up, (F, D))), Part(down, (D, F)))


def fused_source(
    config: ModelConfig, hub: str, expert: int, names: tuple[str, str] = ("gate_up_proj", "down_proj")
) -> ExpertSource:
    """Stacks of all experts at `hub`; by default those that transformers 5 keeps in memory and can save."""
    E = config.num_experts
    return ExpertSource(
        (Part(f"{hub}.{names[0]}", (E, *config.expert_in_shape), expert),),
        Part(f"{hub}.{names[1]}", (E, *config.expert_out_shape), expert),
    )
