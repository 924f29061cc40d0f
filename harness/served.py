"""An edited model's folder as it answers: the base model, its changed entries, and the router's index.

``harness.edited`` writes such a folder, ``harness.ask`` and ``harness.serve`` answer from it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from harness.digested import content_digest
from harness.encoders import CachedEncoder, encoder
from harness.models import LoadedModel, find_model, load_model
from harness.paths import read_tensors
from harness.routed import RoutedModel
from harness.sparse import with_entries
from harness.spec import RunSpec, default_device
from routing import Subject, build

if TYPE_CHECKING:
    from routing import Router

MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class CorpusText:
    """One text that a router compares queries with."""

    text: str
    fact: int | str | None  # id of the fact whose prompt it is; None: an unrelated text

    @property
    def expert(self) -> str | None:
        return None if self.fact is None else "edited"


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A router's texts, what the edited ones are about, and the vectors that it needs of them."""

    texts: Sequence[CorpusText]  # by corpus position, the edited ones first
    subjects: Sequence[Subject]  # of the edited ones; none in folders of older versions
    vectors: Mapping[str, Tensor]  # text -> (d,), unit length


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a folder holds, read and checked."""

    folder: Path
    info: Mapping[str, Any]
    spec: RunSpec

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Raises ValueError in one line if the folder holds no edited model that can be read."""
        path = folder / MANIFEST
        if not path.is_file():
            raise ValueError(
                f"{str(folder)!r} holds no edited model: it has no {MANIFEST}; make one with harness.edit"
            )
        try:
            info = json.loads(path.read_text("utf-8"))
            spec = RunSpec.from_json(info["spec"])
            _ = info["model"]["digest"], info["model"]["revision"], info["run_id"], info["batches"]
            for name in (info["weights"], info["router"]):
                if Path(name).name != name:
                    raise ValueError(f"{name!r} is no file name")
            _ = info["encoder"]
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            reason = f"{type(error).__name__} {error}"
            raise ValueError(f"{path} cannot be read: {reason}; make it anew with harness.edit") from None
        return cls(folder=folder, info=info, spec=spec)

    @property
    def edits(self) -> int:
        """How many facts are in the weights."""
        return sum(map(len, self.info["batches"]))

    def entries(self) -> dict[str, Tensor]:
        """The changed entries of the model's weights."""
        return self._part("weights")[0]

    def corpus(self) -> "Corpus":
        """What the router is made of."""
        tensors, metadata = self._part("router")
        texts = [CorpusText(text=text, fact=fact) for text, fact in json.loads(metadata["texts"])]
        embedded = json.loads(metadata["embedded"]) if "embedded" in metadata else [t.text for t in texts]
        subjects = [Subject(name=name, aliases=tuple(more)) for name, *more in _names(metadata)]
        return Corpus(
            texts=texts, subjects=subjects, vectors=dict(zip(embedded, tensors["vectors"], strict=True))
        )

    def _part(self, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        """A file that the manifest names; ValueError if it is another than was written."""
        path = self.folder / self.info[name]
        if not path.is_file():
            raise ValueError(f"{path} is missing; run harness.edit --out {self.folder} to have it made anew")
        tensors, metadata = read_tensors(path)
        if metadata.get("digest") != content_digest(tensors, metadata):
            raise ValueError(
                f"{path} was changed after it was written: its digest is another; "
                f"delete it and run harness.edit --out {self.folder}"
            )
        return tensors, metadata


@dataclass(frozen=True, kw_only=True)
class Served:
    """An edited model ready to answer."""

    manifest: Manifest
    loaded: LoadedModel
    routed: RoutedModel
    corpus: Sequence[CorpusText]  # by corpus position, as ``Decision.nearest`` counts

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.loaded.tokenizer


def load_served(folder: str | Path, *, device: str | None = None) -> Served:
    """An edited model from the folder that ``harness.edit`` wrote.

    device: cpu, cuda ...; by default a GPU if there is one. Raises ValueError in one line if the folder
    cannot be read, was changed, or was made on another model or encoder than those that are here.
    """
    manifest = Manifest.read(Path(folder))
    loaded = load_base(manifest, device or default_device())
    weights = {name: loaded.model.get_parameter(name) for name in changeable(manifest.spec, loaded)}
    edited = dict(with_entries(weights, manifest.entries()))
    texts, router = router_of(manifest, device or default_device())
    routed = RoutedModel(loaded.model, loaded.tokenizer, edited, router)
    return Served(manifest=manifest, loaded=loaded, routed=routed, corpus=texts)


def load_base(manifest: Manifest, device: str) -> LoadedModel:
    """The unedited model that a folder was made on; ValueError if the one that is here is another."""
    spec, said = manifest.spec, manifest.info["model"]
    source = find_model(spec.model)
    source = replace(source, revision=source.revision or said["revision"])
    loaded = load_model(spec.model, source, dtype=getattr(torch, spec.dtype), device=device)
    for name in ("digest", "tokenizer_digest"):
        if getattr(loaded, name) != said[name]:
            raise ValueError(
                f"{str(manifest.folder)!r} was made on another model {spec.model!r}: its {name} is "
                f"{said[name][:12]}, here {getattr(loaded, name)[:12]}; give it the model it was made on"
            )
    return loaded


def changeable(spec: RunSpec, loaded: LoadedModel) -> list[str]:
    """Names of the parameters that a spec's editor may change."""
    from harness.replay import edited_parameters

    return edited_parameters(spec, loaded.model)


def router_of(manifest: Manifest, device: str) -> tuple[list[CorpusText], "Router"]:
    """The router of a folder over its stored vectors, and its texts; queries are embedded and not kept."""
    spec = manifest.spec
    embed = encoder(spec.encoder, cache=None, device=device)
    if embed.identity != manifest.info["encoder"]:
        raise ValueError(
            f"{str(manifest.folder)!r} was made with encoder {manifest.info['encoder']!r}, here "
            f"{spec.encoder!r} is {embed.identity!r}; give it the encoder it was made with"
        )
    corpus = manifest.corpus()
    index = RememberedTexts(embed, corpus.vectors)
    router = build(spec.router[0], index, spec.router_settings(spec.top_k[0]))
    edited = [one.text for one in corpus.texts if one.expert is not None]
    router.add("edited", edited, corpus.subjects or None)  # in order of position
    router.add(None, [one.text for one in corpus.texts if one.expert is None])
    return list(corpus.texts), router


def _names(metadata: Mapping[str, str]) -> list[list[str]]:
    """The names of every edited text's subject, its aliases behind it."""
    names: list[list[str]] = json.loads(metadata.get("subjects", "[]"))
    return names


class RememberedTexts:
    """Texts -> unit vectors, (n, d): those of an index, others embedded anew."""

    def __init__(self, embed: CachedEncoder, vectors: Mapping[str, Tensor] | None = None) -> None:
        """vectors: the index to begin with; None: every text asked for is remembered."""
        self._embed, self._grows, self.identity = embed, vectors is None, embed.identity
        self.vectors: dict[str, Tensor] = dict(vectors or {})

    def __call__(self, texts: Sequence[str]) -> Tensor:
        new = sorted({text for text in texts if text not in self.vectors})
        if self._grows:
            self.vectors |= dict(zip(new, self._embed(new), strict=True)) if new else {}
            return torch.stack([self.vectors[text] for text in texts])
        found = dict(zip(new, self._embed.once(new), strict=True)) if new else {}
        return torch.stack([self.vectors[text] if text in self.vectors else found[text] for text in texts])
