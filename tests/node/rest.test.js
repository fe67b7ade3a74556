// Errors as the package's own types, models, embeddings, decisions, feedback.

import assert from "node:assert/strict";
import { test } from "node:test";

import OpenAI from "openai";

import { API_KEY, BASE_URL, client, user } from "./weir.js";

const create = (more = {}) => client.chat.completions.create({ model: "auto", messages: user("Hi"), max_tokens: 4, ...more });

async function rejects(promise, type, check) {
  await assert.rejects(promise, (error) => {
    assert.ok(error instanceof type, `${error.constructor.name}: ${error.message}`);
    check?.(error);
    return true;
  });
}

test("an unknown model", () =>
  rejects(create({ model: "no-such-model" }), OpenAI.NotFoundError, (error) => {
    assert.equal(error.code, "model_not_found");
    assert.equal(error.param, "model");
    assert.match(error.message, /no-such-model/);
  }));

const bad = {
  messages: [{ messages: [] }, "messages"],
  role: [{ messages: [{ role: "robot", content: "Hi" }] }, "messages[0].role"],
  content: [{ messages: [{ role: "user", content: 5 }] }, "messages[0].content"],
  max_tokens: [{ max_tokens: -1 }, "max_tokens"],
  temperature: [{ temperature: 3 }, "temperature"],
  "a stream's": [{ n: 0, stream: true }, "n"],
};
for (const [name, [parameters, param]] of Object.entries(bad)) {
  test(`a bad request: ${name}`, () =>
    rejects(create(parameters), OpenAI.BadRequestError, (error) => {
      assert.equal(error.param, param);
      assert.equal(error.type, "invalid_request_error");
    }));
}

test("a body beyond the limit", () =>
  rejects(create({ messages: user("x".repeat(11 << 20)) }), OpenAI.APIError, (error) => {
    assert.equal(error.status, 413);
  }));

test("a wrong key", { skip: API_KEY ? false : "no key is configured (WEIR_API_KEY)" }, () => {
  const stranger = new OpenAI({ baseURL: BASE_URL, apiKey: "sk-wrong", maxRetries: 0 });
  return rejects(stranger.models.list(), OpenAI.AuthenticationError, (error) => {
    assert.equal(error.code, "invalid_api_key");
  });
});

test("models", async () => {
  const models = [];
  for await (const model of client.models.list()) models.push(model);
  assert.ok(models.some((model) => model.kind === "policy") && models.some((model) => model.kind === "model"));
  assert.deepEqual(await client.models.retrieve(models[0].id), models[0]);
  await rejects(client.models.retrieve("no-such-model"), OpenAI.NotFoundError);
});

test("embeddings", async (t) => {
  let answer;
  try {
    answer = await client.embeddings.create({ model: "auto", input: ["a river", "a stream", "tax law"] });
  } catch (error) {
    if (error.code === "no_embedder") return t.skip("no embedder is loaded");
    throw error;
  }
  const [river, stream, law] = answer.data.map((item) => item.embedding);
  const dot = (a, b) => a.reduce((sum, x, i) => sum + x * b[i], 0);
  assert.ok(Math.abs(dot(river, river) - 1) < 1e-3);
  assert.ok(dot(river, stream) > dot(river, law));
  const plain = await client.embeddings.create({ model: "auto", input: "a river", encoding_format: "float" });
  assert.ok(dot(plain.data[0].embedding, river) > 0.98);
});

test("a decision without an answer", async () => {
  const decision = await client.post("/decision", { body: { model: "auto", messages: user("Hi") } });
  assert.ok(decision.id && decision.decision.arm);
});

test("feedback", async () => {
  const { id } = await create();
  const body = { id, value: true, idempotency_key: "k-" + id };
  assert.equal((await client.post("/feedback", { body })).recorded, true);
  assert.equal((await client.post("/feedback", { body })).recorded, false);
  await rejects(client.post("/feedback", { body: { id, value: "good" } }), OpenAI.BadRequestError);
});
