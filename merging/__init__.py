"""Merging of successive changes to weights."""

from merging.api import Batch, Keys, Merger, MergeStream
from merging.chain import MergeChain
from merging.controls import (
    Dare,
    DareConfig,
    Ema,
    EmaConfig,
    Energy,
    EnergyConfig,
    LowRank,
    LowRankConfig,
    Random,
    RandomConfig,
    Shrink,
    ShrinkConfig,
)
from merging.drift import preserved_key_drift
from merging.refit import Refit, RefitConfig
from merging.self_aware import SelfAware, SelfAwareConfig
from merging.ties import Ties, TiesConfig

MERGERS = {  # name -> (config, merger)
    "self-aware": (SelfAwareConfig, SelfAware),
    "refit": (RefitConfig, Refit),
    "shrink": (ShrinkConfig, Shrink),
    "ema": (EmaConfig, Ema),
    "ties": (TiesConfig, Ties),
    "dare": (DareConfig, Dare),
    "random": (RandomConfig, Random),
    "low-rank": (LowRankConfig, LowRank),
    "energy": (EnergyConfig, Energy),
}

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
]
