"""Plain HTTP: `requests`, and `curl` reading server-sent events. OPENAI_BASE_URL says where, MODEL says which."""

import json
import os
import subprocess

import requests

URL, MODEL = os.environ["OPENAI_BASE_URL"], os.environ["MODEL"]
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "Say hello."}], "temperature": 0, "max_tokens": 12}


def with_requests() -> str:
    answer = requests.post(f"{URL}/chat/completions", json=BODY, timeout=60)
    answer.raise_for_status()
    expected: str = answer.json()["choices"][0]["message"]["content"]
    with requests.post(f"{URL}/chat/completions", json={**BODY, "stream": True}, stream=True, timeout=60) as stream:
        lines = [line.decode() for line in stream.iter_lines() if line]
    assert lines[-1] == "data: [DONE]" and joined(lines) == expected
    return expected


def with_curl(expected: str) -> None:
    shown = subprocess.run(["curl", "-sSN", f"{URL}/chat/completions", "-H", "Content-Type: application/json", "-H", "X-Job-Id: from-curl",
                            "-d", json.dumps({**BODY, "stream": True})], check=True, capture_output=True, text=True, timeout=60).stdout
    lines = [line for line in shown.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]" and joined(lines) == expected
    again = subprocess.run(["curl", "-sSN", f"{URL}/chat/completions", "-H", "X-Job-Id: from-curl", "-H", "Last-Event-ID: 0", "-d",
                            json.dumps({**BODY, "stream": True})], check=True, capture_output=True, text=True, timeout=60).stdout
    assert [line for line in again.splitlines() if line.startswith("data: ")] != lines and expected.endswith(joined(again.splitlines()))


def joined(lines: list[str]) -> str:
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)


if __name__ == "__main__":
    with_curl(with_requests())
