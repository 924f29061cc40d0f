"""What a run must never do: unpickle, run given text, keep a key, write outside of its folder."""

import ast
import json
import os
import pickle
import shutil
import threading
import tomllib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from filelock import FileLock

from benchmarks.tiny import tiny_records, tiny_texts
from harness import ablation
from harness.folder import RunFolder, kernels
from harness.models import find_model, load_model
from harness.paths import read_yaml

ROOT = Path(__file__).parents[2]
PRODUCT = [
    *(path for name in ("harness", "editors", "merging", "routing", "tasks", "reports", "scripts")
      for path in sorted((ROOT / name).rglob("*.py"))),
    ROOT / "noxfile.py",
]  # fmt: skip
PICKLING = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
FORBIDDEN = {
    "eval", "exec", "os.popen", "os.system", "subprocess.getoutput", "subprocess.getstatusoutput",
    "torch.load", "yaml.full_load", "yaml.load", "yaml.load_all", "yaml.unsafe_load",
    "yaml.Loader", "yaml.CLoader", "yaml.FullLoader", "yaml.UnsafeLoader",
}  # fmt: skip
FLAGS = {"allow_pickle", "shell", "trust_remote_code"}  # may be given as False only
KEYS = {"OPENAI_API_KEY": "sk-marker-4b1d7e", "HF_TOKEN": "hf_marker_93ac02"}

Write = Callable[..., Path]


# -- the source ---------------------------------------------------------------------------------------------


def offences(source: str) -> list[str]:
    """What a file does of all that no file of the product may do."""
    tree = ast.parse(source)
    real, found = {}, []  # local name -> what it stands for
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in PICKLING]
            real |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            found += [module] * (module.split(".")[0] in PICKLING)
            real |= {alias.asname or alias.name: f"{module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            first, dot, rest = ast.unparse(node).partition(".")
            name = real.get(first, first) + dot + rest
            found += [name] * (name in FORBIDDEN)
        elif isinstance(node, ast.keyword) and node.arg in FLAGS:
            off = isinstance(node.value, ast.Constant) and node.value.value is False
            found += [] if off else [f"{node.arg}={ast.unparse(node.value)}"]
        elif isinstance(node, ast.Dict):
            found += [key.value for key in node.keys if isinstance(key, ast.Constant) and key.value in FLAGS]
    return found


def test_no_file_unpickles_or_runs_given_text() -> None:
    found = {str(path.relative_to(ROOT)): offences(path.read_text("utf-8")) for path in PRODUCT}
    assert len(found) > 80
    assert not {path: what for path, what in found.items() if what}


@pytest.mark.parametrize(
    "source",
    ["import pickle", "import joblib.numpy_pickle as p", "from dill import loads", "torch.load(path)",
     "from torch import load\nload(path)", "import torch as t\nt.load(path, weights_only=True)",
     "np.load(path, allow_pickle=True)", "eval(text)", "f = exec", "subprocess.run(text, shell=True)",
     "subprocess.run(text, shell=given)", "os.system(text)", "yaml.load(text, yaml.SafeLoader)",
     "class L(yaml.UnsafeLoader): ...", "AutoModel.from_pretrained(name, trust_remote_code=True)",
     "load(name, **{'trust_remote_code': True})"],
)  # fmt: skip
def test_what_is_forbidden_is_noticed(source: str) -> None:
    assert offences(source)


def test_what_is_allowed_is_not_taken_for_it() -> None:
    source = "model.eval()\nyaml.safe_load(text)\nload(name, trust_remote_code=False)\nnp.load(path)"
    assert not offences(source)


def test_remote_code_is_no_choice() -> None:
    """No flag of the contract turns it on, so nothing in the product may name one."""
    assert "trust" not in ablation._parser().format_help()


def test_every_locked_package_has_hashes() -> None:
    packages = tomllib.loads((ROOT / "uv.lock").read_text("utf-8"))["package"]
    assert len(packages) > 100
    for package in packages:
        if package["source"] == {"editable": "."}:
            continue
        assert package["source"].keys() == {"registry"}, package["name"]
        files = [*package.get("wheels", ()), *([package["sdist"]] if "sdist" in package else ())]
        assert files, package["name"]
        assert all(file["hash"].startswith("sha256:") for file in files), package["name"]


def test_yaml_builds_no_objects(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"seed: !!python/object/apply:os.mkdir ['{tmp_path}/made']\n")
    with pytest.raises(ValueError, match="cannot be read"):
        read_yaml(tmp_path / "run.yaml", "config")
    assert not (tmp_path / "made").exists()
    yaml.unsafe_load((tmp_path / "run.yaml").read_text())
    assert (tmp_path / "made").exists()  # so it would have been


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.made),)


