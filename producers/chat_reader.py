"""What one choice of a chat says, read from its text as it comes: thought, answer and calls of tools. Pure.

A delta is a part of an assistant's message as OpenAI streams it; joined deltas are the whole message.
"""

import hashlib
from typing import Any

from producers.openai_plan import Shape
from producers.reasoning import ReasoningSplitter
from producers.tool_calls import ToolCall, ToolCallParser, ToolFormat, read_calls

Delta = dict[str, Any]


class ChatReader:
    """How the text was cut into pieces makes no difference to the whole. `job_id` names the calls: the same ones whoever reads."""

    def __init__(self, shape: Shape, tool_format: ToolFormat, job_id: str) -> None:
        self._shape = shape
        self._job_id = job_id
        self._splitter = ReasoningSplitter(is_open=shape.thought == "open") if shape.thought != "never" else None
        self._parser = ToolCallParser(tool_format) if shape.tool_mode == "auto" else None
        self._demanded = ""          # text of demanded calls
        self._num_calls = 0
        self.num_thought_tokens = 0

    @property
    def has_called(self) -> bool:
        return self._num_calls > 0

    def feed(self, piece: str, *, is_last: bool = False) -> Delta:
        """What this token adds; {} for nothing yet."""
        thought, answer = ("", piece) if self._splitter is None else self._splitter.feed(piece)
        if self._splitter is not None and (thought or self._splitter.is_thinking):
            self.num_thought_tokens += 1
        if self._splitter is not None and is_last:
            more_thought, more = self._splitter.flush()
            thought, answer = thought + more_thought, answer + more
        text, calls = self._answer(answer, is_last)
        delta: Delta = {}
        if thought:
            delta["reasoning_content"] = thought
        if text:
            delta["content"] = text
        if calls:
            delta["tool_calls"] = calls
        return delta

    def _answer(self, text: str, is_last: bool) -> tuple[str, list[dict[str, Any]]]:
        if self._shape.tool_mode == "named":
            return "", self._arguments(text)
        if self._shape.tool_mode == "required":
            self._demanded += text
            return self._all_demanded() if is_last else ("", [])
        if self._parser is None:
            return text, []
        shown, calls = self._parser.feed(text)
        if is_last:
            rest, more = self._parser.flush()
            shown, calls = shown + rest, [*calls, *more]
        return shown, self._numbered(calls)

    def _arguments(self, text: str) -> list[dict[str, Any]]:
        if not text:
            return []
        if self._num_calls:
            return [{"index": 0, "function": {"arguments": text}}]
        return self._numbered([ToolCall(self._shape.tool_name, text)])

    def _all_demanded(self) -> tuple[str, list[dict[str, Any]]]:
        try:
            return "", self._numbered(read_calls(self._demanded))
        except ValueError:   # cut off by the limit of tokens
            return self._demanded, []

    def _numbered(self, calls: list[ToolCall]) -> list[dict[str, Any]]:
        numbered = []
        for call in calls:
            if self._shape.only_one_call and self._num_calls:
                break
            digest = hashlib.blake2b(f"{self._job_id}:{self._num_calls}".encode(), digest_size=12).hexdigest()
            numbered.append({"index": self._num_calls, "id": f"call_{digest}", "type": "function",
                             "function": {"name": call.name, "arguments": call.arguments}})
            self._num_calls += 1
        return numbered


def message_of(deltas: list[Delta]) -> dict[str, Any]:
    """The whole message of an assistant."""
    thought = "".join(delta.get("reasoning_content", "") for delta in deltas)
    content = "".join(delta.get("content", "") for delta in deltas)
    calls: list[dict[str, Any]] = []
    for part in (part for delta in deltas for part in delta.get("tool_calls", ())):
        if part["index"] == len(calls):
            calls.append({"id": part["id"], "type": "function", "function": dict(part["function"])})
        else:
            calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
    message: dict[str, Any] = {"role": "assistant", "content": content if content or not calls else None, "refusal": None}
    if thought:
        message["reasoning_content"] = thought
    if calls:
        message["tool_calls"] = calls
    return message
