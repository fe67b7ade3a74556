"""llama.cpp's tokens per second for the cases of `weir bench engine`, through llama-cpp-python's low-level API.

    python3 -m venv V && CMAKE_ARGS=-DGGML_NATIVE=ON V/bin/pip install --no-binary llama-cpp-python llama-cpp-python
    V/bin/python peer_llama_cpp.py MODEL.gguf [--threads 1 2] [--repeats 5] [--requantise DIR] > peer.json

With --requantise the same weights are run as Q4_0, too, which llama.cpp has repacked kernels for.
"""

import argparse
import ctypes
import json
import pathlib
import resource
import statistics
import sys
import time

import llama_cpp as lc

DECODED = 32


class Model:
    def __init__(self, path, threads):
        params = lc.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = lc.llama_model_load_from_file(str(path).encode(), params)
        context = lc.llama_context_default_params()
        context.n_ctx, context.n_batch, context.n_ubatch, context.n_seq_max = 8192, 512, 512, 16
        context.n_threads = context.n_threads_batch = threads
        if hasattr(context, "kv_unified"):
            context.kv_unified = True
        self.context = lc.llama_init_from_model(self.model, context)
        self.vocabulary = lc.llama_vocab_n_tokens(lc.llama_model_get_vocab(self.model))
        self.batch = lc.llama_batch_init(512, 0, 1)

    def close(self):
        lc.llama_batch_free(self.batch)
        lc.llama_free(self.context)
        lc.llama_model_free(self.model)

    def clear(self):
        lc.llama_memory_clear(lc.llama_get_memory(self.context), True)

    def step(self, entries):
        """Of (token, position, sequence, whether its logits are wanted)."""
        b = self.batch
        b.n_tokens = len(entries)
        for i, (token, position, sequence, wanted) in enumerate(entries):
            b.token[i], b.pos[i], b.n_seq_id[i], b.logits[i] = token, position, 1, int(wanted)
            b.seq_id[i][0] = sequence
        assert lc.llama_decode(self.context, b) == 0
        lc.llama_synchronize(self.context)

    def token(self, at):
        return at * 7919 % (self.vocabulary - 1)

    def prefill(self, count):
        for start in range(0, count, 512):
            now = min(512, count - start)
            self.step([(self.token(at), at, 0, at + 1 == count) for at in range(start, start + now)])

    def decode(self, sequences, depth):
        for step in range(DECODED):
            self.step([(self.token(step * sequences + i), depth + step, i, True) for i in range(sequences)])

    def once(self, kind, n):
        self.clear()
        if kind == "decode at":
            self.prefill(n)
        begun = time.perf_counter()
        if kind == "prefill of":
            self.prefill(n)
            tokens = n
        else:
            sequences = n if kind == "decode, batch of" else 1
            self.decode(sequences, n if kind == "decode at" else 0)
            tokens = DECODED * sequences
        return tokens / (time.perf_counter() - begun)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--requantise", type=pathlib.Path)
    parser.add_argument("--prefill", type=int, nargs="*", default=[512, 2048])
    parser.add_argument("--depths", type=int, nargs="*", default=[0, 512, 2048])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 4, 16])
    args = parser.parse_args()
    quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
    lc.llama_log_set(quiet, None)
    files = {"as it is": args.model}
    if args.requantise:
        params = lc.llama_model_quantize_default_params()
        params.ftype, params.allow_requantize = lc.LLAMA_FTYPE_MOSTLY_Q4_0, True
        out = args.requantise / f"{args.model.stem}.as.Q4_0.gguf"
        if not out.exists():
            part = out.with_suffix(".part")
            assert lc.llama_model_quantize(str(args.model).encode(), str(part).encode(), ctypes.byref(params)) == 0
            part.rename(out)
        files["Q4_0"] = out
    cases = [("prefill of", n) for n in args.prefill] + [("decode at", n) for n in args.depths]
    cases += [("decode, batch of", n) for n in args.batches]
    rows = []
    for name, file in files.items():
        for threads in args.threads:
            model = Model(file, threads)
            seen = {case: [] for case in cases}
            for _ in range(args.repeats):
                for case in cases:
                    seen[case].append(model.once(*case))
                    print(".", end="", file=sys.stderr, flush=True)
            model.close()
            rows += [{"weights": name, "what": f"{kind} {n}", "threads": threads, "tokens_per_s": statistics.median(runs)}
                     for (kind, n), runs in seen.items()]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"peer": "llama-cpp-python " + lc.__version__, "peak_kib": peak, "rows": rows}, indent=1))


main()
