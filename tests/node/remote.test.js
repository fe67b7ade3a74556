// Tools and response formats through a remote backend, untouched in both directions.

import assert from "node:assert/strict";
import { test } from "node:test";

import OpenAI from "openai";

import { REMOTE_MODEL as model, UPSTREAM_URL, client, textOf, user } from "./weir.js";

const skip = model ? false : "WEIR_REMOTE_MODEL is not set";
const tool = {
  type: "function",
  function: {
    name: "weather",
    description: "Weather of a place",
    parameters: { type: "object", properties: { text: { type: "string" } }, required: ["text"] },
  },
};
const create = (content, more = {}) => client.chat.completions.create({ model, messages: user(content), ...more });

test("tools", { skip }, async () => {
  const answer = await create("Rain in Bergen?", { tools: [tool], tool_choice: "auto" });
  const call = answer.choices[0].message.tool_calls[0];
  assert.equal(answer.choices[0].finish_reason, "tool_calls");
  assert.deepEqual(JSON.parse(call.function.arguments), { text: "Rain in Bergen?" });
  assert.deepEqual(answer.received.tools, [tool]);
});

test("tools in a stream", { skip }, async () => {
  const runner = client.chat.completions.stream({ model, messages: user("Rain?"), tools: [tool] });
  const final = await runner.finalChatCompletion();
  const call = final.choices[0].message.tool_calls[0];
  assert.equal(call.function.name, "weather");
  assert.deepEqual(JSON.parse(call.function.arguments), { text: "Rain?" });
});

test("a response format", { skip }, async () => {
  const schema = { type: "object", properties: { label: { type: "string" }, score: { type: "integer" } } };
  const response_format = { type: "json_schema", json_schema: { name: "verdict", strict: true, schema } };
  const answer = await create("fine", { response_format });
  assert.deepEqual(JSON.parse(answer.choices[0].message.content), { label: "fine", score: 42 });
  assert.deepEqual(answer.received.response_format, response_format);
});

test("unknown fields and a stream", { skip }, async () => {
  const chunks = [];
  for await (const chunk of await create("Hi there", { stream: true, unheard_of: [1, { a: null }] })) chunks.push(chunk);
  assert.deepEqual(chunks.find((chunk) => chunk.received).received.unheard_of, [1, { a: null }]);
  assert.equal(new Set(chunks.map((chunk) => chunk.id)).size, 1);
  assert.equal(await textOf(chunks), "You said: Hi there");
});

test("an upstream's 400 is the client's", { skip }, () =>
  assert.rejects(create("!400"), (error) => error instanceof OpenAI.BadRequestError && /on purpose/.test(error.message)));

test("a client that leaves is felt upstream", { skip }, async () => {
  const left = async () => (await (await fetch(UPSTREAM_URL + "/stats")).json()).left;
  const before = await left();
  const stream = await create("!slow", { stream: true });
  let seen = 0;
  for await (const _ of stream) if (++seen === 3) break;
  stream.controller.abort();
  for (let i = 0; i < 200; i++) {
    if ((await left()) > before) return;
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  assert.fail("the upstream still streams for a client that left");
});
