"""Edit one batch in a process of its own and print the process's peak memory in bytes.

python -m benchmarks.edit_once harness|reference --model M --edits N --steps N [--set memit.FIELD=VALUE ...]
"""

import argparse
import sys
from collections.abc import Sequence

import torch

from benchmarks import reference
from benchmarks.measure import peak_bytes
from benchmarks.subjects import random_covariance, some_cases
from editors.contexts import sample_contexts
from editors.memit import Memit, MemitConfig
from editors.sites import sites_for
from harness import onednn
from harness.models import LoadedModel, find_model, load_model
from harness.spec import editor_settings


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.edit_once")
    parser.add_argument("side", choices=("harness", "reference"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--edits", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--set", nargs="*", default=[])
    args = parser.parse_args(argv)
    settings = editor_settings(args.model, ["memit"], [*args.set, f"memit.steps={args.steps}"])
    config = MemitConfig(**settings["memit"])
    loaded = load_model(args.model, find_model(args.model), dtype=torch.float32, device="cpu")
    (edit if args.side == "harness" else edit_one_by_one)(loaded, config, args.edits)
    print(peak_bytes())
    return 0


def edit(loaded: LoadedModel, config: MemitConfig, edits: int) -> None:
    """As the harness does it, on its packed model."""
    model, sites = loaded.model, sites_for(loaded.model)
    names = {sites.weight_name(layer) for layer in config.layers}
    onednn.pack_linears(model, leave=names)
    moment = random_covariance(_d_in(loaded, config))
    stream = Memit(config).start(model, loaded.tokenizer, covariance=lambda layer: moment, seed=0)
    stream.edit([case.request for case in some_cases(edits)[1]])


def edit_one_by_one(loaded: LoadedModel, config: MemitConfig, edits: int) -> None:
    moment = random_covariance(_d_in(loaded, config))
    contexts = sample_contexts(loaded.model, loaded.tokenizer, seed=0)
    reference.memit_batch(
        loaded.model, loaded.tokenizer, [case.request for case in some_cases(edits)[1]],
        [list(group) for group in contexts.groups], layers=config.layers, covariances=lambda layer: moment,
        weight=config.covariance_weight,
        settings=reference.TargetSettings(
            steps=config.steps, lr=config.learning_rate, clamp=config.clamp_norm_factor,
            kl=config.kl_factor, decay=config.weight_decay,
        ),
    )  # fmt: skip


def _d_in(loaded: LoadedModel, config: MemitConfig) -> int:
    return reference.weight_of(loaded.model, config.layers[0]).shape[1]


if __name__ == "__main__":
    sys.exit(main())
