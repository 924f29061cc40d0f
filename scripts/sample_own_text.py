"""Sample a model's own text, the corpus ``self``, and store it where the harness finds it by name.

python scripts/sample_own_text.py --model smollm2-135m --tokens 120000
"""

import argparse
import sys

import torch

from harness import onednn
from harness.models import find_model, load_model
from harness.paths import write_lines_gz
from harness.stats import SAMPLES, sample_texts


def main() -> int:
    """Sample, store, and print the path."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=120_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    loaded = load_model(args.model, find_model(args.model), dtype=torch.float32, device="cpu")
    onednn.pack_linears(loaded.model, leave=set())
    progress = lambda done, total: print(f"{done} of {total} tokens", file=sys.stderr)
    texts = sample_texts(
        loaded.model, loaded.tokenizer, tokens=args.tokens, seed=args.seed, progress=progress
    )
    path = SAMPLES / f"{loaded.name}.jsonl.gz"
    write_lines_gz(path, ({"text": text} for text in texts))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
