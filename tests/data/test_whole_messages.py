"""Messages go to the chat template whole: tools, tool calls, parts, reasoning; what it drops costs
the row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny_models
from conftest import Write
from gradsift.data.conversations import UnusableRowError, as_text, text_of, to_messages, to_tools
from gradsift.data.encoded import EncodedSet, encode_set
from gradsift.data.encoding import Encoded, Encoder
from gradsift.data.groups import GroupEncoder
from gradsift.data.sources import resolve

# In the form of Qwen 2.5: tools in the system turn, calls and answers in tags
QWEN = (
    "{%- if tools %}{{ '<|im_start|>system\n' }}"
    "{%- if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\n' }}{% endif %}"
    "{%- for tool in tools %}{{ tool | tojson }}{{ '\n' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{%- elif messages[0]['role'] == 'system' %}"
    "{{ '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}{%- endif %}"
    "{%- for m in messages %}"
    "{%- if m['role'] == 'tool' %}"
    "{{ '<|im_start|>user\n<tool_response>\n' + m['content'] + '\n</tool_response><|im_end|>\n' }}"
    "{%- elif m['role'] == 'assistant' %}{{ '<|im_start|>assistant' }}"
    "{%- if m['content'] %}{{ '\n' + m['content'] }}{% endif %}"
    "{%- for call in m['tool_calls'] %}{%- set f = call['function'] %}"
    "{{ '\n<tool_call>\n{\"name\": \"' + f['name'] + '\", \"arguments\": ' }}"
    "{{- f['arguments'] | tojson }}{{ '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{%- elif m['role'] == 'user' %}{{ '<|im_start|>user\n' + m['content'] + '<|im_end|>\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# In the form of Llama 3.1: one call in a turn, answers as JSON
LLAMA = (
    "{%- if tools is not none %}{{ '<|im_start|>system\n' }}"
    "{%- for t in tools %}{{ t | tojson(indent=4) }}{{ '\n\n' }}{% endfor %}{{ '<|im_end|>' }}"
    "{%- endif %}{%- for m in messages %}"
    "{%- if m['role'] in ('tool', 'ipython') %}"
    "{{ '<|im_start|>ipython\n\n' }}{{ m['content'] | tojson }}{{ '<|im_end|>' }}"
    "{%- elif 'tool_calls' in m %}"
    "{%- if m['tool_calls'] | length != 1 %}{{ raise_exception('one call at once') }}{% endif %}"
    "{%- set f = m['tool_calls'][0]['function'] %}{{ '<|im_start|>assistant\n\n' }}"
    "{{- '{\"name\": \"' + f['name'] + '\", \"parameters\": ' }}{{ f['arguments'] | tojson }}"
    "{{- '}<|im_end|>' }}"
    "{%- else %}{{ '<|im_start|>' + m['role'] + '\n\n' + m['content'] | trim + '<|im_end|>' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"city": "text"}}}]


def call(city: str, name: str = "weather") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": {"city": city}}}


ASKED = [
    {"role": "user", "content": "the weather in Accra?"},
    {"role": "assistant", "content": None, "tool_calls": [call("Accra")]},
    {"role": "tool", "name": "weather", "content": '31 "degrees"\nand sun'},
    {"role": "assistant", "content": "one two"},
]


def encoded(
    template: str, row: dict[str, Any], schema: str = "messages"
) -> tuple[str, list[str]] | str:
    """Return the whole text and what of it is supervised, or the reason why not."""
    tokenizer = tiny_models.tokenizer(template)
    encoder = Encoder(tokenizer, 999)
    [found] = encoder.encode([to_messages(row, schema)], [to_tools(row)])
    if isinstance(found, UnusableRowError):
        return str(found)
    edges = np.flatnonzero(np.diff(found.supervised, prepend=False, append=False))
    spans = [found.input_ids[a:b] for a, b in edges.reshape(-1, 2)]
    return tokenizer.decode(found.input_ids), [tokenizer.decode(span) for span in spans]


@pytest.mark.parametrize("template", [QWEN, LLAMA], ids=["qwen", "llama"])
def test_tools_calls_and_answers_are_what_the_trainer_sees(template: str) -> None:
    for tools in (TOOLS, json.dumps(TOOLS)):
        found = encoded(template, {"messages": ASKED, "tools": tools})
        assert not isinstance(found, str), found
        text, supervised = found
        tokenizer = tiny_models.tokenizer(template)
        assert text == tokenizer.apply_chat_template(ASKED, tools=TOOLS, tokenize=False)
        assert '"name": "weather"' in text
        assert len(supervised) == 2
        assert "Accra" in supervised[0]
        assert supervised[0].endswith("}<|im_end|>" if template == LLAMA else "call><|im_end|>")
        assert supervised[1] == "one two<|im_end|>"


def test_rows_of_a_table_fill_what_is_not_there_with_nothing() -> None:
    filled = [{"tool_calls": None, "name": None, **turn} for turn in ASKED]
    assert to_messages({"messages": filled}, "messages") == to_messages(
        {"messages": ASKED}, "messages"
    )


CONTENT_ALONE = tiny_models.CHATML.replace("m['content']", "(m['content'] or '')")


@pytest.mark.parametrize(
    ("template", "row", "reason"),
    [
        (CONTENT_ALONE, {"messages": ASKED}, "does not render tool call 1 of turn 2"),
        (CONTENT_ALONE, {"messages": ASKED[:1] + ASKED[3:], "tools": TOOLS},
         "does not render the row's tools"),
        (tiny_models.CHATML, {"messages": ASKED}, "the chat template refuses it: "),
        (LLAMA, {"messages": [ASKED[0], ASKED[1] | {"tool_calls": [call("a"), call("b")]}]},
         "refuses it: one call at once"),
        (QWEN.replace("m['tool_calls'] %", "m['tool_calls'][:1] %"),
         {"messages": [ASKED[0], ASKED[1] | {"tool_calls": [call("a"), call("b")]}]},
         "does not render tool call 2 of turn 2"),
        (QWEN.replace("'tool' %", "'none' %"), {"messages": ASKED},
         "does not render the content of turn 3 (tool)"),
        (QWEN.replace("'tool' %", "'none' %"),
         {"messages": [*ASKED[:2], {"role": "tool", "content": "42"},
                       {"role": "assistant", "content": "the answer is 42"}]},
         "does not render the content of turn 4 (assistant)"),  # the 42 is taken for the tool's
        (tiny_models.CHATML,
         {"messages": [ASKED[0], ASKED[3] | {"function_call": {"name": "weather"}}]},
         "does not render the function_call of turn 2"),
        (tiny_models.CHATML, {"messages": [ASKED[0], ASKED[3] | {"reasoning_content": "because"}]},
         "does not render the reasoning of turn 2"),
        (tiny_models.CHATML, {"messages": [ASKED[0] | {"content": [{"type": "text", "text": "x"}]},
                                      ASKED[3]]}, "the chat template refuses it: "),
        (tiny_models.CHATML.replace("+ m['content'] +", "~ m['content'] ~"),
         {"messages": [ASKED[0] | {"content": [{"type": "text", "text": "x"}]}, ASKED[3]]},
         "does not render the content of turn 1 (user)"),
        (tiny_models.CHATML.replace("in messages", "in messages if m['role'] != 'system'"),
         {"messages": [{"role": "system", "content": "of the"}, ASKED[0], ASKED[3]]},
         "does not render the content of turn 1 (system)"),
    ],
)  # fmt: skip
def test_what_a_template_does_not_render_costs_the_row(
    template: str, row: dict[str, Any], reason: str
) -> None:
    found = encoded(template, row)
    assert isinstance(found, str), found
    assert reason in found


PARTS = tiny_models.CHATML.replace(
    "m['content'] +",
    "(m['content'] if m['content'] is string else m['content'] | map(attribute='text') | join) +",
)


def test_parts_of_text_are_rendered_where_the_template_knows_them() -> None:
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "what"}]
    found = encoded(PARTS, {"messages": [{"role": "user", "content": parts}, ASKED[3]]})
    assert not isinstance(found, str), found
    assert "user\nthe what<|im_end|>" in found[0]
    assert found[1] == ["one two<|im_end|>"]


THINKS = tiny_models.CHATML.replace(
    "m['role'] + '\n' +",
    "m['role'] + '\n' + ('<think>' + m['reasoning_content'] + '</think>' "
    "if m['reasoning_content'] else '') +",
)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_supervised_where_the_template_renders_it(key: str) -> None:
    found = encoded(THINKS, {"messages": [ASKED[0], ASKED[3] | {key: "because"}]})
    assert not isinstance(found, str), found
    assert found[1] == ["<think>because</think>one two<|im_end|>"]


def test_white_space_may_be_laid_out_otherwise() -> None:
    template = tiny_models.CHATML.replace("m['content'] +", "m['content'] | replace('\n', ' ') +")
    found = encoded(template, {"messages": [{"role": "user", "content": "a\nb"}, ASKED[3]]})
    assert not isinstance(found, str), found


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            [{"type": "image", "url": "x"}],
            "a part of the content of turn 1 is of type 'image', exp",
        ),
        ([{"text": "x"}], "a part of the content of turn 1 is an object, expected text alone"),
        (["x"], "a part of the content of turn 1 is a str, expected text alone"),
        ([{"type": "text", "text": 5}], "a part of the content of turn 1 is a int, expected text"),
        ([{"type": "x" * 999, "text": 5}], "of type 'xxx"),
        ({"x": 1}, "content of turn 1 is an object, expected text"),
    ],
)
def test_parts_that_are_no_text_cost_the_row(content: Any, reason: str) -> None:
    with pytest.raises(UnusableRowError) as error:
        to_messages({"messages": [{"role": "user", "content": content}, ASKED[3]]}, "messages")
    assert reason in str(error.value)
    assert len(str(error.value)) < 400


def test_the_system_turn_may_stand_anywhere() -> None:
    template = (  # as Mistral has it: before the last user turn
        "{% for m in messages if m['role'] != 'system' %}"
        "{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if loop.index == 3 %}{{ messages[0]['content'] }}{% endif %}"
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}"
        "{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    )
    turns = [{"role": "system", "content": "of the"}, ASKED[0], ASKED[3], ASKED[0], ASKED[3]]
    found = encoded(template, {"messages": turns})
    assert not isinstance(found, str), found
    assert found[1] == ["one two<|im_end|>"] * 2


def test_no_calls_are_as_if_they_were_not_there() -> None:
    turns = [ASKED[0], ASKED[3] | {"tool_calls": []}]
    found = encoded(LLAMA, {"messages": turns})
    assert not isinstance(found, str), found
    assert found == encoded(LLAMA, {"messages": [ASKED[0], ASKED[3]]})


@pytest.mark.parametrize("calls", ['[{"name": "x"}]', {"name": "x"}, 5, ["x"], "junk"])
def test_tool_calls_that_are_no_list_cost_the_row(calls: Any) -> None:
    row = {"messages": [ASKED[0], ASKED[3] | {"tool_calls": calls}]}
    with pytest.raises(UnusableRowError, match=r"tool_calls of turn 2 is .*, expected a list"):
        to_messages(row, "messages")


def test_functions_of_the_older_form_cost_the_row() -> None:
    with pytest.raises(UnusableRowError, match="'functions' are not read; give them as 'tools'"):
        to_tools({"functions": [{"name": "weather"}]})


@pytest.mark.parametrize(
    ("tools", "reason"),
    [("hammer", "tools is not valid JSON"), ("5", "tools is a int, expected a list"),
     ([5], "tools is a list, expected a list of objects")],
)  # fmt: skip
def test_tools_that_are_none_cost_the_row(tools: Any, reason: str) -> None:
    with pytest.raises(UnusableRowError, match=reason):
        to_tools({"tools": tools})
    assert to_tools({"tools": " "}) is to_tools({"tools": []}) is to_tools({}) is None


def test_rows_that_differ_in_a_call_are_not_the_same(tmp_path: Path, write: Write) -> None:
    one, other = ({"messages": [ASKED[0], ASKED[1] | {"tool_calls": [call(c)]}]} for c in "ab")
    path = write("pool.jsonl", [one, other, one | {"tools": TOOLS}, one])
    encoder = Encoder(tiny_models.tokenizer(QWEN), 400)
    found = encode_set(
        "pool", resolve([str(path)]), GroupEncoder(lambda: encoder, {}), tmp_path / "data"
    )
    assert isinstance(found, EncodedSet)
    hashes = found.table(["text_hash"])["text_hash"].to_pylist()
    assert hashes[0] == hashes[3]
    assert len({*hashes}) == 3
    [messages] = found.conversations([0], {})
    assert text_of(messages[1]) == json.dumps([call("a")], sort_keys=True)
    assert "[assistant] [{" in as_text(messages, 400)


RAISING = {
    "a division": "{{ 1 / 0 }}",
    "a missing key": "{{ messages[99]['role'] }}",
    "an attribute": "{{ messages[0].content.no_such.thing }}",
    "no template": "{% for m in messages %}",
    "too much": "{% for i in range(999999999) %}x{% endfor %}",
    "itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a wrong type": "{{ messages + 1 }}",
}


@pytest.mark.parametrize("what", RAISING)
def test_whatever_a_template_raises_costs_the_row(what: str) -> None:
    [found] = Encoder(tiny_models.tokenizer(RAISING[what]), 99).encode([[ASKED[0], ASKED[3]]])
    assert isinstance(found, UnusableRowError)
    assert str(found).startswith("the chat template refuses it: ")


def test_a_plain_row_is_encoded_as_before() -> None:
    [found] = Encoder(tiny_models.tokenizer(), 99).encode([[ASKED[0], ASKED[3]]])
    assert isinstance(found, Encoded)
