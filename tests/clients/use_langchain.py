"""LangChain's ChatOpenAI. OPENAI_BASE_URL and OPENAI_API_KEY say where, MODEL says which."""

import asyncio
import os
from typing import Literal

from langchain_core.messages import HumanMessage, SystemMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class Greeting(BaseModel):
    """How to greet."""

    how: Literal["hello", "bye"]


@tool
def greet(how: Literal["hello", "bye"]) -> str:
    """Greets somebody."""
    return how


def main() -> None:
    chat = ChatOpenAI(model=os.environ["MODEL"], temperature=0, max_completion_tokens=12)
    messages = [SystemMessage("Be brief."), HumanMessage("Say hello.")]
    expected = chat.invoke(messages)
    assert expected.content and expected.usage_metadata["output_tokens"] > 0
    assert "".join(str(chunk.content) for chunk in chat.stream(messages)) == expected.content
    assert asyncio.run(chat.ainvoke(messages)).content == expected.content
    long = ChatOpenAI(model=os.environ["MODEL"], temperature=0, max_completion_tokens=64)
    assert isinstance(long.with_structured_output(Greeting, method="json_schema").invoke(messages), Greeting)
    assert isinstance(long.with_structured_output(Greeting, method="function_calling").invoke(messages), Greeting)
    call = long.bind_tools([greet], tool_choice="required").invoke(messages).tool_calls[0]
    assert call["name"] == "greet" and call["args"]["how"] in ("hello", "bye")


if __name__ == "__main__":
    main()
