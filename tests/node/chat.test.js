// Chat on an in-process model: whole answers, streams, parameters.

import assert from "node:assert/strict";
import { before, test } from "node:test";

import { client, localModel, textOf, user } from "./weir.js";

const STORY = "Tell me a story about a river.";
let model;
before(async () => {
  model = await localModel();
});

const greedy = (more = {}) =>
  client.chat.completions.create({ model, messages: user(STORY), max_tokens: 24, temperature: 0, ...more });

test("auto answers and says who", async () => {
  const { data, response } = await client.chat.completions
    .create({ model: "auto", messages: user("What is the capital of France?"), max_tokens: 16 })
    .withResponse();
  assert.equal(data.id, "chatcmpl-" + response.headers.get("x-request-id"));
  assert.equal(data.model, response.headers.get("x-weir-model"));
  assert.notEqual(data.model, "auto");
  assert.ok(data.choices[0].message.content.trim());
  assert.equal(data.usage.total_tokens, data.usage.prompt_tokens + data.usage.completion_tokens);
});

test("a stream is the whole answer in pieces", async () => {
  const whole = await greedy();
  const chunks = [];
  for await (const chunk of await greedy({ stream: true })) chunks.push(chunk);
  assert.equal(chunks.map((c) => c.choices[0].delta.content ?? "").join(""), whole.choices[0].message.content);
  assert.equal(chunks[0].choices[0].delta.role, "assistant");
  assert.equal(chunks.at(-1).choices[0].finish_reason, "length");
  assert.equal(new Set(chunks.map((c) => c.id)).size, 1);
  assert.ok(chunks.every((c) => !c.usage));
});

test("usage in a stream where asked", async () => {
  const chunks = [];
  for await (const chunk of await greedy({ stream: true, stream_options: { include_usage: true } })) chunks.push(chunk);
  assert.deepEqual(chunks.at(-1).choices, []);
  assert.equal(chunks.at(-1).usage.completion_tokens, 24);
});

test("the package's stream helper", async () => {
  const runner = client.chat.completions.stream({ model, messages: user(STORY), max_tokens: 12, temperature: 0 });
  let text = "";
  runner.on("content", (delta) => (text += delta));
  const final = await runner.finalChatCompletion();
  assert.equal(final.choices[0].message.content, text);
  assert.equal(final.choices[0].finish_reason, "length");
});

test("sampling follows the seed", async () => {
  const ask = async (seed) => (await greedy({ temperature: 1, seed, max_tokens: 32 })).choices[0].message.content;
  const first = await ask(7);
  assert.equal(await ask(7), first);
  const others = [await ask(8), await ask(9), await ask(10)];
  assert.ok(others.some((text) => text !== first));
});

test("two choices", async () => {
  const answer = await greedy({ n: 2, temperature: 1, seed: 1 });
  assert.deepEqual(answer.choices.map((c) => c.index), [0, 1]);
  assert.notEqual(answer.choices[0].message.content, answer.choices[1].message.content);
});

test("stop strings", async () => {
  const whole = (await greedy()).choices[0].message.content;
  const stop = whole.slice(whole.length / 2, whole.length / 2 + 3);
  const expected = whole.slice(0, whole.indexOf(stop));
  const answer = await greedy({ stop });
  assert.equal(answer.choices[0].message.content, expected);
  assert.equal(answer.choices[0].finish_reason, "stop");
  assert.equal(await textOf(await greedy({ stop: [stop], stream: true })), expected);
});

test("log-probabilities", async () => {
  const { choices } = await greedy({ logprobs: true, top_logprobs: 2 });
  const tokens = choices[0].logprobs.content;
  const bytes = Buffer.from(tokens.flatMap((token) => token.bytes));
  assert.equal(bytes.toString("utf8"), choices[0].message.content);
  assert.ok(tokens.every((token) => token.logprob <= 0 && token.top_logprobs.length === 2));
});

test("a client may leave", async () => {
  const stream = await greedy({ stream: true, max_tokens: 2000 });
  let seen = 0;
  for await (const _ of stream) if (++seen === 3) break;
  stream.controller.abort();
  const answer = await client.chat.completions.create(
    { model, messages: user("Hi"), max_tokens: 4 },
    { timeout: 30_000 },
  );
  assert.ok(answer.choices.length === 1);
});

test("several streams at once", async () => {
  const ask = async (seed) => textOf(await greedy({ stream: true, temperature: 1, seed }));
  const texts = await Promise.all([1, 2, 3, 4].map(ask));
  assert.ok(texts.every(Boolean));
});
