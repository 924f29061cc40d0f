"""Second moments of keys: one pass over a corpus for all edited layers, kept on disk by what made them."""

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from editors.capture import packed, pad_right
from editors.linalg import NullSpace, null_space
from editors.sites import Sites, device_of, sites_for
from harness.digested import content_digest, write_digested
from harness.models import MODELS, LoadedModel
from harness.paths import cache_folder, read_lines, read_tensors, write_lines_gz

WIKIPEDIA_HUB = ("wikimedia/wikipedia", "20231101.en", "b04c8d1ceb2f5cd4588862100d08de323dccfbaa")
WIKIPEDIA_ARTICLES = 100_000  # of the protocol
SAMPLES = Path(__file__).parent / "samples"  # models' own text, shipped
SAMPLE_LENGTH = 256  # tokens of one sampled text
SAMPLE_BATCH = 64  # texts sampled together
PASS_TOKENS = 4096
DEVICE_PASSES = 32  # whose products an accelerator sums before the host takes them
EIGEN_COPIES = 6  # of a covariance that its eigenvectors need on an accelerator
REMEDY = "delete it to have it made anew, or all such files: python -m harness.vault prune --broken"
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Texts in the order in which they are used, with what identifies them."""

    name: str
    digest: str  # of the texts in order
    texts: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What a stored second moment depends on."""

    model: str  # digest of the unedited weights
    tokenizer: str  # digest
    parameter: str
    corpus: str
    corpus_digest: str
    limit: int | None  # most tokens used
    max_length: int  # tokens of a text used
    dtype: str  # of the model's activations

    @property
    def path(self) -> Path:
        return vault_path(asdict(self))


def vault_path(identity: Mapping[str, Any]) -> Path:
    """The file of what has this identity: its name is a digest of it."""
    name = hashlib.sha256(json.dumps(dict(identity), sort_keys=True).encode()).hexdigest()[:32]
    return cache_folder("stats") / f"{name}.safetensors"


@dataclass(frozen=True, kw_only=True)
class Covariance:
    """Uncentered second moment of one layer's keys."""

    matrix: Tensor  # (d_in, d_in), float64, symmetric
    tokens: int


def load_corpus(
    name: str, loaded: LoadedModel, *, limit: int | None, seed: int, progress: Progress
) -> Corpus:
    """A corpus by name (``self``, ``wikipedia``) or from a JSONL(.gz) with ``text``, in a seeded order.

    Raises ValueError for a file without texts, or if the hub cannot be reached.
    """
    if name == "self":
        texts = own_text(loaded, tokens=limit or 0, seed=seed, progress=progress)
    elif name == "wikipedia":
        texts = _wikipedia(random.Random(1))
    else:
        texts = read_texts(name)
        random.Random(seed).shuffle(texts)
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    return Corpus(
        name=name if name in ("self", "wikipedia") else Path(name).name, digest=digest, texts=tuple(texts)
    )


def read_texts(path: str) -> list[str]:
    """The texts of a JSONL(.gz) in file order; ValueError naming the record without one."""
    texts: list[str] = []
    for number, record in enumerate(read_lines(Path(path)), start=1):
        if not isinstance(record.get("text"), str) or not record["text"].strip():
            raise ValueError(f"statistics corpus {path!r}, record {number}: field 'text' is missing or empty")
        texts.append(record["text"])
    return texts


def _wikipedia(generator: random.Random) -> list[str]:
    from datasets import load_dataset

    name, config, revision = WIKIPEDIA_HUB
    try:
        articles = load_dataset(name, config, revision=revision, split="train")
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"statistics corpus wikipedia ({name}@{revision[:8]}) cannot be fetched: {reason} -- use "
            "--stats self or the path of a JSONL with 'text'"
        ) from None
    order = list(range(len(articles)))
    generator.shuffle(order)
    return [articles[i]["text"] for i in order[:WIKIPEDIA_ARTICLES]]


def own_text(loaded: LoadedModel, *, tokens: int, seed: int, progress: Progress) -> list[str]:
    """At least ``tokens`` tokens of text sampled from the unedited model itself.

    Shipped for the default model, whatever the seed; otherwise sampled once and kept by model, seed and
    count.
    """
    shipped = SAMPLES / f"{loaded.name}.jsonl.gz"
    if loaded.name in MODELS and shipped.is_file():  # else the name is a path
        texts = [record["text"] for record in read_lines(shipped)]
        if sum(len(loaded.tokenizer(text)["input_ids"]) for text in texts) >= tokens:
            return texts
    name = f"{loaded.digest[:16]}-{loaded.tokenizer_digest[:8]}-{seed}-{tokens}.jsonl.gz"
    kept = cache_folder("samples") / name
    if not kept.is_file():
        texts = list(
            sample_texts(loaded.model, loaded.tokenizer, tokens=tokens, seed=seed, progress=progress)
        )
        write_lines_gz(kept, ({"text": text} for text in texts))
    try:
        return read_texts(str(kept))
    except ValueError as error:
        raise ValueError(f"sampled text in the cache: {error}; {REMEDY}") from None


