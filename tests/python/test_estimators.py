"""`weir replay estimate` against the same formulas in NumPy, written apart from weir's."""

import json
import os
import pathlib
import subprocess

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
WEIR = pathlib.Path(os.environ.get("WEIR_BIN", ROOT / "target/debug/weir"))
CLIP, SWITCH = 3.0, 2.5


def logged(seed, n, missing):
    """A log of a stochastic policy over four arms, and another policy's probabilities."""
    rng = np.random.default_rng(seed)
    propensities = 0.1 + 0.6 * rng.dirichlet(np.ones(4), n)
    target = rng.dirichlet(np.ones(4) * 0.7, n)
    taken = (propensities.cumsum(1) > rng.random((n, 1))).argmax(1)
    every = np.arange(n)
    reward = np.clip(rng.normal(0.3 + 0.15 * taken, 0.2), 0, 1)
    model = np.clip(0.25 + 0.15 * np.arange(4) + rng.normal(0, 0.05, (n, 4)), 0, 1)
    observed = np.where(taken == 0, 0.5, 0.9) if missing else np.ones(n)
    return {
        "session": rng.integers(0, n // 3, n),
        "propensity": propensities[every, taken],
        "target": target[every, taken],
        "reward": reward,
        "seen": rng.random(n) < observed,
        "observed": observed,
        "model_taken": model[every, taken],
        "model_target": (target * model).sum(1),
    }


def estimate(tmp_path, log, *more):
    file = tmp_path / "log.jsonl"
    with file.open("w") as out:
        for i in range(len(log["reward"])):
            row = {name: float(log[name][i]) for name in ("propensity", "target", "observed", "model_taken", "model_target")}
            row["session"] = f"s{log['session'][i]}"
            row["reward"] = float(log["reward"][i]) if log["seen"][i] else None
            out.write(json.dumps(row) + "\n")
    command = [WEIR, "replay", "estimate", file, "--json", "--clip", str(CLIP), "--switch", str(SWITCH), *more]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def by_numpy(log, max_weight):
    w = log["target"] / log["propensity"]
    seen, r, rho = log["seen"], log["reward"], log["observed"]
    inverse = seen / rho
    ips = w * np.where(seen, r, 0.0) * inverse
    correction = w * (r - log["model_taken"]) * inverse
    n, ln = len(w), np.log(4 / 0.05)
    half = np.sqrt(2 * ips.var(ddof=1) * ln / n) + 7 * max_weight / rho[seen].min() * ln / (3 * (n - 1))
    return {
        "ips": ips.mean(),
        "clipped": (np.minimum(w, CLIP) * r * inverse).mean(),
        "snips": ips.sum() / (w * inverse).sum(),
        "dm": log["model_target"].mean(),
        "dr": (log["model_target"] + correction).mean(),
        "switch_dr": (log["model_target"] + np.where(w <= SWITCH, correction, 0.0)).mean(),
        "effective": w[seen].sum() ** 2 / (w[seen] ** 2).sum(),
        "overlap": w.mean(),
        "bernstein": (max(0.0, ips.mean() - half), min(1.0, ips.mean() + half)),
    }


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("seed,n", [(1, 50), (2, 1000), (3, 20000)])
def test_they_agree_with_numpy(tmp_path, seed, n, missing):
    log = logged(seed, n, missing)
    got = estimate(tmp_path, log, "--resamples", "0", "--max-weight", "10")
    want = by_numpy(log, 10.0)
    for name in ("ips", "clipped", "snips", "dm", "dr", "switch_dr"):
        assert abs(got[name]["value"] - want[name]) < 1e-9, name
    assert got["rows"] == n and got["rewarded"] == log["seen"].sum()
    assert abs(got["overlap"] - want["overlap"]) < 1e-9 and abs(got["effective"] / want["effective"] - 1) < 1e-9
    assert np.allclose(got["bernstein"], want["bernstein"], rtol=0, atol=1e-9)


def test_intervals_are_those_of_a_bootstrap_by_session(tmp_path):
    """Another generator, other draws: the ends agree to a fraction of the width."""
    log = logged(4, 3000, True)
    got = estimate(tmp_path, log)
    w = log["target"] / log["propensity"]
    inverse = log["seen"] / log["observed"]
    columns = np.stack([np.ones(len(w)), w * inverse, w * log["reward"] * inverse,
                        log["model_target"] + w * (log["reward"] - log["model_taken"]) * inverse])
    sessions, place = np.unique(log["session"], return_inverse=True)
    sums = np.stack([np.bincount(place, weights=c) for c in columns])
    rng = np.random.default_rng(9)
    drawn = np.stack([sums[:, rng.integers(0, len(sessions), len(sessions))].sum(1) for _ in range(2000)])
    for name, values in (("ips", drawn[:, 2] / drawn[:, 0]), ("snips", drawn[:, 2] / drawn[:, 1]),
                         ("dr", drawn[:, 3] / drawn[:, 0])):
        low, high = np.quantile(values, [0.025, 0.975])
        assert np.allclose(got[name]["interval"], (low, high), rtol=0, atol=0.15 * (high - low)), name


@pytest.mark.parametrize("line,says", [
    ('{"propensity": 0, "target": 1, "reward": 1}', "line 2: `propensity` is 0"),
    ('{"propensity": 0.5, "target": 1, "reward": 7}', "line 2: a reward of 7 is outside of 0..1"),
    ('{"propensity": 0.5, "target": 1.5, "reward": 1}', "line 2: `target` is 1.5"),
    ('{"propensity": 0.5, "target": 1, "reward": NaN}', "line 2: "),
    ('{"propensity": 0.5, "reward": 1}', "line 2: missing field `target`"),
    ('{"propensity": 0.5, "target": 1, "rewrad": 1}', "line 2: unknown field `rewrad`"),
    ('{"propensity": 0.5, "target": 1, "model_taken": 1}', "line 2: `model_taken` and `model_target` come together"),
    ('{"propensity": 0.5, "target": 1, "model_taken": 1, "model_target": 1}', "line 2: some rows have `model_taken`"),
    ('{"propensity": 0.01, "target": 1, "reward": 1}', "line 2: its weight 100 is above --max-weight 10"),
    ('{"propensity": 0.5', "line 2: EOF"),
])
def test_bad_lines_are_named(tmp_path, line, says):
    file = tmp_path / "log.jsonl"
    file.write_text('{"propensity": 0.5, "target": 1, "reward": 1}\n' + line + "\n")
    done = subprocess.run([WEIR, "replay", "estimate", file, "--max-weight", "10"], capture_output=True, text=True)
    assert done.returncode != 0 and done.stdout == "" and f"{file}: {says}" in done.stderr, done.stderr


@pytest.mark.parametrize("text,says", [
    ("", "is empty"),
    ('{"propensity": 0.5, "target": 1}\n', "no row has a reward"),
    ('{"propensity": 0.5, "target": 0, "reward": 1}\n', "min_propensity"),
])
def test_a_log_that_says_nothing_is_refused(tmp_path, text, says):
    file = tmp_path / "log.jsonl"
    file.write_text(text)
    done = subprocess.run([WEIR, "replay", "estimate", file], capture_output=True, text=True)
    assert done.returncode != 0 and done.stdout == "" and says in done.stderr and str(file) in done.stderr
