"""What ``save_compressed`` writes, ``load_compressed`` brings back into the dense architecture, bit for bit."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from dynarank.export import load_compressed, read_manifest, save_compressed
from dynarank.factorize import factorize_, merge_
from dynarank.factorize.structure import structure
from dynarank.layers.base import low_rank_layers
from dynarank.layers.conv2d import LowRankConv2d

NAMES = ("mlp", "lenet5", "resnet20", "gpt", "encoder", "language", "vision")
assert_same = partial(torch.testing.assert_close, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["pair", "core"])
def test_a_compressed_network_comes_back(networks: Any, compressed: Any, tmp_path: Path, name: str, form: str):
    saved, x = compressed(name, form=form), networks.batch(name)
    save_compressed(tmp_path, saved, accuracy=0.9)
    model = networks.build(name)
    before = dict(model.named_parameters())
    assert load_compressed(tmp_path, model) is model
    assert structure(model) == structure(saved) and low_rank_layers(model)
    assert_same(dict(model.state_dict()), dict(saved.state_dict()))
    assert torch.equal(model(x), saved(x))
    assert all(before[key] is p for key, p in model.named_parameters() if key in before)
    assert {type(m) for m in model.modules()} == {type(m) for m in saved.modules()}


@pytest.mark.parametrize("name", [name for name in NAMES if name != "vision"])
def test_a_model_on_the_meta_device_gets_its_tensors(networks: Any, compressed: Any, tmp_path: Path, name: str):
    saved, x = compressed(name), networks.batch(name)
    save_compressed(tmp_path, saved)
    with torch.device("meta"):
        model = networks.build(name)
    model = load_compressed(tmp_path, model)
    assert torch.equal(model(x), saved(x))
    assert len({*model.parameters()}) == len({*saved.parameters()})


def test_half_precision_comes_back_whatever_the_model_had(networks: Any, tmp_path: Path):
    saved, x = networks.build("encoder").bfloat16(), networks.batch("encoder").bfloat16()
    factorize_(saved, rank=3)
    save_compressed(tmp_path, saved)
    model = networks.build("encoder").double()
    norm = model.layers[0].norm1.weight
    load_compressed(tmp_path, model)
    assert torch.equal(model(x), saved(x))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and model.layers[0].norm1.weight is norm


def test_tied_weights_are_stored_once_and_stay_tied(networks: Any, compressed: Any, tmp_path: Path):
    saved = compressed("language")
    save_compressed(tmp_path, saved)
    assert read_manifest(tmp_path)["shared"] == {"head.weight": "tokens.weight"}
    assert "head.weight" not in safetensors.torch.load_file(tmp_path / "model.safetensors")
    with torch.device("meta"):
        on_meta = networks.build("language")
    untied = networks.build("language").to("meta")  # torch unties what it moves there
    for model in (networks.build("language"), on_meta, untied):
        load_compressed(tmp_path, model)
        assert model.head.weight is model.tokens.weight
        assert_same(model.head.weight, saved.head.weight)


def test_modes_frozen_layers_and_memory_formats_are_those_of_the_model(networks: Any, tmp_path: Path):
    saved = networks.build("vision")
    options: Any = LowRankConv2d.dense_options(saved.conv) | {"in_channels": 2}
    saved.conv = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False), LowRankConv2d(**options, rank=4)).eval()
    saved.to(memory_format=torch.channels_last)
    save_compressed(tmp_path, saved)
    model = networks.build("vision").to(memory_format=torch.channels_last)
    model.wide.requires_grad_(False)
    model.norm.train()
    load_compressed(tmp_path, model)
    assert not model.wide.weight.requires_grad and model.norm.training and not model.conv[1].training
    x = networks.batch("vision").to(memory_format=torch.channels_last)
    assert torch.equal(model.eval()(x), saved(x))


def test_a_model_without_low_rank_layers_comes_back(networks: Any, compressed: Any, tmp_path: Path):
    merged = compressed("vision")
    merge_(merged)
    save_compressed(tmp_path, merged)
    model = load_compressed(tmp_path, networks.build("vision"))
    assert_same(dict(model.state_dict()), dict(merged.state_dict()))
    other = networks.build("vision")
    other.load_state_dict(merged.state_dict())  # plain torch does it too


def test_the_file_is_smaller_by_what_was_cut(networks: Any, compressed: Any, tmp_path: Path):
    dense, small = networks.build("lenet5"), compressed("lenet5")
    save_compressed(tmp_path / "dense", dense)
    save_compressed(tmp_path / "small", small)
    files = [tmp_path / name / "model.safetensors" for name in ("dense", "small")]
    assert [read_manifest(file.parent)["bytes"] for file in files] == [file.stat().st_size for file in files]
    values = [sum(tensor.nbytes for tensor in model.state_dict().values()) for model in (dense, small)]
    assert values[1] < 0.7 * values[0]
    assert all(0 < file.stat().st_size - size < 2000 for file, size in zip(files, values, strict=True))


def test_saving_again_replaces_the_model_and_keeps_other_files(networks: Any, compressed: Any, tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    save_compressed(tmp_path, compressed("mlp"), step=1)
    saved = compressed("mlp")
    save_compressed(tmp_path, saved, step=2, classes=["a", "b"], nested={"c": None})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dynarank.json", "model.safetensors", "notes.txt"]
    manifest = read_manifest(tmp_path)
    assert manifest["metadata"] == {"step": 2, "classes": ["a", "b"], "nested": {"c": None}}
    assert (manifest["format"], manifest["version"]) == ("dynarank.compressed", 1)
    x = networks.batch("mlp")
    assert torch.equal(load_compressed(tmp_path, networks.build("mlp"))(x), saved(x))


def test_views_of_one_tensor_come_back_apart(tmp_path: Path):
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            whole = torch.arange(6.0).reshape(2, 3)
            for name, view in {"whole": whole, "row": whole[1], "turned": whole.T, "none": whole[:0]}.items():
                self.register_buffer(name, view)

    save_compressed(tmp_path, Views())
    model: Any = Views()
    for buffer in [*model.buffers()]:
        buffer.zero_()
    load_compressed(tmp_path, model)
    assert model.whole.tolist() == [[0, 1, 2], [3, 4, 5]] and model.row.tolist() == [3, 4, 5]
