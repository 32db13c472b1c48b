"""OpenS2V's scores and totals (Table 12) from the result files of its own scorers (arXiv 2505.20292)."""
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


def total(scores, version):
    """OpenS2V's total for ids of all kinds (people alone have other weights) from scores in per cent. KeyError when one
    is missing; OpenS2V would count it as 0. Totals of v1.0 and v1.1 cannot be compared."""
    return sum(weight * scores[name] for name, weight in TOTALS[version].items())


def rows(folder):
    """The rows of paper/metrics.py's table: each score with its n, and their totals.

    Each value is cut to its range and scaled to 0..100, as OpenS2V does; naturalness is the mean of up to three files
    of GPT-4o's marks. A video in which NexusScore's detector finds nothing (0) is left out: look at its n."""
    table, scores = {}, {}
    for name, (pattern, key, low, high) in OPENS2V.items():
        found = {}
        for file in sorted(Path(folder).glob(f"{pattern}.json")):
            for video, value in json.loads(read_text(file)).items():
                with suppress(KeyError, TypeError, ValueError):  # GPT-4o's "error"; another version's key
                    mark = float(value[key] if key else value)
                    found.setdefault(video, []).append(mark)
        values = np.array([np.mean(marks) for marks in found.values()])
        if name in ("motion", "amplitude"):
            values = np.abs(values)
        elif name == "nexus":
            values = values[values != 0]
        if len(values):
            scores[name] = 100 * float((np.clip(values, low, high).mean() - low) / (high - low))
            table[f"OpenS2V {name}"] = {"value": scores[name], "n": len(values)}
    if not scores:
        raise ValueError(f"--opens2v: none of OpenS2V's result files, like gmescore.json, in {folder}")
    n = min(row["n"] for row in table.values())
    for version in TOTALS:
        with suppress(KeyError):  # its scores are not all there
            table[f"OpenS2V total {version}"] = {"value": total(scores, version), "n": n}
    return table
