// Where the weir under test is, and clients for it.

import OpenAI from "openai";

export const BASE_URL = (process.env.WEIR_BASE_URL || "http://127.0.0.1:8080/v1").replace(/\/$/, "");
export const API_KEY = process.env.WEIR_API_KEY || "";
export const REMOTE_MODEL = process.env.WEIR_REMOTE_MODEL || "";
export const UPSTREAM_URL = (process.env.WEIR_UPSTREAM_URL || "http://127.0.0.1:8090").replace(/\/$/, "");

export const client = new OpenAI({ baseURL: BASE_URL, apiKey: API_KEY || "none", maxRetries: 0, timeout: 120_000 });

export const user = (content) => [{ role: "user", content }];

/// An in-process model: named by WEIR_LOCAL_MODEL, else the first model served that is neither remote nor the embedder.
export async function localModel() {
  if (process.env.WEIR_LOCAL_MODEL) return process.env.WEIR_LOCAL_MODEL;
  for await (const model of client.models.list()) {
    if (model.kind === "model" && model.id !== REMOTE_MODEL && !/embed|bge/.test(model.id)) return model.id;
  }
  throw new Error("no model is served that could be the local one; set WEIR_LOCAL_MODEL");
}

/// All text of a stream.
export async function textOf(stream) {
  let text = "";
  for await (const chunk of stream) text += chunk.choices[0]?.delta?.content ?? "";
  return text;
}