def context_length(model: PreTrainedModel) -> int:
    """Most positions of a text; as the protocol, 4096 for Qwen2, else at most 8192."""
    most = 4096 if model.config.model_type == "qwen2" else 8192
    return min(getattr(model.config, "max_position_embeddings", most), most)


def _document_start(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id before a document's first token: <|endoftext|> where it is known, else BOS, else EOS."""
    vocabulary = tokenizer.get_vocab()
    if "<|endoftext|>" in vocabulary:
        return int(vocabulary["<|endoftext|>"])
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if not isinstance(start, int):
        raise ValueError(
            "the tokenizer has neither BOS nor EOS to begin a text with; use another --stats corpus"
        )
    return start


@torch.no_grad()
def sample_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, tokens: int, seed: int, progress: Progress
) -> Iterator[str]:
    """Texts a model writes from its start-of-document token on, sampled at temperature 1 without cuts."""
    start = _document_start(tokenizer)
    device = device_of(model)
    generate: Any = model.generate
    length = min(SAMPLE_LENGTH, context_length(model) - 1)
    settings = GenerationConfig(  # type: ignore[no-untyped-call]  # none of the model's own: they may penalise repetition or cut
        do_sample=True, top_k=0, top_p=1.0, temperature=1.0, repetition_penalty=1.0,
        min_new_tokens=length, max_new_tokens=length,
        eos_token_id=model.generation_config.eos_token_id, pad_token_id=start,
    )  # fmt: skip
    made = 0
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        while made < tokens:
            before = made
            ids = torch.full((SAMPLE_BATCH, 1), start, device=device)
            out = generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
            for row in out[:, 1:]:
                text = str(tokenizer.decode(row, skip_special_tokens=True)).strip()
                if text:
                    made += len(tokenizer(text)["input_ids"])
                    yield text
                if made >= tokens:
                    return
            progress(min(made, tokens), tokens)
            if made == before:
                raise ValueError("the model writes empty texts only; use another --stats corpus")


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Second moments of a model's keys and what is made of them, read from disk whenever asked for."""

    corpus: Corpus
    identities: Mapping[int, Identity]  # by layer
    tokens: int
    device: torch.device  # of the model

    def covariance(self, layer: int) -> Tensor:
        """(d_in, d_in), float64, on the CPU."""
        return read_covariance(self.identities[layer]).matrix

    def null_space(self, layer: int, threshold: float) -> NullSpace:
        """AlphaEdit's projector of a layer, on the CPU: made once, and kept by covariance and threshold.

        The eigenvectors of a Llama-3-8B's layer take a minute on 16 cores and 0.8 GB on disk.
        """
        identity = asdict(self.identities[layer]) | {"nullspace_threshold": threshold}
        path = vault_path(identity)
        if not path.is_file():
            space = null_space(self._placed(self.covariance(layer)), threshold)
            said = {"identity": json.dumps(identity, sort_keys=True), "complement": str(space.complement)}
            write_digested(path, {"basis": space.basis}, said)
        tensors, said = read_kept(path, identity)
        return NullSpace(tensors["basis"], said["complement"] == "True")

    def _placed(self, covariance: Tensor) -> Tensor:
        """On the model's device where that has room for its eigenvectors."""
        if self.device.type == "cuda":
            needed = EIGEN_COPIES * covariance.numel() * covariance.element_size()
            if torch.cuda.mem_get_info(self.device)[0] > needed:
                return covariance.to(self.device)
        return covariance


def gather_statistics(
    loaded: LoadedModel, layers: Sequence[int], corpus: Corpus, *, limit: int | None, progress: Progress
) -> Statistics:
    """The statistics of some layers, from disk where they are, else from one pass for the rest.

    Raises ValueError if a stored file is not what its name says, or the corpus is too small.
    """
    sites = sites_for(loaded.model)
    max_length = context_length(loaded.model)
    identities = {
        layer: Identity(
            model=loaded.digest, tokenizer=loaded.tokenizer_digest,
            parameter=sites.weight_name(layer), corpus=corpus.name,
            corpus_digest=corpus.digest, limit=limit, max_length=max_length, dtype=str(loaded.model.dtype),
        )
        for layer in layers
    }  # fmt: skip
    kept = {
        layer: read_covariance(identity).tokens
        for layer, identity in identities.items()
        if identity.path.is_file()
    }
    missing = [layer for layer in layers if layer not in kept]
    if missing:
        gathered = gather_covariances(
            loaded.model, loaded.tokenizer, missing, corpus.texts, limit=limit, max_length=max_length,
            progress=progress,
        )  # fmt: skip
        for layer, covariance in gathered.items():
            write_covariance(identities[layer], covariance)
            kept[layer] = covariance.tokens
    return Statistics(
        corpus=corpus, identities=identities, tokens=kept[layers[0]], device=device_of(loaded.model)
    )


def write_covariance(identity: Identity, covariance: Covariance) -> None:
    """Store a second moment with what it depends on."""
    metadata = {"identity": json.dumps(asdict(identity), sort_keys=True), "tokens": str(covariance.tokens)}
    write_digested(identity.path, {"covariance": covariance.matrix}, metadata)


