"""The analysis of weights alone: files of all kinds, one tensor at a time."""

import json
import os
import struct
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dynarank.analysis import analyze, weight_files
from dynarank.analysis.weight_files import StoredTensor, stored_tensors
from dynarank.factorize import factorize_


def state() -> dict[str, torch.Tensor]:
    return {
        "conv.weight": torch.randn(9, 3, 3, 3),
        "conv.bias": torch.randn(9),
        "body.fc.weight": torch.randn(21, 33),
        "body.fc.bias": torch.randn(21),
        "head.weight": torch.randn(13, 21),
    }


def save_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """Write the tensors into two shards with an index, and return its path."""
    names, places = list(tensors), {}
    for part, own in enumerate((names[:2], names[2:]), 1):
        file = f"model-0000{part}-of-00002.safetensors"
        save_file({name: tensors[name] for name in own}, folder / file)
        places |= dict.fromkeys(own, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": places}))
    return index


def write(kind: str, folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """Write the tensors as a file of one kind, and return what names it."""
    path = folder / "weights"
    if kind == "safetensors":
        save_file(tensors, path)
    elif kind == "folder":
        save_file(tensors, folder / "model.safetensors")
        return folder
    elif kind == "index":
        return save_shards(folder, tensors)
    elif kind == "folder of shards":
        return save_shards(folder, tensors).parent
    elif kind == "shards without index":
        save_shards(folder, tensors).unlink()
        return folder
    elif kind == "torch":
        torch.save(tensors, path)
    elif kind == "legacy torch":
        torch.save(tensors, path, _use_new_zipfile_serialization=False)
    elif kind == "checkpoint":
        adam = {"state": {0: {"exp_avg": torch.randn(9, 9)}}}
        torch.save({"epoch": 3, "state_dict": tensors, "optimizer_state_dict": adam}, path)
    else:
        torch.save({"args": {"lr": 0.1}, "net": {"model": tensors}}, path)
    return path


KINDS = (
    "safetensors",
    "folder",
    "index",
    "folder of shards",
    "shards without index",
    "torch",
    "legacy torch",
    "checkpoint",
    "nested twice",
)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_tells_the_same_as_the_tensors(kind, tmp_path):
    tensors = state()
    expected = analyze(tensors)
    found = analyze(write(kind, tmp_path, tensors))
    assert {layer.name: layer for layer in found.layers} == {layer.name: layer for layer in expected.layers}
    assert (found.parameters, found.bytes) == (expected.parameters, expected.bytes)
    assert found.parameters == sum(tensor.numel() for tensor in tensors.values())
    for one, other in zip(found.outlooks, expected.outlooks, strict=True):
        assert one.damage == pytest.approx(other.damage)


def test_the_numbers_are_those_of_the_module():
    model = nn.Sequential(nn.Conv2d(3, 9, 3), nn.Flatten(), nn.Linear(9 * 16, 21), nn.Linear(21, 13))
    of_model = analyze(model, forms=["matrix"])
    of_state = analyze(model.state_dict())
    assert [layer.name for layer in of_state.layers] == [f"{layer.name}.weight" for layer in of_model.layers]
    for one, other in zip(of_state.layers, of_model.layers, strict=True):
        assert one.spectrum == other.spectrum
        assert (one.kind, one.shape, one.break_even) == (other.kind, other.shape, other.break_even)
        assert one.curves[0].errors == pytest.approx(other.curves[0].errors, abs=1e-12)
    for one, other in zip(of_state.outlooks, of_model.outlooks, strict=True):
        assert [layer.rank for layer in one.plan.layers] == [layer.rank for layer in other.plan.layers]
        assert (one.bytes, one.damage) == (other.bytes, pytest.approx(other.damage))


def test_one_tensor_is_in_memory_at_a_time(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    save_file({f"w{index}": torch.randn(20, 30) for index in range(6)}, path)
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def counting(source):
        for tensor in stored_tensors(source):
            yield StoredTensor(tensor.name, tensor.shape, tensor.dtype, tensor.bytes, counted(tensor.load))

    def counted(load):
        def loaded():
            nonlocal most
            tensor = load()
            alive.append(weakref.ref(tensor))
            most = max(most, sum(ref() is not None for ref in alive))
            return tensor

        return loaded

    monkeypatch.setattr("dynarank.analysis.analyzer.stored_tensors", lambda source: list(counting(source)))
    assert len(analyze(path).layers) == len(alive) == 6
    assert most == 1


def test_a_file_larger_than_it_may_be_in_memory_is_not_read(tmp_path):
    size = 2**40  # a terabyte, with holes
    entries = {
        "packed": {"dtype": "U8", "shape": [2**20, 2**20], "data_offsets": [0, size]},
        "fc.weight": {"dtype": "F32", "shape": [3, 4], "data_offsets": [size, size + 48]},
    }
    header = json.dumps(entries).encode()
    path = tmp_path / "huge.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.seek(size, os.SEEK_CUR)
        file.write(torch.arange(12, dtype=torch.float32).numpy().tobytes())
    found = analyze(path)
    assert found.bytes == size + 48
    assert found["packed"].spectrum is None
    assert found["packed"].reason.startswith("its numbers are U8")
    W = torch.arange(12, dtype=torch.float64).reshape(3, 4)
    assert found["fc.weight"].spectrum.singular_values[0] == pytest.approx(float(torch.linalg.matrix_norm(W, 2)))


def test_half_precision_counts_two_bytes_and_other_numbers_as_stored(tmp_path):
    path = tmp_path / "weights.safetensors"
    tensors = {"a": torch.randn(7, 9).bfloat16(), "b": torch.zeros(5, 6, dtype=torch.int64), "c": torch.zeros(3).bool()}
    save_file(tensors, path)
    found = analyze(path, budgets=(0.9,))
    assert found.bytes == 2 * 63 + 8 * 30 + 3
    assert (found["a"].dtype, found["b"].dtype) == ("bfloat16", "I64")
    (outlook,) = found.outlooks
    assert outlook.bytes == found.bytes - 2 * (found.parameters - outlook.plan.parameters_after)


def test_what_is_no_matrix_of_a_layer_is_listed_with_its_reason():
    dense = torch.randn(16, 11)
    found = analyze(
        {
            "tokens.weight": torch.randn(40, 16),
            "model.embed_tokens.weight": torch.randn(40, 16),
            "wpe.weight": torch.randn(40, 16),
            "lora.A": torch.randn(2, 16),
            "lora.B": torch.randn(2, 11),
            "fc.weight": dense,
            "tied.weight": dense,
            "steps": torch.ones(4, 4, dtype=torch.int64),
            "tiny": torch.ones(1, 8),
        }
    )
    reasons = {layer.name: layer.reason for layer in found.layers}
    embedding = "an embedding, by its name: its rows are looked up, not multiplied"
    factor = "a factor of a low-rank weight; analyse the model itself to see the product"
    assert reasons == {
        "tokens.weight": embedding,
        "model.embed_tokens.weight": embedding,
        "wpe.weight": embedding,
        "lora.A": factor,
        "lora.B": factor,
        "fc.weight": "it is tied to 'tied.weight'",
        "tied.weight": "it is tied to 'fc.weight'",
        "steps": "its numbers are int64, not plain floating-point ones: dequantise them first",
        "tiny": "too small: no replacement would hold fewer numbers",
    }
    assert found.parameters == 3 * 40 * 16 + 2 * 27 + 16 * 11 + 16 + 8
    assert found["tied.weight"].spectrum is None
    assert found["tokens.weight"].spectrum is not None


def test_names_choose_tensors_and_overrule_guesses():
    tensors = state() | {"embedding.weight": torch.randn(30, 20)}
    found = analyze(tensors, target_modules=["fc", "embedding"])
    assert [layer.name for layer in found.replaceable] == ["body.fc.weight", "embedding.weight"]
    assert analyze(tensors, target_modules="conv").replaceable[0].name == "conv.weight"
    assert analyze(tensors, target_modules=r"body\..*").replaceable[0].name == "body.fc.weight"
    assert analyze(tensors, exclude_modules=["head.weight"])["head.weight"].reason == "named in exclude_modules"
    with pytest.raises(ValueError, match="exclude_modules: 'fc3' matches no weight"):
        analyze(tensors, exclude_modules=["fc3"])


def test_factors_of_a_saved_low_rank_model_are_told_apart(tmp_path):
    model = nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 10))
    factorize_(model, rank=3)
    torch.save(model.state_dict(), tmp_path / "low.pt")
    found = analyze(tmp_path / "low.pt")
    assert found["0.A"].reason.startswith("a factor of a low-rank weight")
    assert found["2.weight"].reason == ""


def test_the_name_of_the_source_is_not_its_path(tmp_path):
    save_file(state(), tmp_path / "weights.safetensors")
    assert analyze(tmp_path / "weights.safetensors").source == "weights.safetensors"
    assert analyze(state()).source == "5 tensors"


def test_tensors_of_a_torch_file_stay_on_the_disk(tmp_path, monkeypatch):
    torch.save(state(), tmp_path / "weights.pt")
    asked = []
    load = torch.load
    monkeypatch.setattr(
        weight_files.torch, "load", lambda *args, **options: asked.append(options) or load(*args, **options)
    )
    analyze(tmp_path / "weights.pt")
    assert (asked[0]["mmap"], asked[0]["weights_only"]) == (True, True)
