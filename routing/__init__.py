"""Routing of queries between the edited and the unedited model."""

from routing.api import Decision, Router
from routing.topk import TopK, TopKConfig

ROUTERS = {"topk": (TopKConfig, TopK)}  # name -> (config, router)

__all__ = ["ROUTERS", "Decision", "Router", "TopK", "TopKConfig"]
