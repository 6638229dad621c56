"""Writes `scores.json`: answers of the evaluation harness's own Hugging Face model, for `convert.scores`.

    PYTHONPATH=tests:. python -c 'from command_line import *; write_model(Path("/tmp/tiny"))'
    /path/to/python-with-torch-and-lm_eval tests/goldens/make_scores.py /tmp/tiny

The first line writes the tests' tiny model. ``scores.json`` holds every request with its answer. Created with
torch 2.13.0, transformers 5.24.0, lm_eval 0.4.13.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

KINDS = ("loglikelihood", "loglikelihood_rolling", "generate_until")


def text(rng: np.random.Generator, count: int) -> str:
    """Random words that the tokenizer knows."""
    return " ".join(f"w{i}" for i in rng.integers(3, 64, count))


def requests() -> dict[str, list[tuple]]:
    """Arguments of every request, by kind; some are longer than the model's 64 positions."""
    rng = np.random.default_rng(0)
    pairs = [
        (text(rng, a), " " + text(rng, b)) for a, b in [(5, 3), (1, 1), (30, 20), (8, 2), (63, 2), (90, 9)]
    ]
    pairs += [
        ("", text(rng, 4)),
        (text(rng, 4) + " ", text(rng, 1)),
        ("<s> " + text(rng, 3), " " + text(rng, 2)),
    ]
    rolling = [(text(rng, n),) for n in (1, 12, 63, 64, 65, 150)]
    greedy = {"do_sample": False, "max_gen_toks": 12}
    prompts = [text(rng, n) for n in (3, 17, 40, 80)]
    written = [(prompt, {"until": ["</s>"], **greedy}) for prompt in prompts]
    written += [(prompts[0], {"until": ["w1", "w2"], **greedy}), (prompts[1], {"until": "w4", **greedy})]
    return dict(zip(KINDS, (pairs, rolling, written)))


def main() -> None:
    """Writes the file."""
    model = HFLM(pretrained=sys.argv[1], device="cpu", dtype="float32", batch_size=1)
    found = {}
    for kind, rows in reversed(requests().items()):
        if kind == "loglikelihood":  # the model's own continuation is the greedy one
            (prompt, _), answer = found["generate_until"][0]
            rows.append((prompt, " " + " ".join(answer.split()[:3])))
        asked = [Instance(kind, {}, row, i) for i, row in enumerate(rows)]
        found[kind] = [list(pair) for pair in zip(rows, getattr(model, kind)(asked))]
    for package in ("torch", "transformers", "lm_eval"):
        print(package, version(package))
    file = Path(__file__).parent / "scores.json"
    file.write_text(json.dumps(found, indent=0) + "\n")


if __name__ == "__main__":
    main()
