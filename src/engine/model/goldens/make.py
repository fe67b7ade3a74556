"""Makes logits.json: what PyTorch's `transformers` computes for tiny models, for `goldens.rs` to compare with; and
sentencepiece.json, a small vocabulary with what SentencePiece makes of some texts.

    python3 -m venv V && V/bin/pip install torch transformers accelerate gguf sentencepiece && V/bin/python make.py [SmolLM2.gguf]

The weights are made up by the same generator as in `testing.rs`, so that none need be kept; `gguf` decodes the block formats.
With a path, the real model is run too (its GGUF read by `transformers`): per position the greatest logits and the rest's mass.
"""

import base64
import json
import pathlib
import sys

import gguf
import numpy as np
import torch
import transformers

MASK = (1 << 64) - 1
TOKENS = [5, 99, 260, 17, 44, 201, 3, 128, 77, 250, 9, 64, 31, 180, 222, 6, 90, 141, 35, 11]
VOCABULARY = 288
# Positions of which the logits are kept.
ROWS = [0, 3, 8, 13, 18, 19]
# Gemma's local layers see so many.
WINDOW = 7


def draws(n, seed):
    """The 24 bits of each step of `numbers` in testing.rs."""
    state = (seed * 0x9E3779B97F4A7C15 + 0x123456789ABCDEF1) & MASK
    out = np.empty(n, np.uint32)
    for i in range(n):
        state ^= state << 13 & MASK
        state ^= state >> 7
        state ^= state << 17 & MASK
        out[i] = state >> 40
    return out


def numbers(n, seed):
    return draws(n, seed).astype(np.float32) / np.float32(1 << 23) - np.float32(1)


def f16(x):
    return np.float16(x).tobytes()


