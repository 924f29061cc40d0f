"""Merging of successive changes to weights."""

from merging.api import Batch, Keys, Merger, MergeStream
from merging.chain import MergeChain, shadow_chain
from merging.drift import preserved_key_drift
from merging.self_aware import SelfAware, SelfAwareConfig

MERGERS = {"self-aware": (SelfAwareConfig, SelfAware)}  # name -> (config, merger)

__all__ = [
    "MERGERS",
    "Batch",
    "Keys",
    "MergeChain",
    "MergeStream",
    "Merger",
    "SelfAware",
    "SelfAwareConfig",
    "preserved_key_drift",
    "shadow_chain",
]
