"""What models write, parted into thought, answer and calls: the same however the text was cut into tokens."""

import json
from itertools import pairwise
from random import Random

import pytest

from producers.chat_reader import ChatReader, message_of
from producers.openai_plan import Shape
from producers.reasoning import ReasoningSplitter
from producers.tool_calls import DEEPSEEK, HERMES, ToolCall, ToolCallParser, ToolFormat, format_of


def cuts(text: str, seed: int) -> list[str]:
    """`text` in pieces: whole, by character, or at random borders."""
    if seed < 2:
        return [text] if seed == 0 else list(text)
    borders = sorted({0, len(text), *(Random(seed).randrange(len(text) + 1) for _ in range(6))})
    return [text[a:b] for a, b in pairwise(borders)]


def split(pieces: list[str], *, is_open: bool) -> tuple[str, str]:
    splitter = ReasoningSplitter(is_open=is_open)
    parts = [*map(splitter.feed, pieces), splitter.flush()]
    return "".join(thought for thought, _ in parts), "".join(answer for _, answer in parts)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("text", "is_open", "expected"), [
    ("<think>\nSo 2 < 3.\n</think>\n\nYes.", False, ("So 2 < 3.", "Yes.")),
    ("So 2 < 3.\n</think>\n\nYes. ", True, ("So 2 < 3.", "Yes. ")),
    ("never ends </thin", True, ("never ends </thin", "")),
    ("No <think> here</think>.", False, ("", "No <think> here</think>.")),
    ("<thin", False, ("", "<thin")),
    ("\n\n</think>\nYes", True, ("", "Yes")),
])
def test_thought_ends_at_its_mark_wherever_pieces_end(text: str, is_open: bool, expected: tuple[str, str], seed: int) -> None:
    assert split(cuts(text, seed), is_open=is_open) == expected


def parse(pieces: list[str], tool_format: ToolFormat) -> tuple[str, list[ToolCall]]:
    parser = ToolCallParser(tool_format)
    parts = [*map(parser.feed, pieces), parser.flush()]
    return "".join(text for text, _ in parts), [call for _, calls in parts for call in calls]


SUM = ToolCall("add", '{"a": 1, "b": "</x>"}')
TIME = ToolCall("now", "{}")
HERMES_SUM = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "</x>"}}\n</tool_call>'
HERMES_TIME = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
V3_SUM = '<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n{"a": 1, "b": "</x>"}\n```<｜tool▁call▁end｜>'
V3_TIME = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜>"
V31_SUM = '<｜tool▁call▁begin｜>add<｜tool▁sep｜>{"a": 1, "b": "</x>"}<｜tool▁call▁end｜>'


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("tool_format", "text", "expected"), [
    (HERMES, f"I add.\n{HERMES_SUM}\n{HERMES_TIME}\n", ("I add.", [SUM, TIME])),
    (HERMES, "a <tool> b\n", ("a <tool> b\n", [])),
    (HERMES, HERMES_SUM.removesuffix("</tool_call>"), ("", [SUM])),
    (HERMES, "<tool_call>{oops}</tool_call> so", ("<tool_call>{oops}</tool_call> so", [])),
    (HERMES, '<tool_call>{"name": "add"', ('<tool_call>{"name": "add"', [])),
    (DEEPSEEK, f"I add.<｜tool▁calls▁begin｜>{V3_SUM}\n{V3_TIME}<｜tool▁calls▁end｜>", ("I add.", [SUM, TIME])),
    (DEEPSEEK, f"<｜tool▁calls▁begin｜>{V31_SUM}<｜tool▁calls▁end｜>", ("", [SUM])),
    (DEEPSEEK, "1 <｜ 2", ("1 <｜ 2", [])),
])
def test_calls_are_found_wherever_pieces_end(tool_format: ToolFormat, text: str, expected: tuple[str, list[ToolCall]], seed: int) -> None:
    assert parse(cuts(text, seed), tool_format) == expected


def test_the_format_of_calls_follows_the_marks_that_a_model_knows() -> None:
    assert format_of("{{ x }}", ["<｜tool▁call▁begin｜>"]) is DEEPSEEK
    assert format_of("<｜tool▁call▁begin｜>", []) is DEEPSEEK
    assert format_of("<tool_call>", ["<tool_call>"]) is HERMES


@pytest.mark.parametrize("seed", range(8))
def test_a_thought_may_be_followed_by_text_and_calls(seed: int) -> None:
    shape = Shape(kind="chat", model="m", created=1, thought="open", tool_mode="auto")
    reader = ChatReader(shape, HERMES, "job")
    pieces = cuts(f"Hm.\n</think>\n\nI add.\n{HERMES_SUM}{HERMES_TIME}", seed)
    message = message_of([reader.feed(piece, is_last=i == len(pieces) - 1) for i, piece in enumerate(pieces)])
    assert (message["reasoning_content"], message["content"]) == ("Hm.", "I add.")
    assert [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in message["tool_calls"]] == [
        ("add", {"a": 1, "b": "</x>"}), ("now", {})]
    again = ChatReader(shape, HERMES, "job")
    assert message_of([again.feed("".join(pieces), is_last=True)]) == message     # whoever reads it, ids of calls included


def test_without_parallel_calls_only_the_first_is_given() -> None:
    reader = ChatReader(Shape(kind="chat", model="m", created=1, tool_mode="auto", only_one_call=True), HERMES, "job")
    assert len(reader.feed(HERMES_SUM + HERMES_TIME, is_last=True)["tool_calls"]) == 1


@pytest.mark.parametrize("seed", range(4))
def test_a_named_functions_text_is_its_arguments(seed: int) -> None:
    reader = ChatReader(Shape(kind="chat", model="m", created=1, tool_mode="named", tool_name="add"), HERMES, "job")
    message = message_of([reader.feed(piece) for piece in cuts('{"a": 1}', seed)])
    assert message["content"] is None and message["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 1}'}


def test_demanded_calls_that_were_cut_off_are_given_as_text() -> None:
    reader = ChatReader(Shape(kind="chat", model="m", created=1, tool_mode="required"), HERMES, "job")
    assert reader.feed('[{"name": "a', is_last=True) == {"content": '[{"name": "a'}
