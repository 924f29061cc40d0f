"""Routing of queries between the edited and the unedited model."""

from routing.alias import AliasConfig, AliasRouter
from routing.api import Decision, Embed, Router, Subject
from routing.calibrated import Calibrated, CalibratedConfig
from routing.composed import Composed
from routing.named import ROUTERS, Settings, build, check, fields
from routing.relation import RelationConfig, RelationRouter
from routing.subject import SubjectConfig, SubjectRouter
from routing.topk import TopK, TopKConfig

__all__ = [
    "ROUTERS", "AliasConfig", "AliasRouter", "Calibrated", "CalibratedConfig", "Composed", "Decision",
    "Embed", "RelationConfig", "RelationRouter", "Router", "Settings", "Subject", "SubjectConfig",
    "SubjectRouter", "TopK", "TopKConfig", "build", "check", "fields",
]  # fmt: skip
