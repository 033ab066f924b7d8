"""Streaming chats that write down exactly what came, and who served it. Start at `Asker.ask`."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

_WHO = ["the king", "my lord", "a horse", "Romeo", "the queen", "thy father", "the night", "Rome"]
_WHAT = ["Speak of", "Tell me of", "What news of", "Who is", "Where is", "Sing of", "I fear"]


@dataclass(frozen=True, slots=True)
class Question:
    """A greedy chat; `ignores_end` makes the answer exactly `max_tokens` long."""

    prompt: str
    max_tokens: int
    ignores_end: bool

    def body(self) -> dict[str, Any]:
        return {
            "model": "m",
            "messages": [{"role": "user", "content": self.prompt}],
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "ignore_eos": self.ignores_end,
        }


def questions(count: int, rng: random.Random) -> list[Question]:
    """Return different questions with 60 to 200 tokens of answer."""
    made: dict[str, Question] = {}
    while len(made) < count:
        prompt = f"{rng.choice(_WHAT)} {rng.choice(_WHO)}, {rng.randint(1, 999)} times"
        made[prompt] = Question(prompt, rng.randint(60, 200), rng.random() < 0.8)
    return list(made.values())


@dataclass(slots=True, eq=False)
class Stream:
    """One answer as its client saw it. `problem` is empty when it came whole and well formed."""

    question: Question
    text: str = ""
    num_pieces: int = 0
    usage_id: str = ""
    replica: str = ""  # the first one; others that took over are in the usage row
    input_tokens: int = 0
    output_tokens: int = 0
    finish_reason: str | None = None
    is_live: bool = False
    hit: str = ""  # what was done to its replica while it ran
    problem: str = ""


Watcher = Callable[[Stream], None]
"""Called after each piece of text."""


@dataclass(slots=True)
class Asker:
    """Sends questions to one address with one key."""

    url: str
    key: str
    http: httpx.AsyncClient
    live: list[Stream] = field(default_factory=list)

    async def ask(self, question: Question, watch: Watcher | None = None) -> Stream:
        """Return the whole stream; whatever is wrong with it stands in `problem`."""
        stream = Stream(question)
        self.live.append(stream)
        try:
            await self._read(stream, watch)
        except (httpx.HTTPError, OSError, ValueError, KeyError) as error:
            stream.problem = stream.problem or repr(error)
        finally:
            stream.is_live = False
            self.live.remove(stream)
        return stream

    async def _read(self, stream: Stream, watch: Watcher | None) -> None:
        body = stream.question.body() | {"stream": True, "stream_options": {"include_usage": True}}
        headers = {"authorization": f"Bearer {self.key}"}
        url = f"{self.url}/v1/chat/completions"
        async with self.http.stream("POST", url, json=body, headers=headers) as answer:
            if answer.status_code != 200:
                stream.problem = f"{answer.status_code}: {(await answer.aread()).decode()}"
                return
            stream.replica = answer.headers["x-mxn-replica"].partition(",")[0]
            stream.is_live = True
            is_done = False
            async for line in answer.aiter_lines():
                if not line.startswith("data: "):
                    continue
                if is_done:
                    stream.problem = f"after [DONE] came {line!r}"
                elif line == "data: [DONE]":
                    is_done = True
                else:
                    _take(stream, json.loads(line[6:]))
                    if watch is not None:
                        watch(stream)
            if not is_done:
                stream.problem = stream.problem or "the stream ended without [DONE]"
            elif stream.finish_reason is None or not stream.output_tokens:
                stream.problem = stream.problem or "[DONE] came without an end or without usage"

    async def margins(self, question: Question) -> list[tuple[str, float]]:
        """Return each token's text of an undisturbed answer and the lead of the best token over
        the second, in logprob: where it is next to nothing, rounding decides."""
        body = question.body() | {"logprobs": True, "top_logprobs": 2}
        headers = {"authorization": f"Bearer {self.key}"}
        url = f"{self.url}/v1/chat/completions"
        answer = (await self.http.post(url, json=body, headers=headers)).raise_for_status().json()
        found = []
        for token in answer["choices"][0]["logprobs"]["content"]:
            best = [item["logprob"] for item in token["top_logprobs"]]
            found.append((token["token"], best[0] - best[1]))
        return found


def _take(stream: Stream, value: dict[str, Any]) -> None:
    """Add one event. Anything that a client must not see becomes the stream's problem."""
    if "error" in value:
        stream.problem = json.dumps(value["error"])
        return
    if stream.usage_id and value["id"] != stream.usage_id:
        stream.problem = f"the id changed from {stream.usage_id} to {value['id']}"
    stream.usage_id = value["id"]
    if value.get("usage"):
        stream.input_tokens = value["usage"]["prompt_tokens"]
        stream.output_tokens = value["usage"]["completion_tokens"]
    for choice in value["choices"]:
        if stream.finish_reason is not None:
            stream.problem = f"after the end came {choice!r}"
        piece = choice["delta"].get("content") or ""
        stream.text += piece
        stream.num_pieces += bool(piece)
        stream.finish_reason = choice["finish_reason"]


def first_difference(one: str, other: str) -> int:
    """Return where two texts part, in characters."""
    pairs: Sequence[tuple[str, str]] = list(zip(one, other, strict=False))
    return next((at for at, (a, b) in enumerate(pairs) if a != b), len(pairs))
