"""Tools, response formats and unknown fields through a remote backend, untouched in both directions."""

import json
import time

import openai
import pydantic
import pytest

from conftest import user

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a place",
        "parameters": {
            "type": "object",
            "properties": {"text": {"type": "string"}, "unit": {"enum": ["C", "F"]}},
            "required": ["text"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}


def create(client, model, text="Hi there", **parameters):
    return client.chat.completions.create(model=model, messages=user(text), **parameters)


def test_an_answer_passes(client, remote_model):
    response = client.chat.completions.with_raw_response.create(model=remote_model, messages=user("Hi there"))
    answer = response.parse()
    assert answer.choices[0].message.content == "You said: Hi there"
    assert answer.id == "chatcmpl-" + response.headers["x-request-id"], "the id is the decision's"
    assert answer.usage.prompt_tokens == 2


def test_unknown_fields_arrive(client, remote_model):
    extra = {"unheard_of": {"deep": [1, 2.5, None]}, "logit_bias": {"5": -100}, "service_tier": "flex"}
    answer = create(client, remote_model, extra_body=extra, presence_penalty=0.25)
    received = answer.model_extra["received"]
    assert {key: received[key] for key in extra} == extra
    assert received["presence_penalty"] == 0.25


def test_tools(client, remote_model):
    answer = create(client, remote_model, "Rain in Bergen?", tools=[TOOL], tool_choice="auto", parallel_tool_calls=False)
    assert answer.choices[0].finish_reason == "tool_calls"
    call = answer.choices[0].message.tool_calls[0]
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments) == {"text": "Rain in Bergen?"}
    received = answer.model_extra["received"]
    assert received["tools"] == [TOOL]
    assert received["tool_choice"] == "auto" and received["parallel_tool_calls"] is False

    # The second half of the round: the call and its result go back.
    messages = user("Rain in Bergen?") + [
        {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "yes"},
    ]
    answer = client.chat.completions.create(model=remote_model, messages=messages)
    sent = answer.model_extra["received"]["messages"]
    assert sent[2] == messages[2] and sent[1]["tool_calls"][0]["function"]["name"] == "weather"


def test_tools_in_a_stream(client, remote_model):
    name, arguments, reason = "", "", None
    for chunk in create(client, remote_model, "Rain?", tools=[TOOL], stream=True):
        choice = chunk.choices[0]
        for call in choice.delta.tool_calls or []:
            name += call.function.name or ""
            arguments += call.function.arguments or ""
        reason = choice.finish_reason or reason
    assert (name, json.loads(arguments), reason) == ("weather", {"text": "Rain?"}, "tool_calls")


def test_tools_route_to_who_can(client, remote_model):
    """`auto` leaves out arms that cannot; where no arm of its policy can, it says so."""
    try:
        answer = create(client, "auto", "Rain?", tools=[TOOL])
    except openai.BadRequestError as error:
        assert error.code == "unsupported_by_models" and "tools" in error.message
    else:
        assert answer.choices[0].message.tool_calls


class Verdict(pydantic.BaseModel):
    label: str
    score: int


def test_structured_output(client, remote_model):
    answer = client.chat.completions.parse(model=remote_model, messages=user("fine"), response_format=Verdict)
    assert answer.choices[0].message.parsed == Verdict(label="fine", score=42)
    schema = answer.model_extra["received"]["response_format"]
    assert schema["type"] == "json_schema" and schema["json_schema"]["strict"] is True
    assert list(schema["json_schema"]["schema"]["properties"]) == ["label", "score"], "order is kept"


def test_json_object(client, remote_model):
    answer = create(client, remote_model, "fine", response_format={"type": "json_object"})
    assert json.loads(answer.choices[0].message.content) == {"said": "fine"}


def test_images_arrive(client, remote_model):
    parts = [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "low"}},
    ]
    answer = client.chat.completions.create(model=remote_model, messages=[{"role": "user", "content": parts}])
    assert answer.model_extra["received"]["messages"][0]["content"] == parts


def test_a_stream_with_usage(client, remote_model):
    chunks = list(create(client, remote_model, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "You said: Hi there"
    assert len({chunk.id for chunk in chunks}) == 1
    with_usage = [chunk.usage for chunk in chunks if chunk.usage]
    assert len(with_usage) == 1 and with_usage[0].completion_tokens == 3
    assert not any(chunk.usage for chunk in create(client, remote_model, stream=True)), "not unless asked"


def test_an_upstreams_400_is_the_clients(client, remote_model):
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            create(client, remote_model, "!400", stream=stream)
        assert "on purpose" in caught.value.message


def test_a_client_that_leaves_is_felt_upstream(client, remote_model, upstream_stats):
    before = upstream_stats()["left"]
    stream = create(client, remote_model, "!slow", stream=True)
    for _, _chunk in zip(range(3), stream):
        pass
    stream.close()
    for _ in range(200):
        if upstream_stats()["left"] > before:
            return
        time.sleep(0.05)
    pytest.fail("the upstream still streams for a client that left")
