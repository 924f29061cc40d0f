"""What a batch changed comes back from its file as it was."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers.pytorch_utils import Conv1D

from editors import LowRank, dense
from harness.deltas import (
    BatchCheckpoint,
    delta_path,
    read_delta,
    read_state,
    state_path,
    write_delta,
    write_state,
)


def low_rank(rows: int, columns: int, rank: int = 3) -> LowRank:
    torch.manual_seed(rows)
    return LowRank(torch.randn(rows, rank), torch.randn(rank, columns))


def test_files_are_named_by_chain_and_batch() -> None:
    assert delta_path(Path("run"), "memit", 1) == Path("run/deltas/memit/batch-0001.safetensors")
    assert delta_path(Path("run"), "memit+MM", 12) == Path("run/deltas/memit+MM/batch-0012.safetensors")
    assert state_path(Path("run"), "memit") == Path("run/state/memit.safetensors")


def test_low_rank_and_dense_changes_come_back_to_the_bit(tmp_path: Path) -> None:
    delta = {"h.1.weight": low_rank(8, 5), "h.2.weight": torch.randn(4, 6), "h.3.weight": low_rank(5, 8)}
    path = tmp_path / "deep" / "delta.safetensors"
    write_delta(path, delta, editor="memit", case_ids=[1])
    found = read_delta(path, torch.device("cpu"))[0]
    assert found.keys() == delta.keys()
    for name, change in delta.items():
        assert torch.equal(found[name], dense(change))
    assert torch.equal(found["h.2.weight"], delta["h.2.weight"])


def test_factors_are_stored_under_the_names_of_the_contract(tmp_path: Path) -> None:
    path = tmp_path / "delta.safetensors"
    change = low_rank(8, 5)
    ids = [3, "Q42", 17]
    write_delta(
        path, {"a.weight": change, "b": torch.ones(2)}, editor="alphaedit", case_ids=ids, digest_after="x"
    )
    with safe_open(path, framework="pt") as file:
        assert sorted(file.keys()) == ["a.weight.left", "a.weight.right", "b"]
        assert torch.equal(file.get_tensor("a.weight.left"), change.left)
        assert torch.equal(file.get_tensor("a.weight.right"), change.right)
        metadata = file.metadata()
    assert json.loads(metadata["case_ids"]) == ids
    assert (metadata["editor"], metadata["digest_after"]) == ("alphaedit", "x")


def test_a_conv1d_change_has_the_stored_orientation(tmp_path: Path) -> None:
    """left @ right is (d_in, d_out) there; adding it moves the output by x @ left @ right."""
    module = Conv1D(5, 8)
    change = low_rank(8, 5)
    path = tmp_path / "delta.safetensors"
    write_delta(path, {"weight": change}, editor="memit", case_ids=[])
    x = torch.randn(3, 8)
    before = module(x)
    with torch.no_grad():
        module.weight += read_delta(path, torch.device("cpu"))[0]["weight"]
    torch.testing.assert_close(module(x) - before, x @ change.left @ change.right, rtol=1e-4, atol=1e-4)


def test_a_parameter_whose_name_ends_like_a_factor_is_still_itself(tmp_path: Path) -> None:
    delta = {"norm.left": torch.ones(3)}
    path = tmp_path / "delta.safetensors"
    write_delta(path, delta, editor="memit", case_ids=[])
    with pytest.raises(KeyError):
        read_delta(path, torch.device("cpu"))[0]  # refused rather than taken for something else


def test_equal_changes_have_equal_bytes(tmp_path: Path) -> None:
    contents = set()
    for i in range(8):
        path = tmp_path / f"{i}"
        write_delta(
            path, {"b": low_rank(4, 4), "a": torch.ones(2)}, editor="memit", case_ids=[1, 2],
            digest_before="x", digest_after="y",
        )  # fmt: skip
        contents.add(path.read_bytes())
    assert len(contents) == 1


def test_a_state_comes_back_with_its_batch(tmp_path: Path) -> None:
    path = tmp_path / "state" / "memit.safetensors"
    assert read_state(path) == ({}, 0)
    state = {"contexts": torch.tensor([1, 2], dtype=torch.uint8), "keys.1": torch.randn(3, 4).double()}
    write_state(path, state, 2)
    found, batches = read_state(path)
    assert batches == 2
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    write_state(path, {"contexts": state["contexts"]}, 3)
    assert read_state(path)[1] == 3
    assert set(read_state(path)[0]) == {"contexts"}


def test_a_batchs_parts_belong_to_what_it_started_from(tmp_path: Path) -> None:
    folder = tmp_path / "state" / "memit" / "batch-0002"
    checkpoint = BatchCheckpoint(folder, {"run": "a", "digest_before": "x"})
    assert checkpoint.load("targets.3") is None
    checkpoint.save("targets.3", {"values": torch.eye(2)})
    found = checkpoint.load("targets.3")
    assert found is not None and torch.equal(found["values"], torch.eye(2))
    assert BatchCheckpoint(folder, {"run": "a", "digest_before": "y"}).load("targets.3") is None
    checkpoint.clear()
    assert not folder.exists()


def test_broken_parts_and_states_are_refused(tmp_path: Path) -> None:
    checkpoint = BatchCheckpoint(tmp_path, {"run": "a"})
    checkpoint.save("update.1", {"dense": torch.ones(4)})
    write_state(state_path(tmp_path, "memit"), {"keys.1": torch.ones(4)}, 2)
    assert read_state(state_path(tmp_path, "memit"))[1] == 2
    for path in (tmp_path / "update.1.safetensors", state_path(tmp_path, "memit")):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"update\.1.*was changed after it was written; delete it"):
        checkpoint.load("update.1")
    with pytest.raises(ValueError, match=r"memit.*was changed after it was written; --fresh"):
        read_state(state_path(tmp_path, "memit"))
