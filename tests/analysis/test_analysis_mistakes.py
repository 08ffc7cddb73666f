"""Files and mappings that are wrong: one line each says what, and what to do."""

import json
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dynarank.analysis import analyze


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


class Custom:
    """What torch's safe loader refuses."""


def damaged(kind: str, folder: Path) -> Path:
    """Write a file that is wrong in one way, and return what names it."""
    path = folder / "weights.pt"
    if kind == "missing":
        return folder / "nowhere.pt"
    if kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("Once upon a time there was a weight.")
    elif kind == "empty folder":
        return folder
    elif kind == "class":
        torch.save({"state_dict": state(), "config": Custom()}, path)
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.txt", "text")
    elif kind == "cut torch":
        torch.save(state(), path)
        path.write_bytes(path.read_bytes()[:400])
    elif kind == "cut pickle":
        path.write_bytes(b"\x80\x02}q\x00")
    elif kind == "cut safetensors":
        save_file(state(), path)
        path.write_bytes(path.read_bytes()[:-10])
    elif kind == "wrong safetensors":
        header = json.dumps({"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 20]}}).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(20))
    elif kind == "vectors":
        torch.save({"bias": torch.ones(3), "scale": torch.ones(())}, path)
    elif kind == "numbers":
        torch.save({"epoch": 3}, path)
    elif kind == "integers":
        torch.save({"fc.weight": torch.ones(3, 4, dtype=torch.int8)}, path)
    elif kind == "nan":
        torch.save(state() | {"bad.weight": torch.full((3, 4), torch.nan)}, path)
    elif kind == "no index":
        path = folder / "model.index.json"
        path.write_text('{"weights": []}')
    elif kind == "missing shard":
        path = save_shards(folder, state())
        (folder / "model-00002-of-00002.safetensors").unlink()
    elif kind == "wrong index":
        path = save_shards(folder, state())
        path.write_text(path.read_text().replace("conv.bias", "conv.scale"))
    elif kind == "twice":
        save_file(state(), folder / "one.safetensors")
        save_file(state(), folder / "two.safetensors")
        return folder
    return path


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("missing", FileNotFoundError, r"^no weights at .*nowhere\.pt: there is no such file\. Give a \.safetensors"),
        ("empty", ValueError, r"weights\.pt is empty\. Give"),
        ("text", ValueError, r"weights\.pt is no file of weights: it starts with b'Once upo'\. Give"),
        ("empty folder", ValueError, "the folder holds no file of weights"),
        (
            "class",
            ValueError,
            r"weights\.pt holds a .*Custom, and to load that would run code of the file\. Save model\.",
        ),
        ("zip", ValueError, r"weights\.pt is damaged or no file of torch\.save"),
        ("cut torch", ValueError, r"weights\.pt is damaged or no file of torch\.save"),
        ("cut pickle", ValueError, r"weights\.pt is damaged or no file of torch\.save"),
        ("cut safetensors", ValueError, r"weights\.pt is damaged or no file of safetensors"),
        ("wrong safetensors", ValueError, r"'w' takes 20 bytes, which F32 of shape \(2, 3\) does not"),
        ("vectors", ValueError, r"weights\.pt holds no matrix: none of its 2 tensors has two dimensions"),
        ("numbers", ValueError, "holds no matrix: none of its 0 tensors"),
        ("integers", ValueError, r"weights\.pt holds no floating-point weight to analyse, but fc\.weight \(int8\)"),
        ("nan", ValueError, r"^analyze: bad\.weight holds NaN or infinity"),
        ("no index", ValueError, r"model\.index\.json is no index of shards"),
        (
            "missing shard",
            FileNotFoundError,
            "index.json names model-00002-of-00002.safetensors, which is not beside it",
        ),
        ("wrong index", ValueError, "puts 'conv.scale' into model-00001-of-00002.safetensors, which does not hold it"),
        ("twice", ValueError, "is in 2 of its 2 files. Give one of them."),
    ],
)
def test_mistakes_are_told_in_one_line(kind, error, message, tmp_path):
    with pytest.raises(error, match=message) as failure:
        analyze(damaged(kind, tmp_path))
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        ({}, ValueError, "0 tensors holds no matrix"),
        ({"a": 3}, TypeError, "a mapping must hold tensors by name, got int under 'a'"),
        ({"a": torch.ones(3, 4, device="meta")}, ValueError, "analyze needs weights, but 'a' is on the meta device"),
        ({"a": torch.ones(3, 4).to_sparse()}, ValueError, r"no floating-point weight to analyse, but a \(sparse_coo"),
    ],
)
def test_mappings_are_checked(tensors, error, message):
    with pytest.raises(error, match=message):
        analyze(tensors)


def test_what_needs_a_module_is_refused():
    with pytest.raises(TypeError, match="analyze: calibration, forms need a module, which can be run"):
        analyze(state(), calibration=[torch.ones(2, 3)], forms=["matrix"])
