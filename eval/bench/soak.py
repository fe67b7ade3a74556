"""Mixed traffic through the gateway with too few blocks: answers, memory and counters, recorded.

    python3 eval/bench/soak.py target/release/weir MODEL.gguf --minutes 30 --out DIR

Each of some sixty requests is first answered alone by a quiet weir. Then many clients at once ask a weir whose cache holds one
context (constant eviction and preemption); a fifth of them leave in the middle. A second model is loaded and unloaded all the
while, and asked by some. Every whole answer must be the quiet one's, text and all. Memory is sampled, and its slope over the second half printed.
"""

import argparse
import http.client
import json
import os
import pathlib
import random
import re
import subprocess
import tempfile
import threading
import time

parser = argparse.ArgumentParser()
parser.add_argument("weir")
parser.add_argument("model", type=pathlib.Path)
parser.add_argument("--minutes", type=float, default=30)
parser.add_argument("--clients", type=int, default=24)
parser.add_argument("--out", type=pathlib.Path, required=True)
args = parser.parse_args()

WORDS = "river stone lantern orchard copper window garden winter engine paper bridge silver harbour kitchen valley".split()


def text(rng, words):
    return " ".join(rng.choice(WORDS) for _ in range(words))


def requests():
    rng = random.Random(7)
    systems = [text(rng, 250) for _ in range(3)]
    out = []
    for i in range(60):
        messages = [{"role": "system", "content": systems[i % 3]}] if i % 4 else []
        messages.append({"role": "user", "content": f"Question {i}. " + text(rng, rng.choice([20, 20, 200, 900]))})
        out.append({"model": "m", "messages": messages, "max_tokens": rng.choice([16, 200, 700]), "n": 1 + (i % 9 == 0),
                    "temperature": 0.0 if i % 2 else 0.9, "seed": i})
    return out


def serve(port, local, top=None):
    folder = pathlib.Path(tempfile.mkdtemp())
    names = "models:\n  m: {name: m}\n  guest: {name: guest}\n"
    (folder / "p.yaml").write_text(f"policy: p\n{names}select:\n  arms: [m]\n  static: {{m: 1}}\n")
    entry = json.dumps({"model": str(args.model), **local})
    # Two thousand tokens are the longest prompt and its answer, and all that a model is promised.
    fleet = "".join(f"  - name: {name}\n    context: 2048\n    local: {entry}\n" for name in ["m", "guest"])
    (folder / "weir.yaml").write_text(f"fleet:\n{fleet}policies: [{folder}/p.yaml]\n" + (top or ""))
    log = open(args.out / f"weir-{port}.log", "w")
    command = [args.weir, "serve", "--config", folder / "weir.yaml", "--listen", f"127.0.0.1:{port}", "--data-dir", folder / "data"]
    process = subprocess.Popen(command, stdout=log, stderr=log)
    for _ in range(240):
        assert process.poll() is None, f"weir did not start: see {log.name}"
        try:
            call(port, "GET", "/healthz")
            return process
        except OSError:
            time.sleep(0.5)
    raise SystemExit("weir did not answer")


def call(port, method, path, body=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request(method, path, json.dumps(body) if body else None, {"content-type": "application/json"})
    response = connection.getresponse()
    data = response.read().decode()
    connection.close()
    return response.status, data


def ask(port, body):
    status, data = call(port, "POST", "/v1/chat/completions", body)
    if status != 200:
        return status, data
    return status, [(c["message"]["content"], c["finish_reason"]) for c in json.loads(data)["choices"]]


def leave(port, body, rng):
    """Takes some bytes of a stream, and goes."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request("POST", "/v1/chat/completions", json.dumps({**body, "stream": True}), {"content-type": "application/json"})
    connection.getresponse().read(rng.choice([1, 400, 2000]))
    connection.close()


def memory(process):
    return int(re.search(r"VmRSS:\s+(\d+)", open(f"/proc/{process.pid}/status").read()).group(1)) / 1024


args.out.mkdir(parents=True, exist_ok=True)
bodies = requests()
quiet = serve(18201, {"max_sequences": 2, "prompt_lookup": 0})
want = [ask(18201, body) for body in bodies]
assert all(status == 200 for status, _ in want), want
quiet.terminate()
process = serve(18202, {"max_sequences": 16}, "kv_cache_mib: 1\n")
end = time.time() + 60 * args.minutes
totals, wrong, lock = {"whole": 0, "of_guest": 0, "guest_away": 0, "left": 0, "busy": 0}, [], threading.Lock()
turns = []


def come_and_go():
    """The guest is there for some seconds, and away for some."""
    rng = random.Random(1)
    while time.time() < end:
        for loaded in (False, True):
            time.sleep(rng.uniform(2, 8))
            status, data = call(18202, "PUT", "/v1/fleet/guest", {"loaded": loaded})
            assert status == 200 and json.loads(data)["loaded"] == loaded, data
            turns.append(loaded)


def client(seed):
    rng = random.Random(seed)
    while time.time() < end:
        i = rng.randrange(len(bodies))
        if rng.random() < 0.2:
            leave(18202, bodies[i], rng)
            kind = "left"
        else:
            guest = rng.random() < 0.15
            got = ask(18202, {**bodies[i], "model": "guest"} if guest else bodies[i])
            away = guest and got[0] != 200 and "guest" in got[1]
            kind = "guest_away" if away else "busy" if got[0] in (429, 503) else "of_guest" if guest else "whole"
            if kind in ("whole", "of_guest") and got != want[i]:
                with lock:
                    wrong.append({"request": i, "want": want[i], "got": got})
        with lock:
            totals[kind] += 1


threads = [threading.Thread(target=client, args=(seed,)) for seed in range(args.clients)]
threads.append(threading.Thread(target=come_and_go))
for thread in threads:
    thread.start()
samples = []
begun = time.time()
while any(thread.is_alive() for thread in threads):
    samples.append((round(time.time() - begun, 1), round(memory(process), 1)))
    time.sleep(2)
for thread in threads:
    thread.join()
metrics = [line for line in call(18202, "GET", "/metrics")[1].splitlines() if line.startswith("weir_engine_")]
process.terminate()
half = [s for s in samples if s[0] > samples[-1][0] / 2]
mean_t, mean_m = (sum(s[i] for s in half) / len(half) for i in (0, 1))
slope = sum((t - mean_t) * (m - mean_m) for t, m in half) / sum((t - mean_t) ** 2 for t, _ in half)
report = {"minutes": args.minutes, "clients": args.clients, **totals, "wrong": len(wrong), "loaded_and_unloaded": len(turns), "slope_mib_per_hour": round(3600 * slope, 1),
          "memory_mib": [min(m for _, m in half), max(m for _, m in half)], "metrics": metrics}
(args.out / "soak.json").write_text(json.dumps({**report, "samples": samples, "wrongs": wrong[:5]}, indent=1))
print(json.dumps(report, indent=1))
raise SystemExit(bool(wrong))
