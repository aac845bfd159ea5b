"""Writes tests/golden/metrics.json: GLUE's metrics as scikit-learn and scipy compute them.

usage: python scripts/golden_metrics.py [OUT]        needs: pip install numpy scikit-learn scipy

{"made_with": {...}, "cases": [{"name", "kind": "classes" | "values", "predictions", "targets", "expected": {metric: f64}}]}
Values are rounded to f32 first, which is what a model answers. A figure that the libraries leave undefined is left out.
"""
import json
import sys
import warnings

import numpy as np
import scipy
import sklearn
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

warnings.simplefilter("ignore")  # constant inputs are among the cases on purpose


def classes(name, predictions, targets):
    p, t = np.asarray(predictions), np.asarray(targets)
    n = int(max(p.max(), t.max())) + 1
    expected = {
        "accuracy": accuracy_score(t, p),
        "f1": f1_score(t == 1, p == 1, zero_division=0),
        "macro_f1": f1_score(t, p, average="macro", zero_division=0),
        "matthews": matthews_corrcoef(t, p),
    }
    if n <= 2:  # the same figure by the call that GLUE's users make
        assert f1_score(t, p, labels=[0, 1], average="binary", zero_division=0) == expected["f1"]
    return case(name, "classes", p.tolist(), t.tolist(), expected)


def values(name, predictions, targets):
    p, t = (np.asarray(x, dtype=np.float32).astype(np.float64) for x in (predictions, targets))
    expected = {"pearson": pearsonr(p, t)[0], "spearman": spearmanr(p, t)[0]}
    return case(name, "values", p.tolist(), t.tolist(), expected)


def case(name, kind, predictions, targets, expected):
    expected = {k: float(v) for k, v in expected.items() if np.isfinite(v)}
    return {"name": name, "kind": kind, "predictions": predictions, "targets": targets, "expected": expected}


def main():
    rng = np.random.default_rng(0)
    noisy = lambda t, n, share: np.where(rng.random(len(t)) < share, rng.integers(0, n, len(t)), t)
    two = rng.integers(0, 2, 60)
    rare = (rng.random(80) < 0.1).astype(int)
    three = rng.integers(0, 3, 90)
    seven = rng.integers(0, 7, 70)
    x = rng.normal(size=50)
    stars = rng.integers(0, 6, 60)
    cases = [
        classes("two classes", noisy(two, 2, 0.4), two),
        classes("two classes, a rare one", noisy(rare, 2, 0.2), rare),
        classes("two classes, all wrong", 1 - two, two),
        classes("two classes, all right", two, two),
        classes("two classes, one predicted", np.zeros_like(two), two),
        classes("two classes, the other predicted", np.ones_like(two), two),
        classes("two classes, one in the targets", two, np.ones_like(two)),
        classes("three classes", noisy(three, 3, 0.5), three),
        classes("three classes, one predicted", np.full_like(three, 2), three),
        classes("seven classes, one never there", np.where(seven == 4, 5, noisy(seven, 7, 0.3)), np.where(seven == 4, 5, seven)),
        classes("one row", [1], [1]),
        values("near", x + 0.3 * rng.normal(size=50), x),
        values("far", rng.normal(size=50), x),
        values("against", -2.5 * x + 1, x),
        values("ties on one side", stars + 0.5 * rng.normal(size=60), stars),
        values("ties on both sides", np.round(stars + rng.normal(size=60)), stars),
        values("monotone, not linear", np.exp(3 * x), x),
        values("far from zero", 1e4 + x, 3 * x + rng.normal(size=50)),
        values("zeros of both signs", [0.0, -0.0, 1.0, 2.0, -1.0], [0.0, 1.0, 2.0, 2.0, -3.0]),
        values("two rows", [1.0, 2.0], [5.0, 3.0]),
    ]
    made_with = {"numpy": np.__version__, "scikit-learn": sklearn.__version__, "scipy": scipy.__version__}
    out = sys.argv[1] if len(sys.argv) > 1 else "tests/golden/metrics.json"
    with open(out, "w", encoding="utf-8") as f:
        rows = ",\n".join(json.dumps(c) for c in cases)
        f.write('{"made_with": %s, "cases": [\n%s\n]}\n' % (json.dumps(made_with), rows))
    print(f"{out}: {len(cases)} cases, {sum(len(c['expected']) for c in cases)} figures")


main()
