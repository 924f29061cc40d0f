"""Fixtures every test folder uses; the builders are in ``benchmarks/tiny.py``."""

from collections.abc import Callable

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from benchmarks import tiny
from editors.api import EditRequest


@pytest.fixture(scope="session")
def tiny_models() -> Callable[..., PreTrainedModel]:
    """``tiny_models("llama", dtype=torch.float64, seed=1)``: a fresh model on every call."""
    return tiny.tiny_model


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """``tiny_tokenizer(bos=True)``: a fresh tokenizer on every call."""
    return tiny.tiny_tokenizer


@pytest.fixture(scope="session")
def requests() -> Callable[..., list[EditRequest]]:
    """``requests(4, seed=0)``: made-up facts with unequal prompts, subjects and targets."""
    return tiny.tiny_requests


@pytest.fixture(scope="session")
def templates() -> list[list[str]]:
    """Context templates, one bare group and one of five."""
    return [list(group) for group in tiny.TEMPLATES]
