"""OpenS2V's total scores (Table 12) from the result files of its own scorers, and a check of the table's arithmetic.

    python -m paper.opens2v        # every row of Table 12 beside the total that its own scores give

The six scorers are OpenS2V's, and each needs its own environment and weights; nothing of them is here.
"""
import json
from contextlib import suppress
from pathlib import Path

import numpy as np

from common.media import read_text

# OpenS2V's result files: (file, key in it, value that scores 0, value that scores 1).
OPENS2V = {"aesthetics": ("aesthetic_score", "aes_score", 4, 7), "motion": ("motionscore", "motion_fb", 0, 1),
           "smoothness": ("motion_smoothness", "motion_smoothness", 0, 1),
           "amplitude": ("motion_amplitude", "motion_fb", 0, 1), "face": ("facesim", "cur_score", 0, 1),
           "gme": ("gmescore", "gme_score", 0, 1), "nexus": ("nexusscore", "nexus_score", 0, 0.05),
           "natural": ("naturalscore_*", None, 1, 5)}
TOTALS = {"v1.0": dict(aesthetics=.12, motion=.12, face=.20, gme=.12, nexus=.20, natural=.24),
          "v1.1": dict(aesthetics=.16, smoothness=.06, amplitude=.02, face=.20, gme=.12, nexus=.20, natural=.24)}
COLUMNS = "aesthetics", "motion", "face", "gme", "nexus", "natural"
TABLE12 = {  # per cent, as published: the total, then COLUMNS
    "Vidu2.0": (48.67, 34.78, 24.40, 36.20, 65.56, 45.20, 72.60),
    "Pika2.1": (48.93, 38.64, 31.90, 32.94, 62.19, 47.34, 70.60),
    "Kling1.6": (53.12, 35.63, 36.40, 39.26, 61.99, 48.24, 81.40),
    "VACE-P1.3B": (44.28, 42.58, 18.00, 18.02, 65.93, 36.26, 76.00),
    "VACE-1.3B": (47.33, 41.81, 33.78, 22.38, 65.35, 38.52, 76.00),
    "VACE-14B": (58.00, 41.30, 35.54, 64.65, 58.55, 51.33, 77.33),
    "Phantom-1.3B": (49.95, 42.98, 19.30, 44.03, 65.61, 37.78, 76.00),
    "Phantom-14B": (53.17, 47.46, 41.55, 51.82, 70.07, 35.35, 69.35),
    "SkyReels-A2-P14B": (51.64, 33.83, 21.60, 54.42, 61.93, 48.63, 70.60),
    "HunyuanCustom": (51.64, 34.08, 26.83, 55.93, 54.31, 50.75, 68.66),
    "Ours": (50.05, 45.40, 19.38, 18.05, 70.53, 41.23, 68.52)}


def scores_in(folder):
    """{score: (per cent, n)} from the result files of OpenS2V's own scorers (arXiv 2505.20292).

    Each value is cut to its range and scaled to 0..100, as OpenS2V does; motion counts by its size; naturalness is the
    mean of up to three files of GPT-4o's marks, 1 to 5. A video in which NexusScore's detector finds nothing (0) is
    left out, so flicker pays (OpenS2V issue 36): look at its n. FaceSim is for ids that show people.
    """
    scores = {}
    for name, (pattern, key, low, high) in OPENS2V.items():
        found = {}
        for file in sorted(Path(folder).glob(f"{pattern}.json")):
            for video, value in json.loads(read_text(file)).items():
                with suppress(KeyError, TypeError, ValueError):  # GPT-4o's "error"; another version's key
                    mark = float(value[key] if key else value)
                    found.setdefault(video, []).append(mark)
        values = np.array([np.mean(marks) for marks in found.values()])
        if name in ("motion", "amplitude", "smoothness"):
            values = np.abs(values)
        elif name == "nexus":
            values = values[values != 0]
        if len(values):
            scores[name] = 100 * float((np.clip(values, low, high).mean() - low) / (high - low)), len(values)
    if not scores:
        raise ValueError(f"--opens2v: none of OpenS2V's result files, like gmescore.json, in {folder}")
    return scores


def total(scores, version):
    """OpenS2V's total of the open and the single domain (people alone have other weights): a weighted mean of scores in
    per cent. None when one is missing; OpenS2V would count it as 0. Totals of v1.0 and v1.1 cannot be compared."""
    weights = TOTALS[version]
    return sum(w * scores[k] for k, w in weights.items()) if weights.keys() <= scores.keys() else None


def rows(folder):
    """The rows of paper/metrics.py's table: each score in OpenS2V's result files, and the totals that they give."""
    scores = scores_in(folder)
    table = {f"OpenS2V {k}": {"value": value, "n": n} for k, (value, n) in scores.items()}
    for version in TOTALS:
        value = total({k: value for k, (value, _) in scores.items()}, version)
        if value is not None:
            table[f"OpenS2V total {version}"] = {"value": value, "n": min(n for _, n in scores.values())}
    return table


def table12():
    """Print each row of Table 12 with the total that its own scores give under OpenS2V v1.0."""
    print("| Table 12, per cent | published | v1.0 of its scores | |\n|---|---|---|---|")
    for name, (published, *scores) in TABLE12.items():
        scores = dict(zip(COLUMNS, scores))
        ours = total(scores, "v1.0")
        print(f"| {name} | {published:.2f} | {ours:.2f} | {'' if abs(ours - published) < 0.02 else 'differs'} |")
    rest = total(scores | {"amplitude": scores["motion"], "smoothness": 0}, "v1.1")  # of the last row, the paper's own
    print(f"v1.1 gives the paper's {published} with a motion smoothness of "
          f"{(published - rest) / TOTALS['v1.1']['smoothness']:.1f}, which it does not report")


if __name__ == "__main__":
    table12()
