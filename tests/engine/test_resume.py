"""A request that goes on from another replica's tokens ends like one that was never disturbed."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxn.engine.client import error_of
from mxn.engine.config import EngineConfig
from mxn.engine.echo import EchoEngine
from mxn.engine.local import LocalEngine
from mxn.engine.protocol import Cancel, Failed, Generate, SamplingParams
from mxn.errors import EngineDiedError, UserError
from mxn.serve.fleet import Replica
from mxn.serve.pooled import PooledClient
from support import tiny
from support.server import write_tokenizer

PROMPT = [5, 9, 40, 41, 42, 17, 80, 33, 21, 64, 90, 91, 12, 13, 14, 15, 16, 18, 19, 20]
WAYS = {
    "greedy": SamplingParams(temperature=0, max_tokens=24),
    "seeded": SamplingParams(temperature=1.2, seed=7, max_tokens=24),
    "penalties": SamplingParams(
        temperature=0, max_tokens=24, frequency_penalty=1.5, presence_penalty=0.5,
        repetition_penalty=1.3,
    ),
    "filters": SamplingParams(temperature=1.0, seed=3, top_k=20, top_p=0.9, max_tokens=24),
    "min_tokens": SamplingParams(temperature=1.5, seed=11, min_tokens=20, max_tokens=24),
    "logprobs": SamplingParams(temperature=0, logprobs=2, max_tokens=24),
}  # fmt: skip


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.write("qwen3", folder)
    write_tokenizer(folder, tiny.VOCAB)
    config = EngineConfig(model=str(folder), device="cpu:0", dtype="float32", threads=1)
    return InProcess(LocalEngine.load(config).core)


class InProcess:
    """An engine's loop as an `EngineClient`, one request at a time."""

    is_healthy = True

    def __init__(self, core):
        self.core = core
        self.info = core.info

    async def generate(self, request):
        replies = self.core.handle(request)
        try:
            while True:
                for reply in replies:
                    if isinstance(reply, Failed):
                        raise error_of(reply)
                    if reply.request_id == request.request_id:
                        yield reply
                        if reply.finish_reason is not None:
                            return
                await asyncio.sleep(0)
                replies = self.core.step()
        finally:
            self.core.handle(Cancel(request_id=request.request_id))

    async def stats(self):
        return self.core.stats()

    async def close(self):
        pass


async def collect(engine, request):
    return [delta async for delta in engine.generate(request)]


def run(engine, request):
    return asyncio.run(collect(engine, request))


def joined(deltas):
    ids = [token for delta in deltas for token in delta.token_ids]
    return ids, "".join(delta.text for delta in deltas), deltas[-1]


def request(sampling, resume=(), name="r"):
    return Generate(request_id=name, prompt_ids=PROMPT, sampling=sampling, resume_ids=list(resume))


@pytest.mark.parametrize("way", WAYS)
def test_every_cut_gives_the_same_answer(engine, way):
    ids, text, last = joined(run(engine, request(WAYS[way])))
    assert len(ids) > 4
    for cut in range(1, len(ids) + 1):
        again, all_text, end = joined(run(engine, request(WAYS[way], ids[:cut])))
        assert again == ids[cut:], cut
        assert all_text == text, cut
        assert end.finish_reason == last.finish_reason
        assert end.stop_reason == last.stop_reason
        assert end.completion_tokens == last.completion_tokens
        assert end.prompt_tokens == len(PROMPT)
        assert end.cached_tokens <= len(PROMPT)


def test_a_stop_string_over_the_seam_stops(engine):
    ids, text, _ = joined(run(engine, request(WAYS["greedy"])))
    for at in range(2, min(len(text) - 2, 20)):
        sampling = SamplingParams(temperature=0, max_tokens=24, stop=(text[at : at + 3],))
        whole, stopped, last = joined(run(engine, request(sampling)))
        for cut in range(1, len(whole) + 1):
            again, all_text, end = joined(run(engine, request(sampling, ids[:cut])))
            assert (ids[:cut] + again)[: len(whole)] == whole
            assert all_text == stopped
            assert end.stop_reason == last.stop_reason


def test_text_is_released_as_if_never_disturbed(engine):
    """What a client had got after k tokens is a beginning of what a resumed run says first."""
    deltas = run(engine, request(WAYS["seeded"]))
    sent, ids = "", []
    for delta in deltas[:-1]:
        sent += delta.text
        ids += delta.token_ids
        first = run(engine, request(WAYS["seeded"], ids))[0]
        assert first.text.startswith(sent)


def test_what_had_ended_already_ends_at_once(engine):
    ids, text, _ = joined(run(engine, request(WAYS["greedy"])))
    deltas = run(engine, request(WAYS["greedy"], ids))
    assert len(deltas) == 1
    assert deltas[0].token_ids == []
    assert deltas[0].text == text
    assert deltas[0].finish_reason == "length"
    stats = asyncio.run(engine.stats())
    assert stats.num_running == 0
    assert stats.kv_pages_used == 0


def test_ids_that_do_not_exist_are_refused(engine):
    with pytest.raises(UserError, match="resume"):
        run(engine, request(WAYS["greedy"], [9999]))


def test_time_on_the_device_is_shared(engine):
    last = run(engine, request(WAYS["greedy"]))[-1]
    assert 0 < last.device_s < 10


@settings(max_examples=40, deadline=None)
@given(
    cut=st.integers(0, 30), seed=st.integers(0, 100), stop=st.sampled_from([(), ("lo",), ("x",)])
)
def test_the_echo_resumes_too(cut, seed, stop):
    engine = EchoEngine()
    prompt = list(b"hello w\xc3\xb6rld \xf0\x9f\x98\x80!")
    sampling = SamplingParams(temperature=1.0, seed=seed, max_tokens=25, stop=stop)
    asked = Generate(request_id="e", prompt_ids=prompt, sampling=sampling)
    ids, text, last = joined(run(engine, asked))
    cut = min(cut, len(ids))
    resumed = Generate(request_id="e", prompt_ids=prompt, sampling=sampling, resume_ids=ids[:cut])
    again, all_text, end = joined(run(engine, resumed))
    assert again == ids[cut:]
    assert all_text == text
    assert end.finish_reason == last.finish_reason


class Dying:
    """Passes an engine's deltas on and dies after some of them."""

    def __init__(self, engine, after):
        self._engine, self._after = engine, after
        self.is_healthy = True
        self.info = engine.info

    async def generate(self, request):
        count = 0
        async with aclosing(self._engine.generate(request)) as deltas:
            async for delta in deltas:
                if count == self._after:
                    self.is_healthy = False
                    raise EngineDiedError("killed by the test")
                count += 1
                yield delta

    async def stats(self):
        return await self._engine.stats()

    async def close(self):
        pass


@pytest.mark.parametrize("way", ["greedy", "seeded"])
def test_a_pool_goes_on_without_a_seam(engine, way):
    ids, text, last = joined(run(engine, request(WAYS[way])))

    async def pooled(after):
        pool = PooledClient(
            [
                Replica(id="a", client=Dying(engine, after)),
                Replica(id="b", client=Dying(engine, 10_000)),
            ]
        )
        deltas = await collect(pool, request(WAYS[way], name=f"p{after}"))
        return deltas

    for after in range(len(ids)):
        again, all_text, end = joined(asyncio.run(pooled(after)))
        assert again == ids
        assert all_text == text
        assert end.completion_tokens == last.completion_tokens
