"""Models, embeddings, decisions, feedback, and the record."""

import math
import uuid

import openai
import pytest

from conftest import user


def test_models(client):
    models = list(client.models.list())
    assert all(model.object == "model" and model.id and model.owned_by for model in models)
    kinds = {model.model_extra["kind"] for model in models}
    assert {"policy", "model"} <= kinds
    for model in models:
        assert client.models.retrieve(model.id) == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("no-such-model")


def embed(client, texts, **parameters):
    try:
        return client.embeddings.create(model="auto", input=texts, **parameters)
    except openai.InternalServerError as error:
        if error.code == "no_embedder":
            pytest.skip("no embedder is loaded")
        raise


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def test_embeddings(client):
    texts = ["How do I get my money back?", "I would like a refund.", "The cat sat on the mat."]
    answer = embed(client, texts)
    assert [item.index for item in answer.data] == [0, 1, 2]
    refund, same, cat = (item.embedding for item in answer.data)
    assert len(refund) == len(same) == len(cat) > 64
    assert math.isclose(sum(x * x for x in refund), 1.0, rel_tol=1e-3), "unit vectors"
    assert cosine(refund, same) > cosine(refund, cat) + 0.05, "meaning, not noise"
    assert answer.usage.prompt_tokens > 10 and answer.usage.total_tokens == answer.usage.prompt_tokens


def test_embeddings_are_the_same_in_both_formats(client):
    # The package asks for base64 by default, and decodes it.
    packed = embed(client, "a river").data[0].embedding
    plain = embed(client, "a river", encoding_format="float").data[0].embedding
    assert packed == pytest.approx(plain, abs=1e-6)


def test_bad_embedding_requests(client):
    for value, param in (([], "input"), ([""], "input[0]"), ([[1, 2]], "input[0]")):
        with pytest.raises(openai.BadRequestError) as caught:
            client.embeddings.create(model="auto", input=value)
        assert caught.value.param == param
    embed(client, "a river")
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model="auto", input="a river", dimensions=7)
    assert caught.value.param == "dimensions"


def test_a_decision_without_an_answer(client):
    decision = client.post("/decision", cast_to=object, body={"model": "auto", "messages": user("Hi")})
    assert uuid.UUID(decision["id"])
    assert decision["decision"]["arm"]
    total = sum(candidate["propensity"] for candidate in decision["decision"].get("candidates", []))
    assert total == pytest.approx(1.0) or total == 0
    assert "Hi" not in str(decision["context"]), "a context holds no prompt"


def test_feedback_and_the_record(client):
    answer = client.chat.completions.create(model="auto", messages=user("Hi"), max_tokens=4)
    body = {"id": answer.id, "value": 1, "idempotency_key": uuid.uuid4().hex}
    decision = answer.id.removeprefix("chatcmpl-")
    assert client.post("/feedback", cast_to=object, body=body) == {"id": decision, "recorded": True}
    assert client.post("/feedback", cast_to=object, body=body) == {"id": decision, "recorded": False}
    with pytest.raises(openai.BadRequestError):
        client.post("/feedback", cast_to=object, body={"id": answer.id, "value": "good"})
    with pytest.raises(openai.NotFoundError):
        client.post("/feedback", cast_to=object, body={"id": str(uuid.uuid4()), "value": True})

    try:
        listed = client.get("/audit/decisions", cast_to=object, options={"params": {"limit": 5}})
    except openai.PermissionDeniedError:
        pytest.skip("the key is not an administrator's")
    assert listed["object"] == "list" and len(listed["data"]) >= 1
    # The store follows the log; the id is there as soon as it has caught up.
    for _ in range(100):
        try:
            view = client.get("/audit/decisions/" + answer.id, cast_to=object)
            break
        except openai.NotFoundError:
            import time

            time.sleep(0.05)
    else:
        pytest.fail("the decision never reached the store")
    assert decision in str(view)