def read_covariance(identity: Identity) -> Covariance:
    """A stored second moment; ValueError if the file is broken or belongs to something else."""
    tensors, metadata = read_kept(identity.path, asdict(identity))
    return Covariance(matrix=tensors["covariance"], tokens=int(metadata["tokens"]))


def read_kept(
    path: Path, identity: Mapping[str, Any] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What a file of statistics holds and says, checked; ValueError in one line if it is not as it should be.

    identity: what it must be of; None: what its name says.
    """
    try:
        tensors, metadata = read_tensors(path)
        written = dict(json.loads(metadata["identity"]))
        kind = "basis" if "nullspace_threshold" in written else "covariance"
        matrix = tensors[kind]
        _ = int(metadata["tokens"]) if kind == "covariance" else metadata["complement"]
    except Exception as error:
        raise ValueError(f"statistics file {path} is broken ({error}); {REMEDY}") from None
    if written != identity if identity is not None else vault_path(written) != path:
        raise ValueError(f"statistics file {path} is of {metadata['identity']}; {REMEDY}")
    if not torch.isfinite(matrix).all():
        raise ValueError(f"statistics file {path} has entries that are not finite; {REMEDY}")
    if metadata.get("digest", "") not in ("", content_digest(tensors, metadata)):  # older ones have none
        raise ValueError(f"statistics file {path} was changed after it was written; {REMEDY}")
    return tensors, metadata


class _Enough(Exception):
    pass


@torch.no_grad()
def gather_covariances(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layers: Sequence[int],
    texts: Sequence[str],
    *,
    limit: int | None,
    max_length: int,
    progress: Progress,
) -> dict[int, Covariance]:
    """C = sum k k^T / N over all positions of all texts (ALGORITHMS 3.1), for all layers in one pass.

    The forward stops at the highest layer. Texts of similar length run together, padding left out of the
    sums. Products of a pass are float32, or the activations' dtype if better; sums over passes float64.
    """
    sites = sites_for(model)
    sites.check_layers(model, tuple(layers))
    rows = _token_rows(tokenizer, texts, limit=limit, max_length=max_length)
    total = sum(len(row) for row in rows)
    if not total:
        raise ValueError("the statistics corpus has no tokens")
    device = device_of(model)
    sums = {layer: _Sum() for layer in layers}
    done = 0
    for part in packed([len(row) for row in rows], PASS_TOKENS):
        ids, mask = pad_right([rows[i] for i in part], device)
        _add_keys(model, sites, sums, ids, mask)
        done += int(mask.sum())
        progress(done, total)
    found: dict[int, Covariance] = {}
    for layer in layers:
        whole = sums.pop(layer).total()
        found[layer] = Covariance(matrix=(whole + whole.T) / (2 * total), tokens=total)
    return found


class _Sum:
    """sum k k^T, float64 in host memory; an accelerator first sums a few passes in the keys' dtype."""

    def __init__(self) -> None:
        self.whole: Tensor | None = None  # (d_in, d_in)
        self.part: Tensor | None = None
        self.passes = 0

    def add(self, keys: Tensor) -> None:
        """keys: (tokens, d_in), of one pass."""
        if self.part is None:
            self.part = keys.T @ keys
        else:
            self.part.addmm_(keys.T, keys)
        self.passes += 1
        if self.part.device.type == "cpu" or self.passes == DEVICE_PASSES:
            self._settle()

    def total(self) -> Tensor:
        self._settle()
        assert self.whole is not None
        return self.whole

    def _settle(self) -> None:
        if self.part is not None:
            part = self.part.cpu().double()
            self.whole = part if self.whole is None else self.whole.add_(part)
        self.part, self.passes = None, 0


def _token_rows(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, limit: int | None, max_length: int
) -> list[list[int]]:
    rows: list[list[int]] = []
    left = limit if limit is not None else float("inf")
    for text in texts:
        if left <= 0:
            break
        row: list[int] = tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
        row = row[: int(min(left, len(row)))]
        left -= len(row)
        if row:
            rows.append(row)
    return rows


def _add_keys(
    model: PreTrainedModel, sites: Sites, sums: Mapping[int, _Sum], ids: Tensor, mask: Tensor
) -> None:
    """Add the keys at all real positions to each layer's sum as its projection is reached.

    Nothing above the highest layer's projection is computed, and one layer's keys are alive at a time.
    """
    top = max(sums)
    real = mask.bool().flatten()

    def take(module: nn.Module, args: tuple[Tensor, ...], layer: int) -> None:
        keys = args[0].reshape(len(real), -1)[real]
        sums[layer].add(keys.to(torch.promote_types(torch.float32, keys.dtype)))
        if layer == top:
            raise _Enough

    with ExitStack() as stack:
        for layer in sums:
            hook = partial(take, layer=layer)
            stack.callback(
                sites.projection(model, layer).register_forward_pre_hook(hook, prepend=True).remove
            )
        stack.enter_context(suppress(_Enough))
        model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