def blocks(kind, n, seed, size):
    """Elements of a block format out of made up bytes, and what they mean."""
    qtype = gguf.GGMLQuantizationType[kind]
    elements, length = gguf.GGML_QUANT_SIZES[qtype]
    raw = (draws(n // elements * length, seed) & 255).astype(np.uint8).reshape(-1, length)
    heads = {  # where f16 numbers stand, and what they are
        "Q4_0": [(0, size / 8)],
        "Q4_1": [(0, size / 8), (2, -size)],
        "Q5_0": [(0, size / 16)],
        "Q8_0": [(0, size / 128)],
        "Q4_K": [(0, size / 400), (2, size / 60)],
        "Q6_K": [(208, size / 2000)],
    }[kind]
    for at, value in heads:
        raw[:, at:at + 2] = np.frombuffer(f16(value), np.uint8)
    return gguf.quants.dequantize(raw, qtype).reshape(-1)


def values(kind, n, seed, size):
    if kind in ("F32", "F16", "BF16"):
        x = numbers(n, seed) * np.float32(size)
        if kind == "F16":
            x = x.astype(np.float16).astype(np.float32)
        if kind == "BF16":  # cut off
            x = (x.view(np.uint32) & 0xFFFF0000).view(np.float32)
        return x
    return blocks(kind, n, seed, size)


class Made:
    """Tensors in the order in which testing.rs makes them, as GGUF has them."""

    def __init__(self, kind):
        self.kind, self.seed = kind, 1000

    def matrix(self, rows, columns, size, kind=None):
        self.seed += 1
        return values(kind or self.kind, rows * columns, self.seed, size).reshape(rows, columns)

    def vector(self, n, middle, size):
        self.seed += 1
        return np.float32(middle) + numbers(n, self.seed) * np.float32(size)


def halves(x, heads):
    """llama's GGUF rows are (pair, side), those of `transformers` (side, pair)."""
    shape = x.shape
    return x.reshape(heads, shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(shape)


def model(arch, kind, s):
    made, state = Made(kind), {}
    q, kv = s["heads"] * s["head"], s["keys"] * s["head"]
    turn = halves if arch in ("llama", "llama3", "mistral") else lambda x, _: x
    state["model.embed_tokens.weight"] = made.matrix(VOCABULARY, s["hidden"], 0.25, "F32" if kind == "F32" else "Q8_0")
    size = 2 / s["hidden"] ** 0.5
    for i in range(s["layers"]):
        name = f"model.layers.{i}."
        a, m = name + "self_attn.", name + "mlp."
        state[a + "q_proj.weight"] = turn(made.matrix(q, s["hidden"], size), s["heads"])
        state[a + "k_proj.weight"] = turn(made.matrix(kv, s["hidden"], size), s["keys"])
        state[a + "v_proj.weight"] = made.matrix(kv, s["hidden"], size)
        state[a + "o_proj.weight"] = made.matrix(s["hidden"], q, size)
        state[m + "gate_proj.weight"] = made.matrix(s["ff"], s["hidden"], size)
        state[m + "up_proj.weight"] = made.matrix(s["ff"], s["hidden"], size)
        state[m + "down_proj.weight"] = made.matrix(s["hidden"], s["ff"], size)
        state[name + "input_layernorm.weight"] = made.vector(s["hidden"], 1, 0.25)
        state[name + "post_attention_layernorm.weight"] = made.vector(s["hidden"], 1, 0.25)
        if arch == "qwen2":
            state[a + "q_proj.bias"] = made.vector(q, 0, 0.5)
            state[a + "k_proj.bias"] = made.vector(kv, 0, 0.5)
            state[a + "v_proj.bias"] = made.vector(kv, 0, 0.5)
        if arch == "qwen3":
            state[a + "q_norm.weight"] = made.vector(s["head"], 1, 0.25)
            state[a + "k_norm.weight"] = made.vector(s["head"], 1, 0.25)
    state["model.norm.weight"] = made.vector(s["hidden"], 1, 0.25)
    untied = arch in ("llama3", "mistral", "qwen3")
    if untied:
        state["lm_head.weight"] = made.matrix(VOCABULARY, s["hidden"], 0.25)
    common = dict(
        vocab_size=VOCABULARY, hidden_size=s["hidden"], intermediate_size=s["ff"], num_hidden_layers=s["layers"],
        num_attention_heads=s["heads"], num_key_value_heads=s["keys"], head_dim=s["head"], max_position_embeddings=4096,
        rms_norm_eps=1e-5, tie_word_embeddings=not untied, attn_implementation="eager",
    )
    base = 10_000.0 if arch == "llama" else 500_000.0
    rope = {"rope_type": "default", "rope_theta": base}
    if arch == "llama3":
        rope = {"rope_type": "llama3", "rope_theta": base, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64}
    config = {
        "llama": transformers.LlamaConfig, "llama3": transformers.LlamaConfig, "mistral": transformers.MistralConfig,
        "qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config,
    }[arch](**common, rope_parameters=rope, **({"sliding_window": None} if arch == "mistral" else {}))
    out, net = run(config, state, {"lm_head.weight"})
    if arch == "llama3":
        # What a GGUF holds as rope_freqs.weight: by how much each frequency is divided.
        plain = base ** -(np.arange(0, s["head"], 2) / s["head"])
        out["factors"] = [float(x) for x in plain / net.model.rotary_emb.inv_freq.double().numpy()]
    return out


def gemma3(s):
    """Seven layers, of which the sixth sees everything."""
    made, state = Made("F32"), {}
    q, kv = s["heads"] * s["head"], s["keys"] * s["head"]
    state["model.embed_tokens.weight"] = made.matrix(VOCABULARY, s["hidden"], 0.25, "F32")
    size = 2 / s["hidden"] ** 0.5
    for i in range(s["layers"]):
        name = f"model.layers.{i}."
        a, m = name + "self_attn.", name + "mlp."
        state[a + "q_proj.weight"] = made.matrix(q, s["hidden"], size)
        state[a + "k_proj.weight"] = made.matrix(kv, s["hidden"], size)
        state[a + "v_proj.weight"] = made.matrix(kv, s["hidden"], size)
        state[a + "o_proj.weight"] = made.matrix(s["hidden"], q, size)
        state[m + "gate_proj.weight"] = made.matrix(s["ff"], s["hidden"], size)
        state[m + "up_proj.weight"] = made.matrix(s["ff"], s["hidden"], size)
        state[m + "down_proj.weight"] = made.matrix(s["hidden"], s["ff"], size)
        # GGUF files hold the norms' weights with the one that `transformers` adds to them.
        for norm in ("input", "pre_feedforward"):
            state[name + norm + "_layernorm.weight"] = made.vector(s["hidden"], 1, 0.25) - 1
        for norm in ("q_norm", "k_norm"):
            state[a + norm + ".weight"] = made.vector(s["head"], 1, 0.25) - 1
        for norm in ("post_attention", "post_feedforward"):
            state[name + norm + "_layernorm.weight"] = made.vector(s["hidden"], 1, 0.25) - 1
    state["model.norm.weight"] = made.vector(s["hidden"], 1, 0.25) - 1
    config = transformers.Gemma3TextConfig(
        vocab_size=VOCABULARY, hidden_size=s["hidden"], intermediate_size=s["ff"], num_hidden_layers=s["layers"],
        num_attention_heads=s["heads"], num_key_value_heads=s["keys"], head_dim=s["head"], max_position_embeddings=4096,
        rms_norm_eps=1e-5, sliding_window=WINDOW, query_pre_attn_scalar=48,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
        attn_implementation="eager")
    assert config.layer_types.index("full_attention") == 5
    return run(config, state, {"lm_head.weight"})[0]


def phi(arch, s):
    """Phi 2 and Phi 3, whose GGUF files have queries, keys and values in one matrix."""
    made, state = Made("F32"), {}
    q, kv = s["heads"] * s["head"], s["keys"] * s["head"]
    state["model.embed_tokens.weight"] = made.matrix(VOCABULARY, s["hidden"], 0.25)
    size = 2 / s["hidden"] ** 0.5
    for i in range(s["layers"]):
        name = f"model.layers.{i}."
        a, m = name + "self_attn.", name + "mlp."
        qkv = made.matrix(q + 2 * kv, s["hidden"], size)
        out = made.matrix(s["hidden"], q, size)
        up = made.matrix((2 if arch == "phi3" else 1) * s["ff"], s["hidden"], size)
        down = made.matrix(s["hidden"], s["ff"], size)
        state[name + "input_layernorm.weight"] = made.vector(s["hidden"], 1, 0.25)
        if arch == "phi3":
            state[a + "qkv_proj.weight"], state[a + "o_proj.weight"] = qkv, out
            state[m + "gate_up_proj.weight"], state[m + "down_proj.weight"] = up, down
            state[name + "post_attention_layernorm.weight"] = made.vector(s["hidden"], 1, 0.25)
            continue
        state[name + "input_layernorm.bias"] = made.vector(s["hidden"], 0, 0.25)
        bias = made.vector(q + 2 * kv, 0, 0.5)
        for part, begin, end in (("q", 0, q), ("k", q, q + kv), ("v", q + kv, q + 2 * kv)):
            state[a + part + "_proj.weight"], state[a + part + "_proj.bias"] = qkv[begin:end], bias[begin:end]
        state[a + "dense.weight"], state[a + "dense.bias"] = out, made.vector(s["hidden"], 0, 0.5)
        state[m + "fc1.weight"], state[m + "fc1.bias"] = up, made.vector(s["ff"], 0, 0.5)
        state[m + "fc2.weight"], state[m + "fc2.bias"] = down, made.vector(s["hidden"], 0, 0.5)
    norm = "model.norm" if arch == "phi3" else "model.final_layernorm"
    state[norm + ".weight"] = made.vector(s["hidden"], 1, 0.25)
    state["lm_head.weight"] = made.matrix(VOCABULARY, s["hidden"], 0.25)
    if arch == "phi2":
        state[norm + ".bias"] = made.vector(s["hidden"], 0, 0.25)
        state["lm_head.bias"] = made.vector(VOCABULARY, 0, 0.5)
    common = dict(
        vocab_size=VOCABULARY, hidden_size=s["hidden"], intermediate_size=s["ff"], num_hidden_layers=s["layers"],
        num_attention_heads=s["heads"], num_key_value_heads=s["keys"], max_position_embeddings=4096,
        tie_word_embeddings=False, attn_implementation="eager", pad_token_id=0)
    if arch == "phi3":
        config = transformers.Phi3Config(**common, rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0})
    else:
        rope = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
        config = transformers.PhiConfig(**common, layer_norm_eps=1e-5, hidden_act="gelu_new", rope_parameters=rope)
    return run(config, state, set())[0]


def run(config, state, tied):
    net = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in state.items()}
    missing, unexpected = net.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) <= tied, (missing, unexpected)
    net.tie_weights()
    with torch.no_grad():
        logits = net(torch.tensor([TOKENS])).logits[0].numpy()
    return {"logits": base64.b64encode(logits[ROWS].astype("<f4").tobytes()).decode()}, net


