"""Instructions of one 128-token prefill and of one decode step (callgrind; the AVX2 kernels, as valgrind has no AVX-512).

    python3 eval/bench/instructions.py target/release/weir [--data-dir DIR] > instructions.json

Loading is most of a run and the same in all, so each figure is the difference of two runs, which no other load of the machine moves.
"""

import argparse
import json
import re
import subprocess
import tempfile


def count(args, prefill, depths):
    command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={tempfile.gettempdir()}/callgrind.out", args.weir,
               "bench", "engine", "--threads", "1", "--repeats", "1", "--batches", "1"]
    command += ["--activation-bits", str(args.activation_bits)]
    command += ["--prefill", *["128"] * prefill, "--depths", *["0"] * depths]
    command += ["--data-dir", args.data_dir] if args.data_dir else []
    said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    return int(re.search(r"Collected : (\d+)", said).group(1))


parser = argparse.ArgumentParser()
parser.add_argument("weir")
parser.add_argument("--data-dir")
parser.add_argument("--activation-bits", type=int, default=16)
args = parser.parse_args()
base = count(args, 1, 1)
prefill = count(args, 2, 1) - base
# A case decodes 32 tokens.
decode = (count(args, 1, 2) - base) / 32
print(json.dumps({"activation_bits": args.activation_bits, "prefill_128": prefill, "decode_step": decode}))
