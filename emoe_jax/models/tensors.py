"""Tensor names that the checkpoints of several families share. A family file says only where its own differ."""

import dataclasses
import re

from emoe_jax.checkpoint.family import Band, DenseTensors, ExpertSource, Part
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
        hub, ours = f"model.layers.{layer}", f"layers.{layer}"
        tensors |= {
            f"{ours}.input_norm.weight": (Part(f"{hub}.input_layernorm.weight", (config.hidden_size,)),),
            f"{ours}.ffn_norm.weight": (Part(f"{hub}.post_attention_layernorm.weight", (config.hidden_size,)),),
        }
        of_attention = attention_tensors if config.latent is None else latent_attention_tensors
        tensors |= of_attention(config, f"{ours}.self_attention", f"{hub}.self_attn")
        if config.is_moe(layer):
            tensors |= moe_tensors(config, layer, router, shared_expert)
        else:
            tensors |= ffn_tensors(config, f"{ours}.mlp", f"{hub}.mlp", config.dense_hidden)
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


def attention_tensors(config: ModelConfig, ours: str, hub: str) -> DenseTensors:
    """The attention names and norms that Llama-like checkpoints share."""
    D, H = config.hidden_size, config.head_dim
    widths = {"q": config.num_heads * H, "k": config.num_kv_heads * H, "v": config.num_kv_heads * H}
    tensors: DenseTensors = {
        f"{ours}.qkv.weight": tuple(Part(f"{hub}.{p}_proj.weight", (width, D)) for p, width in widths.items()),
        f"{ours}.out.weight": (Part(f"{hub}.o_proj.weight", (D, widths["q"])),),
    }
    if config.qkv_bias:
        tensors[f"{ours}.qkv.bias"] = tuple(Part(f"{hub}.{p}_proj.bias", (width,)) for p, width in widths.items())
    if config.output_bias:
        tensors[f"{ours}.out.bias"] = (Part(f"{hub}.o_proj.bias", (D,)),)
    if config.attention_sinks:
        tensors[f"{ours}.sinks"] = (Part(f"{hub}.sinks", (config.num_heads,)),)
    if config.qk_norm != "none":
        for p in "qk":
            size = H if config.qk_norm == "head" else widths[p]
            tensors[f"{ours}.{p}_norm.weight"] = (Part(f"{hub}.{p}_norm.weight", (size,)),)
    return tensors


def latent_attention_tensors(config: ModelConfig, ours: str, hub: str) -> DenseTensors:
    """DeepSeek's names. Its `kv_b_proj` has the maps of a head's keys and of its values in turn."""
    latent, D, N = config.latent, config.hidden_size, config.num_heads
    assert latent is not None
    down = {"kv_a_proj_with_mqa": latent.key_dim}
    if latent.q_rank is not None:
        down = {"q_a_proj": latent.q_rank} | down
    q_name = "q_proj" if latent.q_rank is None else "q_b_proj"
    both = latent.nope_dim + latent.value_dim
    maps = Part(f"{hub}.kv_b_proj.weight", (N * both, latent.kv_rank))
    tensors: DenseTensors = {
        f"{ours}.down.weight": tuple(Part(f"{hub}.{name}.weight", (rows, D)) for name, rows in down.items()),
        f"{ours}.q.weight": (
            Part(f"{hub}.{q_name}.weight", (N * (latent.nope_dim + latent.rope_dim), latent.q_rank or D)),
        ),
        f"{ours}.latent_norm.weight": (Part(f"{hub}.kv_a_layernorm.weight", (latent.kv_rank,)),),
        f"{ours}.key_map": (dataclasses.replace(maps, band=Band(both, 0, latent.nope_dim)),),
        f"{ours}.value_map": (dataclasses.replace(maps, band=Band(both, latent.nope_dim, both)),),
        f"{ours}.out.weight": (Part(f"{hub}.o_proj.weight", (D, N * latent.value_dim)),),
    }
    if latent.q_rank is not None:
        tensors[f"{ours}.q_norm.weight"] = (Part(f"{hub}.q_a_layernorm.weight", (latent.q_rank,)),)
    if config.qkv_bias:
        tensors[f"{ours}.down.bias"] = tuple(Part(f"{hub}.{name}.bias", (rows,)) for name, rows in down.items())
    if config.output_bias:
        tensors[f"{ours}.out.bias"] = (Part(f"{hub}.o_proj.bias", (D,)),)
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