def smollm2(path):
    """Per position the 32 greatest logits less the log of the sum of all exponentials."""
    path = pathlib.Path(path)
    net = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    # Any ids will do; these are text of no meaning, so that the distributions are wide and narrow by turns.
    ids = [int(i) for i in draws(96, 77) % 49_000] + list(range(400, 496))
    with torch.no_grad():
        logits = net(torch.tensor([ids])).logits[0].double()
    logits = logits - logits.logsumexp(-1, keepdim=True)
    top = logits.topk(32)
    return {"tokens": ids, "top": top.indices.tolist(), "logprobs": [[round(x, 5) for x in row] for row in top.values.tolist()]}


def sentencepiece_tokenizer():
    """A vocabulary trained on this directory's own texts, and what SentencePiece makes of some lines."""
    import io
    import sentencepiece

    here = pathlib.Path(__file__).resolve().parent
    lines = (here.parents[3] / "README.md").read_text().splitlines() + pathlib.Path(__file__).read_text().splitlines()
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=trained, vocab_size=700, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True, minloglevel=2,
        num_threads=1, allow_whitespace_only_pieces=True)
    sp = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    texts = ["weir routes requests", " two  spaces and a tab\t.", "naïve café – 日本語 🦀", "a", "1234.5 tokens/s", "policy: {arms: [a, b]}\n\nnext",
             "the the the", "   ", "MixedCASE_and-symbols!?"]
    kind = lambda i: 2 if sp.IsUnknown(i) else 3 if sp.IsControl(i) else 6 if sp.IsByte(i) else 1
    every = range(sp.GetPieceSize())
    return {
        "tokens": [sp.IdToPiece(i) for i in every],
        "scores": [round(sp.GetScore(i), 4) for i in every],
        "types": [kind(i) for i in every],
        "texts": [{"text": text, "ids": sp.EncodeAsIds(text)} for text in texts],
    }


