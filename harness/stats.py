"""Second moments of keys: one pass over a corpus for all edited layers, kept on disk by what made them."""

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from editors.capture import inputs_of, packed, pad_right
from editors.sites import Sites, device_of, sites_for
from harness.models import LoadedModel
from harness.paths import cache_folder, read_lines, write_lines_gz, write_tensors

WIKIPEDIA_HUB = ("wikimedia/wikipedia", "20231101.en", "b04c8d1ceb2f5cd4588862100d08de323dccfbaa")
WIKIPEDIA_ARTICLES = 100_000  # of the protocol
SAMPLES = Path(__file__).parent / "samples"  # models' own text, shipped
SAMPLE_LENGTH = 256  # tokens of one sampled text
SAMPLE_BATCH = 64  # texts sampled together
PASS_TOKENS = 4096
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
        name = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:32]
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
    if shipped.is_file():
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
    return [record["text"] for record in read_lines(kept)]


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


def covariances(
    loaded: LoadedModel, layers: Sequence[int], corpus: Corpus, *, limit: int | None, progress: Progress
) -> dict[int, Covariance]:
    """Second moments of the keys of some layers, from disk where they are, else in one pass for the rest.

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
    found = {
        layer: read_covariance(identity) for layer, identity in identities.items() if identity.path.is_file()
    }
    missing = [layer for layer in layers if layer not in found]
    if missing:
        gathered = gather_covariances(
            loaded.model, loaded.tokenizer, missing, corpus.texts, limit=limit, max_length=max_length,
            progress=progress,
        )  # fmt: skip
        for layer, covariance in gathered.items():
            write_covariance(identities[layer], covariance)
        found.update(gathered)
    return {layer: found[layer] for layer in layers}


def write_covariance(identity: Identity, covariance: Covariance) -> None:
    """Store a second moment with what it depends on."""
    metadata = {"identity": json.dumps(asdict(identity), sort_keys=True), "tokens": str(covariance.tokens)}
    write_tensors(identity.path, {"covariance": covariance.matrix}, metadata)


def read_covariance(identity: Identity) -> Covariance:
    """A stored second moment; ValueError if the file is broken or belongs to something else."""
    remedy = "delete it to have it made anew"
    try:
        with safe_open(identity.path, framework="pt") as file:
            metadata, matrix = file.metadata() or {}, file.get_tensor("covariance")
        written, tokens = json.loads(metadata["identity"]), int(metadata["tokens"])
    except Exception as error:
        raise ValueError(f"statistics file {identity.path} is broken ({error}); {remedy}") from None
    if written != asdict(identity):
        raise ValueError(f"statistics file {identity.path} is of {metadata['identity']}; {remedy}")
    if not torch.isfinite(matrix).all():
        raise ValueError(f"statistics file {identity.path} has entries that are not finite; {remedy}")
    return Covariance(matrix=matrix, tokens=tokens)


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
    sums: dict[int, Tensor] = {}
    done = 0
    for part in packed([len(row) for row in rows], PASS_TOKENS):
        ids, mask = pad_right([rows[i] for i in part], device)
        for layer, keys in _keys_until(model, sites, layers, ids, mask).items():
            square = (keys.T @ keys).double()
            if layer in sums:
                sums[layer] += square
            else:
                sums[layer] = square
        done += int(mask.sum())
        progress(done, total)
    return {
        layer: Covariance(matrix=((s + s.T) / (2 * total)).cpu(), tokens=total) for layer, s in sums.items()
    }


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


def _keys_until(
    model: PreTrainedModel, sites: Sites, layers: Sequence[int], ids: Tensor, mask: Tensor
) -> dict[int, Tensor]:
    """Layer -> (real positions, d_in) keys; nothing above the highest layer's projection is computed."""

    def stop(module: nn.Module, args: object) -> None:
        raise _Enough

    keys: dict[int, Tensor] = {}
    top = max(layers)
    real = mask.bool().flatten()
    with ExitStack() as stack:
        seen = {layer: stack.enter_context(inputs_of(sites.projection(model, layer))) for layer in layers}
        stack.callback(sites.projection(model, top).register_forward_pre_hook(stop).remove)
        stack.enter_context(suppress(_Enough))
        model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    for layer in layers:
        key = seen[layer][0].reshape(len(real), -1)[real]
        keys[layer] = key.to(torch.promote_types(torch.float32, key.dtype))
    return keys
