"""Where the weir under test is, and clients for it."""

import json
import os
import urllib.error
import urllib.request

import openai
import pytest

BASE_URL = os.environ.get("WEIR_BASE_URL", "http://127.0.0.1:8080/v1").rstrip("/")
API_KEY = os.environ.get("WEIR_API_KEY", "")
REMOTE_MODEL = os.environ.get("WEIR_REMOTE_MODEL", "")
UPSTREAM_URL = os.environ.get("WEIR_UPSTREAM_URL", "http://127.0.0.1:8090").rstrip("/")


@pytest.fixture(scope="session")
def client():
    return openai.OpenAI(base_url=BASE_URL, api_key=API_KEY or "none", max_retries=0, timeout=120)


@pytest.fixture(scope="session")
def local_model(client):
    """An in-process model: named by WEIR_LOCAL_MODEL, else the first model served that is neither remote nor the embedder."""
    named = os.environ.get("WEIR_LOCAL_MODEL")
    if named:
        return named
    for model in client.models.list():
        if model.model_extra.get("kind") == "model" and model.id != REMOTE_MODEL and "embed" not in model.id \
                and "bge" not in model.id:
            return model.id
    pytest.fail("no model is served that could be the local one; set WEIR_LOCAL_MODEL")


@pytest.fixture(scope="session")
def remote_model():
    if not REMOTE_MODEL:
        pytest.skip("WEIR_REMOTE_MODEL is not set")
    return REMOTE_MODEL


@pytest.fixture(scope="session")
def upstream_stats(remote_model):
    def stats():
        with urllib.request.urlopen(UPSTREAM_URL + "/stats", timeout=10) as response:
            return json.load(response)

    return stats


@pytest.fixture(scope="session")
def raw():
    """POST of exact bytes: (status, headers, parsed body)."""

    def post(path, body, headers=None):
        request = urllib.request.Request(BASE_URL + path, data=body, method="POST", headers=headers or {})
        request.add_header("content-type", "application/json")
        if API_KEY and not request.has_header("Authorization"):
            request.add_header("authorization", "Bearer " + API_KEY)
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return response.status, response.headers, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, error.headers, json.load(error)

    return post


def user(text):
    return [{"role": "user", "content": text}]