def main():
    small = dict(hidden=64, layers=2, heads=4, keys=2, head=16, ff=96)
    # Blocks of 256 have to fit.
    wide = dict(hidden=256, layers=1, heads=4, keys=2, head=64, ff=256)
    out = {"tokens": TOKENS, "rows": ROWS}
    for arch in ("llama", "llama3", "mistral", "qwen2", "qwen3"):
        # Heads of Qwen3 are larger than the hidden size says.
        out[f"{arch} F32"] = model(arch, "F32", dict(small, head=32) if arch == "qwen3" else small)
    for kind in ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q8_0"):
        out[f"llama {kind}"] = model("llama", kind, small)
    for kind in ("Q4_K", "Q6_K"):
        out[f"llama {kind}"] = model("llama", kind, wide)
    out["qwen2 Q8_0"] = model("qwen2", "Q8_0", small)
    out["gemma3 F32"] = gemma3(dict(small, layers=7, head=32))
    for arch in ("phi2", "phi3"):
        # Phi 2 has as many key heads as heads.
        out[f"{arch} F32"] = phi(arch, dict(small, keys=4) if arch == "phi2" else small)
    if len(sys.argv) > 1:
        out["smollm2"] = smollm2(sys.argv[1])
    here = pathlib.Path(__file__).parent
    (here / "sentencepiece.json").write_text(json.dumps(sentencepiece_tokenizer(), ensure_ascii=False, separators=(",", ":")) + "\n")
    (here / "logits.json").write_text(json.dumps(out, separators=(",", ":")) + "\n")


main()
