"""`weir replay estimate` against the Open Bandit Pipeline (Saito et al., arXiv 2008.07146), where it can be installed.

Its estimators need NumPy and scikit-learn only; the rest of the package, which wants PyTorch and pandas, is not loaded.
"""

import importlib
import importlib.util
import sys
import types

import numpy as np
import pytest

from test_estimators import CLIP, SWITCH, estimate


@pytest.fixture(scope="module")
def obp():
    found = importlib.util.find_spec("obp")
    if found is None:
        pytest.skip("obp is not installed: tests/python/run says why")
    # The packages without their own __init__, and names of what the estimators do not use.
    for name, path in (("obp", found.submodule_search_locations), ("obp.ope", [found.submodule_search_locations[0] + "/ope"])):
        package = types.ModuleType(name)
        package.__path__ = list(path)
        sys.modules[name] = package
    for name in ("pandas", "torch"):
        if importlib.util.find_spec(name) is None:
            stand_in = types.ModuleType(name)
            stand_in.DataFrame = stand_in.Tensor = stand_in.tensor = type("NotHere", (), {})
            sys.modules[name] = stand_in
    return importlib.import_module("obp.ope.estimators")


@pytest.mark.parametrize("seed,n", [(11, 50), (12, 1000), (13, 20000)])
def test_they_agree_with_obp(tmp_path, obp, seed, n):
    rng = np.random.default_rng(seed)
    every = np.arange(n)
    propensities = 0.1 + 0.6 * rng.dirichlet(np.ones(4), n)
    propensities /= propensities.sum(1, keepdims=True)
    target = rng.dirichlet(np.ones(4) * 0.7, n)
    target /= target.sum(1, keepdims=True)
    taken = (propensities.cumsum(1) > rng.random((n, 1))).argmax(1)
    reward = np.clip(rng.normal(0.3 + 0.15 * taken, 0.2), 0, 1)
    model = np.clip(0.25 + 0.15 * np.arange(4) + rng.normal(0, 0.05, (n, 4)), 0, 1)
    got = estimate(tmp_path, {
        "session": every,
        "propensity": propensities[every, taken],
        "target": target[every, taken],
        "reward": reward,
        "seen": np.ones(n, bool),
        "observed": np.ones(n),
        "model_taken": model[every, taken],
        "model_target": (target * model).sum(1),
    }, "--resamples", "0")
    logged = {
        "reward": reward,
        "action": taken,
        "pscore": propensities[every, taken],
        "action_dist": target[:, :, None],
        "estimated_rewards_by_reg_model": model[:, :, None],
    }
    assert got["greatest_weight"] > CLIP, "nothing is clipped"
    for name, estimator in {
        "ips": obp.InverseProbabilityWeighting(),
        "clipped": obp.InverseProbabilityWeighting(lambda_=CLIP),
        "snips": obp.SelfNormalizedInverseProbabilityWeighting(),
        "dm": obp.DirectMethod(),
        "dr": obp.DoublyRobust(),
        "switch_dr": obp.SwitchDoublyRobust(lambda_=SWITCH),
    }.items():
        assert abs(got[name]["value"] - estimator.estimate_policy_value(**logged)) < 1e-9, name
