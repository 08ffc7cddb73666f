"""What ``save_plain`` cannot do it says, and the file that was there stays."""

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from dynarank.export import plain, save_compressed, save_plain
from dynarank.factorize import factorize_


def low_rank() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 4))
    factorize_(model, rank=2)
    return model


def test_wrong_arguments_are_named(tmp_path: Path):
    model, x = low_rank(), torch.ones(2, 12)
    with pytest.raises(ValueError, match=r"unknown format 'jit'\. Available: onnx, pt2, state_dict\."):
        save_plain(tmp_path / "m.pt", model, x, format="jit")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"path must end in \.onnx for the format 'onnx', got 'm\.pt2'"):
        save_plain(tmp_path / "m.pt2", model, x, format="onnx")
    with pytest.raises(ValueError, match=r"onnxruntime has no bfloat16 .* Export model\.float\(\) instead"):
        save_plain(tmp_path / "m.onnx", model.bfloat16(), x.bfloat16(), format="onnx")
    with pytest.raises(ValueError, match="dynamic_batch: example_inputs hold no tensor with a batch dimension"):
        save_plain(tmp_path / "m.pt2", model, (torch.tensor(1.0),), dynamic_batch=True)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ImportError, match=rf'needs {package}, which is not installed. Run: pip install "dynarank\[onnx\]'
    ):
        save_plain(tmp_path / "m.onnx", low_rank(), torch.ones(2, 12), format="onnx")


def test_a_batch_that_the_model_fixes_cannot_be_dynamic(tmp_path: Path):
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(3, 12) if len(x) == 3 else x

    with pytest.raises(Exception, match=r"(?s)marked batch|dynamic|specializ"):
        save_plain(tmp_path / "m.pt2", nn.Sequential(Fixed(), low_rank()), torch.ones(3, 12), dynamic_batch=True)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "save", [save_compressed, partial(save_plain, example_inputs=torch.ones(2, 12), format="state_dict")]
)
def test_a_full_disk_is_an_os_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: Any):
    def full(*arguments: Any, **options: Any) -> None:
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr("dynarank.export._tensors.save_file", full)
    with pytest.raises(OSError, match=r"the model was not saved to .*: I/O error: No space left on device"):
        save(tmp_path / "m.safetensors", model=low_rank())
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("fault", ["shape", "disk"])
def test_a_file_that_is_no_good_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str):
    def write(path: Path, *arguments: Any) -> Any:
        path.write_text("half")
        if fault == "disk":
            raise OSError("No space left on device")
        return lambda inputs: [torch.ones(2, 5)]

    path = tmp_path / "m.pt2"
    path.write_text("old")
    monkeypatch.setitem(plain.FORMATS, "pt2", (".pt2", write))
    with pytest.raises(
        (OSError, RuntimeError), match=r"No space left|outputs of shapes \[\(2, 5\)\], the model \[\(2, 4\)\]"
    ):
        save_plain(path, low_rank(), torch.ones(2, 12))
    assert path.read_text() == "old" and [*tmp_path.iterdir()] == [path]


def test_a_wrapped_model_is_refused(tmp_path: Path):
    wrapped: Any = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    with pytest.raises(RuntimeError, match=r"save_compressed got a model wrapped .* Pass model\.module"):
        save_compressed(tmp_path, wrapped)
    with pytest.raises(RuntimeError, match=r"save_plain got a model wrapped .* Pass model\.module"):
        save_plain(tmp_path / "m.pt2", wrapped, torch.ones(2))


def test_other_formats_work_without_onnx():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['onnx', 'onnxruntime', 'onnxscript'])); import dynarank.export"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
