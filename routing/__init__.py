"""Routing of queries between the edited and the unedited model."""

from routing.api import Decision, Embed, Router, Subject
from routing.topk import TopK, TopKConfig

ROUTERS = {"topk": (TopKConfig, TopK)}  # name -> (config, router)

__all__ = ["ROUTERS", "Decision", "Embed", "Router", "Subject", "TopK", "TopKConfig"]
