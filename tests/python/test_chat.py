"""Chat on an in-process model: whole answers, streams, and every parameter that weir claims."""

import asyncio
import uuid
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from conftest import API_KEY, BASE_URL, user

STORY = "Tell me a story about a river."


def text_of(stream):
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


@pytest.fixture(scope="module")
def greedy(client, local_model):
    """Greedy answers: the same request gives the same text."""

    def ask(prompt=STORY, **parameters):
        parameters = {"max_tokens": 24, "temperature": 0, **parameters}
        return client.chat.completions.create(model=local_model, messages=user(prompt), **parameters)

    return ask


def test_auto_answers_and_says_who(client):
    response = client.chat.completions.with_raw_response.create(
        model="auto", messages=user("What is the capital of France?"), max_tokens=16
    )
    completion = response.parse()
    assert completion.object == "chat.completion"
    assert completion.id.startswith("chatcmpl-")
    decision = completion.id.removeprefix("chatcmpl-")
    assert uuid.UUID(decision).version == 7
    assert response.headers["x-request-id"] == decision
    assert response.headers["x-weir-policy"]
    assert response.headers["x-weir-arm"]
    assert response.headers["x-weir-model"] == completion.model != "auto"
    choice = completion.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content.strip()
    assert choice.finish_reason in ("stop", "length")
    usage = completion.usage
    assert usage.prompt_tokens > 0 and 0 < usage.completion_tokens <= 16
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens >= 0


def test_greedy_is_reproducible_and_stops_at_max_tokens(greedy, local_model):
    first, second = greedy(max_tokens=8), greedy(max_tokens=8)
    assert first.choices[0].message.content == second.choices[0].message.content
    assert first.choices[0].finish_reason == "length"
    assert first.usage.completion_tokens == 8
    assert first.model == local_model


def test_max_completion_tokens_wins(greedy):
    assert greedy(max_tokens=24, max_completion_tokens=5).usage.completion_tokens == 5


def test_content_as_parts(client, local_model, greedy):
    parts = [{"role": "user", "content": [{"type": "text", "text": STORY}]}]
    answer = client.chat.completions.create(model=local_model, messages=parts, max_tokens=24, temperature=0)
    assert answer.choices[0].message.content == greedy().choices[0].message.content


def test_a_conversation_is_read(client, local_model):
    def ask(*messages):
        answer = client.chat.completions.create(model=local_model, messages=list(messages), max_tokens=16, temperature=0)
        return answer.choices[0].message.content, answer.usage.prompt_tokens

    system = {"role": "system", "content": "You are a pirate. Answer in one short sentence."}
    question = {"role": "user", "content": "Who are you?"}
    plain, few = ask(question)
    pirate, more = ask(system, question)
    assert pirate != plain
    history = [question, {"role": "assistant", "content": pirate}, {"role": "user", "content": "And your ship?"}]
    _, most = ask(system, *history)
    assert most > more > 0 and few > 0


def test_sampling_follows_the_seed(greedy):
    def ask(seed):
        return greedy(temperature=1.0, seed=seed, max_tokens=32).choices[0].message.content

    first = ask(7)
    assert ask(7) == first
    assert any(ask(seed) != first for seed in (8, 9, 10))


def test_two_choices(greedy):
    answer = greedy(n=2, temperature=1.0, seed=1, max_tokens=24)
    assert [choice.index for choice in answer.choices] == [0, 1]
    texts = [choice.message.content for choice in answer.choices]
    assert all(texts)
    assert texts[0] != texts[1], "two draws of 24 tokens are alike only if they are one"
    assert answer.usage.completion_tokens > 24