def test_pickled_weights_are_refused(
    tmp_path: Path,
    tiny_folder: Path,
    write_jsonl: Write,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "never asked")
    model, made = Path(shutil.copytree(tiny_folder, tmp_path / "model")), tmp_path / "made"
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps({"lm_head.weight": Trap(made)}, protocol=2))
    assert ablation.main(arguments(model, write_jsonl, tmp_path / "run")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("harness.ablation: model ") and "safetensors" in error
    assert not made.exists()


@pytest.mark.parametrize("kind", ["mine", "gpt2"])
def test_code_beside_the_weights_is_not_run_whoever_says_yes(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Remote code is off always: no flag of the contract turns it on."""
    model, made = Path(shutil.copytree(tiny_folder, tmp_path / "model")), tmp_path / "made"
    (model / "code.py").write_text(f"import os\nos.mkdir({str(made)!r})\n")
    for file, names in (("config.json", ("AutoConfig", "AutoModelForCausalLM")),
                        ("tokenizer_config.json", ("AutoTokenizer",))):  # fmt: skip
        values = json.loads((model / file).read_text())
        values["auto_map"] = {name: [None, "code.Mine"] if "Tok" in name else "code.Mine" for name in names}
        (model / file).write_text(
            json.dumps(values | ({"model_type": kind} if file == "config.json" else {}))
        )
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    try:
        load_model("model", find_model(str(model)), dtype=torch.float32, device="cpu")
    except ValueError as error:
        assert kind == "mine" and "\n" not in str(error)
    assert not made.exists()


# -- keys ---------------------------------------------------------------------------------------------------


class Api(BaseHTTPRequestHandler):
    """Embeds by character counts, or refuses and says the key it was given."""

    refuses = False

    def do_POST(self) -> None:
        texts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["input"]
        vectors = [[len(text), *(text.count(letter) for letter in "aeiou")] for text in texts]
        answer: dict[str, Any] = {
            "object": "list", "model": "small",
            "data": [{"object": "embedding", "index": i, "embedding": v} for i, v in enumerate(vectors)],
        }  # fmt: skip
        if self.refuses:
            said = self.headers["Authorization"].removeprefix("Bearer ")
            answer = {"error": {"message": f"no such key: {said}; {said}", "code": said}}
        content = json.dumps(answer).encode()
        self.send_response(401 if self.refuses else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Api]]:
    handler = type("Handler", (Api,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    for name, key in KEYS.items():
        monkeypatch.setenv(name, key)
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
    yield handler
    server.shutdown()
    thread.join()
    server.server_close()


def arguments(model: Path, write_jsonl: Write, out: Path) -> list[str]:
    """A small run of records whose ids look like paths."""
    records = [{**record, "case_id": f"../../escaped-{i}"} for i, record in enumerate(tiny_records(12))]
    return [
        "--model", str(model), "--dataset", str(write_jsonl(records)),
        "--stats", str(write_jsonl([{"text": text} for text in tiny_texts(60)], "texts.jsonl")),
        "--editors", "memit", "--set", "memit.layers=1,2", "memit.steps=2", "memit.covariance_weight=1",
        "--batch-size", "2", "--num-batches", "2", "--cells", "baseline", "+R", "--encoder", "openai:small",
        "--device", "cpu", "--dtype", "float32", "--out", str(out), "--verbose",
    ]  # fmt: skip


@pytest.mark.parametrize("refuses", [False, True])
def test_keys_and_case_ids_are_kept_where_they_belong(
    api: type[Api],
    tmp_path: Path,
    tiny_folder: Path,
    write_jsonl: Write,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    refuses: bool,
) -> None:
    """Keys in the environment alone, whatever the service says; ids inside of files, never in their names."""
    caplog.set_level("INFO")
    api.refuses = refuses
    place = tmp_path / "far" / "down"  # from where ../../ leads to tmp_path
    assert ablation.main(arguments(tiny_folder, write_jsonl, place / "run")) == int(refuses)
    printed = capfd.readouterr()
    told = (printed.out + printed.err + caplog.text).encode()
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert any("embeddings" in path.parts for path in files) is not refuses
    for key in KEYS.values():
        assert key.encode() not in told
        assert not [path for path, content in files.items() if key.encode() in content or key in str(path)]
    errors = {json.loads(line)["error"] for line in files[place / "run" / "records.jsonl"].splitlines()}
    assert any("***" in (error or "") for error in errors) is refuses

    assert not [path for path in tmp_path.rglob("*") if "escaped" in path.name]
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "far", "records.jsonl", "texts.jsonl"}
    assert "../../escaped-" in files[place / "run" / "run.json"].decode()
    info = json.loads(files[place / "run" / "run.json"])
    assert info["provenance"]["kernels"] == info["sessions"][0]["kernels"] == kernels("cpu")


# -- paths --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../../x", "..", ".", "a/../../x", "a/b", "{tmp}/x", "a/"])
def test_a_run_of_a_config_file_stays_in_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    name = name.replace("{tmp}", str(tmp_path))
    config = {"out": str(tmp_path / "far" / "down"), "device": "cpu", "runs": {name: {"seed": 1}}}
    (tmp_path / "runs.yaml").write_text(yaml.safe_dump(config))
    assert ablation.main(["--config", str(tmp_path / "runs.yaml")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"a run is named {name!r}; it takes the name of a folder" in error
    assert [path.name for path in tmp_path.iterdir()] == ["runs.yaml"]


# -- what changes bits --------------------------------------------------------------------------------------


def test_other_kernels_are_recorded_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MKL_CBWR", raising=False)
    old, first = {"threads": 1}, {"threads": 1, "kernels": kernels("cpu")}
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    second = {"threads": 1, "kernels": kernels("cpu")}
    assert second["kernels"]["environment"]["MKL_CBWR"] == "COMPATIBLE"

    def notes(*sessions: dict[str, Any]) -> list[str]:
        return RunFolder(tmp_path, {"sessions": list(sessions)}, FileLock(tmp_path / ".lock")).notes

    assert notes(first) == notes(first, first) == notes(old, first) == []
    assert "changed kernels" in notes(first, second)[0]
    assert "changed threads" in notes(old, second | {"threads": 2})[0]
    assert "changed kernels" in notes(old, first, second)[0]
