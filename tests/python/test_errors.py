"""Failures as the package's own exception types, with words that a newcomer can act on."""

import json

import openai
import pytest

from conftest import API_KEY, BASE_URL, user


def create(client, **parameters):
    return client.chat.completions.create(**{"model": "auto", "messages": user("Hi"), "max_tokens": 4, **parameters})


def test_an_unknown_model(client):
    with pytest.raises(openai.NotFoundError) as caught:
        create(client, model="no-such-model")
    error = caught.value
    assert error.code == "model_not_found" and error.param == "model"
    assert "no-such-model" in error.message
    served = next(iter(client.models.list())).id
    assert served in error.message, "the message lists what is served"


@pytest.mark.parametrize(
    "parameters, param",
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "Hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"n": 0}, "n"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stop": ""}, "stop"),
        ({"extra_body": {"metadata": {"k": 1}}}, "metadata.k"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_request(client, parameters, param, stream):
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, stream=stream, **parameters)
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"


def test_a_prompt_longer_than_the_context(client, local_model):
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, model=local_model, messages=user("river " * 60_000))
    assert caught.value.code == "context_length_exceeded"


def test_a_body_beyond_the_limit(client):
    with pytest.raises(openai.APIStatusError) as caught:
        create(client, messages=user("x" * (11 << 20)))
    assert caught.value.status_code == 413
    assert caught.value.code == "request_too_large"


def test_what_is_no_json(raw):
    for body in (b"", b"{", b"[1, 2]", b'{"model": "auto", "messages": [}', b"\xff\xfe"):
        status, _, answer = raw("/chat/completions", body)
        assert status == 400, body
        assert set(answer["error"]) == {"message", "type", "param", "code"}
    _, _, answer = raw("/chat/completions", b'{"model": "auto",\n "messages": [}')
    assert "line 2 column" in answer["error"]["message"]


def test_u0000_is_text_like_any_other(client):
    assert create(client, messages=user("a\u0000b")).choices


def test_a_model_that_cannot(client, local_model):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, model=local_model, tools=[tool])
    assert "tools" in caught.value.message
    assert caught.value.response.headers["x-request-id"], "a decision was made, and can be looked up"


def test_paths_that_are_not(raw):
    status, _, answer = raw("/completions", json.dumps({"model": "auto", "prompt": "Hi"}).encode())
    assert status == 404 and answer["error"]["code"] == "unknown_url"


@pytest.mark.skipif(not API_KEY, reason="no key is configured (WEIR_API_KEY)")
def test_a_wrong_key():
    client = openai.OpenAI(base_url=BASE_URL, api_key="sk-wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError) as caught:
        create(client)
    assert caught.value.code == "invalid_api_key"
    with pytest.raises(openai.AuthenticationError):
        client.models.list()
