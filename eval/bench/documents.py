"""Time to the first token of prompts of many documents, through the gateway: computed in full, with all documents there, and
several at once.

    python3 eval/bench/documents.py http://127.0.0.1:8080 MODEL [--documents 8] [--words 190] [--turns 5] [--at-once 8] > out.json

The model must reuse documents (`weir models running` says so). Each prompt has its documents in a new order and a question of its own,
so nothing but documents is found again; the full computation is asked for by `weir: {exact: true}`, with a first line of its own, so that
it finds nothing. Medians over turns. Standard library only.
"""

import argparse
import http.client
import json
import random
import statistics
import sys
import threading
import time
import urllib.parse

WORDS = "harbour tide ledger salt captain winter signal lantern grain anchor quay storm barrel pilot market rope".split()


def document(number, words):
    draw = random.Random(number)
    return f"Record {number}. " + " ".join(draw.choice(WORDS) + str(draw.randrange(100)) for _ in range(words)) + "."


def ask(url, key, model, documents, question, exact, begun=None):
    """Seconds to the first text, and the usage."""
    content = [{"type": "text", "text": text, "weir": {"chunk": True}} for text in documents]
    content.append({"type": "text", "text": question})
    lead = question if exact else "Answer from the records."
    body = {
        "model": model, "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 4, "temperature": 0,
        "weir": {"exact": exact},
        "messages": [{"role": "user", "content": [{"type": "text", "text": lead}, *content]}],
    }
    place = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=900)
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    begun = begun or time.perf_counter()
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    answer = connection.getresponse()
    if answer.status != 200:
        sys.exit(answer.read().decode())
    first, usage = None, None
    for line in answer:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if first is None and event["choices"] and "content" in event["choices"][0]["delta"]:
            first = time.perf_counter() - begun
        usage = event.get("usage") or usage
    connection.close()
    return first, usage


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("model")
    parser.add_argument("--key", default="")
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--words", type=int, default=75)
    parser.add_argument("--pool", type=int, default=12)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--restarted", action="store_true", help="the first documents come from disk: one turn, of those only")
    args = parser.parse_args()
    pool = [document(number, args.words) for number in range(args.pool)]
    draw = random.Random(7)
    number = 0

    def one(exact):
        nonlocal number
        number += 1
        documents = draw.sample(pool, args.documents)
        return ask(args.url, args.key, args.model, documents, f"Question {number}: which is the best?", exact)

    def together(exact):
        """Seconds until all have their first text, and until each has."""
        nonlocal number
        begun, each = time.perf_counter(), []
        threads = []
        for _ in range(args.at_once):
            number += 1
            documents, question = draw.sample(pool, args.documents), f"Question {number}: which is the best?"
            call = lambda d=documents, q=question: each.append(ask(args.url, args.key, args.model, d, q, exact, begun)[0])
            threads.append(threading.Thread(target=call))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return max(each), statistics.median(each)

    if args.restarted:
        args.turns, args.at_once = 1, 0
    # All documents there.
    for start in range(0, 0 if args.restarted else args.pool, args.documents):
        ask(args.url, args.key, args.model, pool[start:start + args.documents], "Question 0", False)
    full, reused = [], []
    for _ in range(args.turns):
        reused.append(one(False))
        full.append(one(True))
    said = {"documents": args.documents, "turns": args.turns, "usage_full": full[-1][1], "usage_reused": reused[-1][1]}
    for name, runs in [("full", full), ("reused", reused)]:
        seconds = [first for first, _ in runs]
        said[name] = {"median_s": statistics.median(seconds), "least_s": min(seconds), "most_s": max(seconds)}
    said["times"] = said["full"]["median_s"] / said["reused"]["median_s"]
    if args.at_once:
        (last_full, mid_full), (last, mid) = together(True), together(False)
        said["at_once"] = {
            "requests": args.at_once, "full": {"last_s": last_full, "median_s": mid_full},
            "reused": {"last_s": last, "median_s": mid}, "times_last": last_full / last, "times_median": mid_full / mid,
        }
    print(json.dumps(said, indent=1))


main()
