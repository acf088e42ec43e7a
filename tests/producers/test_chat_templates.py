"""Chat templates: the same text as transformers renders, and what a template cannot take is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import _compile_jinja_template

from coordinator.errors import InvalidField
from coordinator.tokenizer import Tokenizer
from producers.chat_messages import read_messages, read_tools
from producers.chat_templates import chat_format, thinks_at_the_end

QWEN = """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n<tools>' }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "assistant" and message.tool_calls %}
        {{- '<|im_start|>assistant' }}
        {%- for call in message.tool_calls %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {%- generation %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endgeneration %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

DEEPSEEK = """{% set ns = namespace(system='') %}{%- for message in messages %}{%- if message['role'] == 'system' %}
{% set ns.system = message['content'] %}{%- endif %}{%- endfor %}{{bos_token}}{{ns.system}}{%- for message in messages %}
{%- if message['role'] == 'user' %}{{'<｜User｜>' + message['content']}}{%- endif %}
{%- if message['role'] == 'assistant' and message['content'] is none %}{%- for tool in message['tool_calls'] %}
{{'<｜Assistant｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + tool['function']['name']
 + '\\n```json\\n' + tool['function']['arguments'] + '\\n```<｜tool▁call▁end｜>'}}{%- endfor %}{%- endif %}
{%- if message['role'] == 'assistant' and message['content'] is not none %}{% set content = message['content'] %}
{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}{{'<｜Assistant｜>' + content + '<｜end｜>'}}
{%- endif %}{%- if message['role'] == 'tool' %}{{'<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>'}}{%- endif %}
{%- endfor %}{% if add_generation_prompt %}{{'<｜Assistant｜><think>\\n'}}{% endif %}"""

CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "ü": "x"}'}}
TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "1 + 1 <b>?"}, {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "2", "tool_call_id": "c1"}, {"role": "assistant", "content": "It is 2."},
    {"role": "user", "content": "Sure?"}]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}}]


def tokenizer_with(model_dir: Path, tmp_path: Path, template: str | None) -> Tokenizer:
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_bytes((model_dir / name).read_bytes())
    config = {"bos_token": "<s>", "eos_token": "</s>"} | ({} if template is None else {"chat_template": template})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.from_dir(tmp_path)


@pytest.mark.parametrize("template", [QWEN, DEEPSEEK])
def test_prompts_are_those_of_transformers(model_dir: Path, tmp_path: Path, template: str) -> None:
    chat = chat_format(tokenizer_with(model_dir, tmp_path, template))
    plain: list[dict[str, Any]] = json.loads(json.dumps(TALK))
    if template is QWEN:   # it writes arguments as JSON, so transformers wants them as an object; clients send text
        plain[1]["tool_calls"][0]["function"]["arguments"] = json.loads(CALL["function"]["arguments"])
    expected = _compile_jinja_template(template).render(messages=plain, tools=TOOLS if template is QWEN else None, documents=None,
                                                        add_generation_prompt=True, bos_token="<s>", eos_token="</s>")
    assert chat.render(read_messages(TALK), read_tools(TOOLS) if template is QWEN else ()) == expected


def test_a_prompt_that_ends_with_an_open_thought_is_known(model_dir: Path, tmp_path: Path) -> None:
    chat = chat_format(tokenizer_with(model_dir, tmp_path, DEEPSEEK))
    assert chat.thinks and not chat.takes_tools and chat.tool_format.name == "deepseek"
    assert thinks_at_the_end(chat.render(read_messages(TALK)))


def test_a_model_whose_template_knows_no_tools_is_told_of_them_in_a_system_message(model_dir: Path, tmp_path: Path) -> None:
    chat = chat_format(tokenizer_with(model_dir, tmp_path, DEEPSEEK))
    prompt = chat.render(read_messages([{"role": "developer", "content": "Be kind."}, *TALK]), read_tools(TOOLS))
    assert prompt.startswith("<s>Be kind.\n\nYou can call functions.") and "- `add`:" in prompt


def test_a_template_may_refuse_messages_and_the_reason_is_told(model_dir: Path, tmp_path: Path) -> None:
    chat = chat_format(tokenizer_with(model_dir, tmp_path, "{{ raise_exception('roles must alternate') }}"))
    with pytest.raises(InvalidField, match=r"messages: .*roles must alternate"):
        chat.render(read_messages(TALK[:1]))


@pytest.mark.parametrize("template", ["{{ messages.__class__.__mro__ }}", "{% for x in range(10**9) %}a{% endfor %}", "{{ 1/0 }}"])
def test_a_template_runs_in_a_sandbox(model_dir: Path, tmp_path: Path, template: str) -> None:
    with pytest.raises(InvalidField, match="messages"):
        chat_format(tokenizer_with(model_dir, tmp_path, template)).render(read_messages(TALK[:1]))


def test_a_checkpoint_without_a_chat_template_is_named(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidField, match="messages: this checkpoint has no chat template: use /v1/completions"):
        chat_format(tokenizer_with(model_dir, tmp_path, None))


@pytest.mark.parametrize(("messages", "field"), [
    ([], "messages"), ("hi", "messages"), ([{"role": "robot", "content": "x"}], "messages[0].role"),
    ([{"role": "user"}], "messages[0].content"), ([{"role": "user", "content": "x", "mood": 1}], "messages[0].mood"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "messages[0].content[0]"),
    ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
     "messages[0].tool_calls[0].function.arguments"),
])
def test_a_message_that_cannot_be_taken_is_named_by_its_place(messages: Any, field: str) -> None:
    with pytest.raises(InvalidField) as caught:
        read_messages(messages)
    assert caught.value.field == field


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert read_messages([{"role": "user", "content": parts}]) == [{"role": "user", "content": "ab"}]
