"""A model that a running weir serves in its process, beside PyTorch's `transformers` on the same GGUF file: greedy tokens and the three
best log-probabilities of each.

    python3 -m venv V && V/bin/pip install torch transformers accelerate gguf sentencepiece
    weir serve --config FILE &             # one policy whose only model is GGUF
    V/bin/python eval/bench/beside_transformers.py GGUF [--url http://127.0.0.1:8080] [--tokens 6]

The prompt is rendered as ChatML, which weir takes where a file has no template of its own, and holds runs of white space. Prints one
line per token and the greatest distance; exit code 1 when a token differs.
"""

import argparse
import json
import pathlib
import sys
import urllib.request

import torch
import transformers

TEXT = "The capital of  France\n\nis"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("gguf", type=pathlib.Path)
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--tokens", type=int, default=6)
    args = parser.parse_args()
    body = {"model": "auto", "temperature": 0, "max_tokens": args.tokens, "logprobs": True, "top_logprobs": 3,
            "messages": [{"role": "user", "content": TEXT}]}
    request = urllib.request.Request(args.url + "/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    answer = json.load(urllib.request.urlopen(request, timeout=600))

    folder, name = args.gguf.parent, args.gguf.name
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    net = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32, attn_implementation="eager").eval()
    ids = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    ids += tokenizer.encode(f"<|im_start|>user\n{TEXT}<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)
    prompt = answer["usage"]["prompt_tokens"]
    print(f"{len(ids)} tokens here, {prompt} in weir")
    apart, same = 0.0, len(ids) == prompt
    for token in answer["choices"][0]["logprobs"]["content"]:
        with torch.no_grad():
            top = net(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1).topk(3)
        here = [(tokenizer.decode([i]), round(v, 4)) for v, i in zip(top.values.tolist(), top.indices.tolist())]
        there = [(t["token"], round(t["logprob"], 4)) for t in token["top_logprobs"]]
        print(here, there)
        same &= here[0][0] == there[0][0]
        apart = max([apart] + [abs(a[1] - b[1]) for a, b in zip(here, there) if a[0] == b[0]])
        ids.append(top.indices[0].item())
    print(f"greatest distance {apart:.4f}; {'the same tokens' if same else 'OTHER TOKENS'}")
    sys.exit(0 if same else 1)


main()
