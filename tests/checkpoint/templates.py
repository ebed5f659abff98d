# ruff: noqa: E501  templates are as they are
"""Chat templates in the shapes of well-known families, and a tokenizer that has all of their tokens."""

import json
import re
from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from emoe_jax.checkpoint import Tokenizer
from emoe_jax.models import load_tokenizer

SPECIAL = re.findall(
    r"\S+",
    "<s> </s> <|im_start|> <|im_end|> <|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> [INST] [/INST] "
    "<|start|> <|end|> <|message|> <|channel|> <|system|> <|user|> <|assistant|> <｜end▁of▁sentence｜> [gMASK]",
)
TURNS = ["<｜User｜>", "<｜Assistant｜>", "<start_of_turn>", "<end_of_turn>"]
"""Not special for the tokenizer, and yet what turns are marked with."""
PAIRED = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
READ = ["/nothink"]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
    "'\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
QWEN3 = """
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "<tool_call>\\n{...}\\n</tool_call><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string
        and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or (not loop.last and reasoning_content)) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' }}{{- content }}{{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""
R1 = (
    "{% set ns = namespace(system='') %}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{% set ns.system = m['content'] %}{% endif %}{% endfor %}{{ bos_token }}{{ ns.system }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}{% endif %}{% if m['role'] == 'assistant' %}"
    "{% set content = m['content'] %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}"
    "{% endif %}{{ '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)
MISTRAL = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- set rest = messages[1:] %}"
    "{%- else %}{%- set rest = messages %}{%- endif %}{{- bos_token }}{%- for m in rest %}"
    "{%- if m.role == 'user' %}{%- if loop.last and system is defined %}{{- '[INST] ' ~ system ~ '\\n\\n' ~ m.content ~ "
    "'[/INST]' }}{%- else %}{{- '[INST] ' + m.content.strip() + '[/INST]' }}{%- endif %}{%- elif m.role == 'assistant' %}"
    "{{- ' ' + m.content | trim + eos_token }}{%- else %}{{- raise_exception('only user and assistant') }}{%- endif %}"
    "{%- endfor %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim "
    "+ '<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
HARMONY = """
{%- macro system(text) -%}<|start|>system<|message|>{{ text | upper }}<|end|>{%- endmacro -%}
{{- system("reasoning: " + (reasoning_effort or "medium") + "\\n") }}
{%- for message in messages %}
    {%- if message.role in ['developer', 'system'] %}
        {{- "<|start|>developer<|message|># Instructions\\n\\n" }}{{- message.content }}{{- "<|end|>" }}
    {%- elif message.role == 'assistant' %}
        {%- if "<|channel|>analysis<|message|>" in message.content %}
            {{- raise_exception("channel tags in content") }}
        {%- endif %}
        {%- if message.thinking %}{{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" }}{%- endif %}
        {{- "<|start|>assistant<|channel|>final<|message|>%s<|end|>" | format(message.content) }}
    {%- elif message.role == 'tool' %}
        {{- "<|start|>functions to=assistant<|channel|>commentary<|message|>{}<|end|>".format(message.content | tojson) }}
    {%- else %}
        {{- ["<|start|>user", "<|message|>", message.content, "<|end|>"] | join }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|start|>assistant{% endif %}
"""
PHI = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
GLM = """[gMASK]{%- set tags = {'user': '<|user|>', 'assistant': '<|assistant|>', 'system': '<|system|>'} %}
{%- for m in messages %}{% generation %}
{{- tags[m.role] }}
{{ m.content }}
{{- '/nothink' if (m.role == 'user' and not enable_thinking and not m.content.endswith("/nothink")) else '' -}}
{% endgeneration %}{%- endfor %}
{%- set tail %}{{ tags.assistant }}{{ '\\n<think></think>' if not enable_thinking }}{% endset %}
{%- if add_generation_prompt %}{{ tail | replace('\\n\\n', '\\n') }}{% endif %}
"""
TEMPLATES = {
    "chatml": CHATML,
    "qwen3": QWEN3,
    "r1": R1,
    "mistral": MISTRAL,
    "llama3": LLAMA3,
    "gemma": GEMMA,
    "harmony": HARMONY,
    "phi": PHI,
    "glm": GLM,
}


def chat_tokenizer(directory: Path, template: str | list[dict[str, str]] | None) -> Tokenizer:
    """A byte-level tokenizer with every token above."""
    directory.mkdir(parents=True, exist_ok=True)
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(
        ["what does the think tag of an assistant start and end? <|im_", "1 | 2 || 3"] * 4, trainer
    )
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in [*TURNS, *PAIRED, *READ]])
    backend.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    if template is not None:
        config["chat_template"] = template  # pyright: ignore[reportArgumentType]
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(directory)
    assert tokenizer is not None
    return tokenizer
