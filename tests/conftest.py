"""Fixtures every test folder uses; the builders are in ``benchmarks/tiny.py``."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from benchmarks import tiny
from editors.api import EditRequest

# How long an example takes to make and to run depends on what else the machine does.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


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


@pytest.fixture(scope="session")
def glue_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up records of the six general tasks in the form of the real files; not to be changed."""
    folder = tmp_path_factory.mktemp("glue")
    draw = random.Random(0)
    words = " ".join(tiny.tiny_texts(20)).split()

    def text() -> str:
        return " ".join(draw.choices(words, k=draw.randint(2, 5)))

    for name in ("sst2", "cola", "mrpc", "rte", "nli", "mmlu"):
        records: list[dict[str, Any]] = []
        for i in range(112):
            record: dict[str, Any] = {"id": f"{name}-{i}", "label": 1 - i % 2}
            if name in ("sst2", "cola"):
                record |= {"sentence": f'{{{{ {text()} }}}} <b> & "it" ' if i == 10 else text()}
            elif name == "mmlu":
                texts = [text() for _ in range(4)]
                record |= {"subject": "town", "question": text(), "choices": texts, "label": i % 4}
            else:
                record |= {"sentence1": text(), "sentence2": text()}
            records.append(record)
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"glue_{name}.jsonl").write_text(lines, encoding="utf-8")
    return folder