def test_two_choices_in_a_stream(greedy):
    texts, finished = {0: "", 1: ""}, set()
    for chunk in greedy(n=2, temperature=1.0, seed=1, max_tokens=16, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                finished.add(choice.index)
    assert finished == {0, 1}
    assert texts[0] and texts[1] and texts[0] != texts[1]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings(greedy, stream):
    whole = greedy().choices[0].message.content
    # A stop string from the middle of the answer, which may begin and end inside tokens.
    stop = whole[len(whole) // 2 :][:3]
    expected = whole[: whole.index(stop)]
    if stream:
        chunks = list(greedy(stop=[stop, "\u0000never"], stream=True))
        assert text_of(chunks) == expected
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    else:
        answer = greedy(stop=stop)
        assert answer.choices[0].message.content == expected
        assert answer.choices[0].finish_reason == "stop"


def test_log_probabilities(greedy):
    answer = greedy(logprobs=True, top_logprobs=3)
    choice = answer.choices[0]
    tokens = choice.logprobs.content
    assert 0 <= answer.usage.completion_tokens - len(tokens) <= 1, "the end token may be counted and has no text"
    assert b"".join(bytes(token.bytes) for token in tokens).decode() == choice.message.content
    for token in tokens:
        assert token.logprob <= 0
        top = [alternative.logprob for alternative in token.top_logprobs]
        assert len(top) == 3 and top == sorted(top, reverse=True)
        # Greedy takes the likeliest.
        assert token.top_logprobs[0].token == token.token
        assert abs(token.top_logprobs[0].logprob - token.logprob) < 1e-4
    assert greedy().choices[0].logprobs is None


def test_log_probabilities_in_a_stream(greedy):
    whole = greedy(logprobs=True, top_logprobs=1).choices[0].logprobs.content
    streamed = []
    for chunk in greedy(logprobs=True, top_logprobs=1, stream=True):
        if chunk.choices and chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.content
    assert [token.token for token in streamed] == [token.token for token in whole]


def test_a_stream_is_the_whole_answer_in_pieces(greedy):
    chunks = list(greedy(stream=True))
    assert text_of(chunks) == greedy().choices[0].message.content
    assert len(chunks) > 3
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:])
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1 and chunks[0].id.startswith("chatcmpl-")
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons[-1] == "length" and set(reasons[:-1]) == {None}
    assert all(chunk.usage is None for chunk in chunks)


def test_usage_in_a_stream_where_asked(greedy):
    *chunks, last = greedy(stream=True, stream_options={"include_usage": True})
    assert last.choices == []
    assert last.usage.completion_tokens == 24
    assert last.usage.prompt_tokens == greedy().usage.prompt_tokens
    assert all(chunk.usage is None for chunk in chunks)


def test_text_of_all_scripts_survives(client, local_model):
    text = "Repeat: naïve Straße 東京 \U0001F600 \u0000 \t \" \\ </s> <|im_end|>"
    chunks = client.chat.completions.create(model=local_model, messages=user(text), max_tokens=24, stream=True, seed=1)
    text_of(chunks).encode("utf-8")


def test_a_client_may_leave(client, local_model):
    stream = client.chat.completions.create(model=local_model, messages=user(STORY), max_tokens=2000, stream=True)
    for _, _chunk in zip(range(3), stream):
        pass
    stream.close()
    # The place is free again: the next answer comes while the old one would still be under way.
    answer = client.with_options(timeout=30).chat.completions.create(
        model=local_model, messages=user("Hi"), max_tokens=4
    )
    assert answer.choices[0].message.content is not None


def test_eight_streams_at_once(client, local_model):
    def ask(seed):
        stream = client.chat.completions.create(
            model=local_model, messages=user(STORY), max_tokens=24, temperature=1.0, seed=seed, stream=True
        )
        return text_of(stream)

    alone = ask(0)
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, range(8)))
    assert all(together)
    assert len(set(together)) > 1
    assert alone  # Near ties may fall otherwise in a batch, so texts are not compared.


def test_the_async_client(local_model):
    async def run():
        async with openai.AsyncOpenAI(base_url=BASE_URL, api_key=API_KEY or "none", max_retries=0) as client:
            stream = await client.chat.completions.create(
                model=local_model, messages=user("Hi"), max_tokens=8, stream=True
            )
            return [chunk async for chunk in stream]

    assert text_of(asyncio.run(run())).strip()


def test_metadata_and_user_are_taken(client):
    answer = client.chat.completions.create(
        model="auto", messages=user("Hi"), max_tokens=4, user="someone", metadata={"session_id": "s-1", "team": "docs"}
    )
    assert answer.choices
