"""litellm with its `openai/` provider. OPENAI_BASE_URL and OPENAI_API_KEY say where, MODEL says which."""

import asyncio
import json
import os

import litellm

MODEL = f"openai/{os.environ['MODEL']}"
WHERE = {"api_base": os.environ["OPENAI_BASE_URL"], "api_key": os.environ["OPENAI_API_KEY"]}
ASKED = {"model": MODEL, "messages": [{"role": "user", "content": "Say hello."}], "temperature": 0, "max_tokens": 12, **WHERE}
TOOL = {"type": "function", "function": {"name": "greet", "parameters": {
    "type": "object", "properties": {"how": {"enum": ["hello", "bye"]}}, "required": ["how"], "additionalProperties": False}}}


def main() -> None:
    expected = litellm.completion(**ASKED).choices[0].message.content
    assert expected
    assert "".join(chunk.choices[0].delta.content or "" for chunk in litellm.completion(**ASKED, stream=True)) == expected
    assert asyncio.run(litellm.acompletion(**ASKED)).choices[0].message.content == expected
    named = {"type": "function", "function": {"name": "greet"}}
    call = litellm.completion(**{**ASKED, "max_tokens": 40}, tools=[TOOL], tool_choice=named).choices[0].message.tool_calls[0]
    assert json.loads(call.function.arguments)["how"] in ("hello", "bye")


if __name__ == "__main__":
    main()
