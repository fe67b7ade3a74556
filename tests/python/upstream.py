#!/usr/bin/env python3
"""A tiny OpenAI-like upstream for the client tests: deterministic, standard library only.

It answers with what it was sent, so that a test sees both directions at once: every answer carries the received body in
the unknown field `received`.

  - with `tools`: a call of the first tool, whose arguments hold the last user text as `text`
  - with `response_format` of type `json_schema`: the least value that fits the schema; of type `json_object`: {"said": …}
  - else the text `You said: …`
  - `!400`, `!429`, `!500` in the last user text: that error; `!slow`: one word every 20 ms, for ever
  - GET /stats: {"requests": n, "streams": n, "left": n}; `left` counts streams whose client went away

    upstream.py [--port 8090]      prints `listening on http://127.0.0.1:PORT` when it is
"""

import argparse
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

STATS = {"requests": 0, "streams": 0, "left": 0}
LOCK = threading.Lock()


def count(name):
    with LOCK:
        STATS[name] += 1


def last_user_text(body):
    for message in reversed(body.get("messages", [])):
        if message.get("role") == "user":
            content = message.get("content") or ""
            if isinstance(content, list):
                return "\n".join(part.get("text", "") for part in content if part.get("type") == "text")
            return content
    return ""


def instance(schema, text):
    """The least value that fits a JSON schema, with `text` for strings."""
    if "enum" in schema:
        return schema["enum"][0]
    if "const" in schema:
        return schema["const"]
    kind = schema.get("type")
    if kind == "object":
        return {name: instance(part, text) for name, part in schema.get("properties", {}).items()}
    if kind == "array":
        return [instance(schema.get("items", {}), text)]
    return {"integer": 42, "number": 4.5, "boolean": True, "null": None}.get(kind, text)


def answer(body):
    """(content, tool calls, finish reason) for a request."""
    text = last_user_text(body)
    if body.get("tools") and body.get("tool_choice") != "none":
        name = body["tools"][0]["function"]["name"]
        call = {"id": "call_1", "type": "function", "function": {"name": name, "arguments": json.dumps({"text": text})}}
        return None, [call], "tool_calls"
    form = body.get("response_format") or {}
    if form.get("type") == "json_schema":
        return json.dumps(instance(form["json_schema"]["schema"], text)), None, "stop"
    if form.get("type") == "json_object":
        return json.dumps({"said": text}), None, "stop"
    return "You said: " + text, None, "stop"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def send_json(self, status, value):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def send_failure(self, status, kind, code, message):
        self.send_json(status, {"error": {"message": message, "type": kind, "param": None, "code": code}})

    def do_GET(self):
        if self.path == "/stats":
            with LOCK:
                self.send_json(200, dict(STATS))
        elif self.path == "/v1/models":
            self.send_json(200, {"object": "list", "data": [{"id": "echo", "object": "model", "created": 0, "owned_by": "tests"}]})
        else:
            self.send_failure(404, "invalid_request_error", "unknown_url", "no such path")

    def do_POST(self):
        raw = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.path != "/v1/chat/completions":
            return self.send_failure(404, "invalid_request_error", "unknown_url", "no such path")
        count("requests")
        body = json.loads(raw)
        text = last_user_text(body)
        for status, kind in ((400, "invalid_request_error"), (429, "rate_limit_error"), (500, "server_error")):
            if "!%d" % status in text:
                return self.send_failure(status, kind, "on_purpose", "the upstream says %d on purpose" % status)
        content, calls, finish = answer(body)
        words = len(text.split())
        usage = {"prompt_tokens": words, "completion_tokens": 3, "total_tokens": words + 3}
        common = {"id": "chatcmpl-upstream", "created": int(time.time()), "model": body.get("model")}
        if not body.get("stream"):
            message = {"role": "assistant", "content": content}
            if calls:
                message["tool_calls"] = calls
            choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
            whole = {"object": "chat.completion", "choices": [choice], "usage": usage, "received": body}
            return self.send_json(200, {**common, **whole})
        self.stream(body, common, content, calls, finish, usage, "!slow" in text)

    def stream(self, body, common, content, calls, finish, usage, slow):
        count("streams")
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        self.close_connection = True

        def event(**fields):
            data = {**common, "object": "chat.completion.chunk", **fields}
            self.wfile.write(b"data: " + json.dumps(data).encode() + b"\n\n")
            self.wfile.flush()

        def delta(value, reason=None):
            return [{"index": 0, "delta": value, "logprobs": None, "finish_reason": reason}]

        try:
            event(choices=delta({"role": "assistant", "content": "" if content is not None else None}), received=body)
            if calls:
                # As OpenAI does: the name first, then the arguments in pieces.
                head = {"index": 0, "id": calls[0]["id"], "type": "function",
                        "function": {"name": calls[0]["function"]["name"], "arguments": ""}}
                event(choices=delta({"tool_calls": [head]}))
                arguments = calls[0]["function"]["arguments"]
                for i in range(0, len(arguments), 5):
                    piece = {"index": 0, "function": {"arguments": arguments[i : i + 5]}}
                    event(choices=delta({"tool_calls": [piece]}))
            while slow:
                event(choices=delta({"content": "word "}))
                time.sleep(0.02)
            for i in range(0, len(content or ""), 4):
                event(choices=delta({"content": content[i : i + 4]}))
            event(choices=delta({}, finish))
            if (body.get("stream_options") or {}).get("include_usage"):
                event(choices=[], usage=usage)
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            count("left")


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


def main():
    parser = argparse.ArgumentParser(description="A tiny OpenAI-like upstream for tests.")
    parser.add_argument("--port", type=int, default=8090, help="0 takes a free one")
    server = Server(("127.0.0.1", parser.parse_args().port), Handler)
    print("listening on http://127.0.0.1:%d" % server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
