"""Merging of successive changes to weights."""

from merging.api import Merger
from merging.chain import shadow_chain, shadow_step
from merging.drift import preserved_key_drift
from merging.self_aware import SelfAware, SelfAwareConfig

MERGERS = {"self-aware": (SelfAwareConfig, SelfAware)}  # name -> (config, merger)

__all__ = [
    "MERGERS",
    "Merger",
    "SelfAware",
    "SelfAwareConfig",
    "preserved_key_drift",
    "shadow_chain",
    "shadow_step",
]
