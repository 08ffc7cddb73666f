"""The classifier head is found by its role, whatever it is called and wherever it was registered."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynarank.factorize import FactorizationReport, factorize_
from dynarank.layers.base import AbstractLowRankLayer


def heads(report: FactorizationReport) -> dict[str, str]:
    """Return the layers that stay dense as heads, with how they were recognised."""
    return {e.name: e.reason.removeprefix("classifier head, ") for e in report.kept_dense if "head," in e.reason}


class Reversed(nn.Module):
    """Registers its last layer first, under names that say nothing."""

    def __init__(self, end: str = "plain") -> None:
        super().__init__()
        self.end = end
        self.alpha = nn.Linear(16, 10)
        self.beta = nn.Linear(16, 16)
        self.gamma = nn.Linear(8, 16)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        self.calls.add_(1)
        x = self.alpha(self.beta(self.gamma(x).relu()).relu())
        self.kept = x
        if self.end == "softmax":
            return torch.log_softmax(x, -1).reshape(-1, 10)
        if self.end == "mapping":
            return {"logits": x, "probabilities": x.softmax(-1)}
        return x


class Branching(Reversed):
    """A forward that no symbolic trace can follow."""

    def forward(self, x: Tensor) -> Any:
        if x.sum() > 0:
            x = x + 1
        return super().forward(x)


class Residual(nn.Module):
    """The output is a sum of branches: no single layer writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(self.one(x).relu())


# --- without an example ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["plain", "softmax", "mapping"])
def test_the_order_of_registration_does_not_decide(end: str):
    model = Reversed(end)
    assert heads(factorize_(model)) == {"alpha": "feeds the output in a symbolic trace"}
    assert type(model.alpha) is nn.Linear and isinstance(model.gamma, AbstractLowRankLayer)


def test_a_trace_leaves_nothing_behind():
    model = Reversed()
    attributes, state = set(vars(model)), torch.get_rng_state()
    factorize_(model)
    assert set(vars(model)) == attributes and not hasattr(model, "kept")
    assert model.calls == 0 and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["head", "classifier", "fc_out", "lm_head", "output", "logits", "cls_head"])
def test_a_telling_name_is_believed(name: str):
    model = nn.ModuleDict({name: nn.Linear(16, 10), "body": nn.Linear(8, 16), "more": nn.Linear(16, 16)})
    assert heads(factorize_(model)) == {name: f"recognised by the attribute name {name!r}"}


def test_only_the_last_layer_of_a_classifier_block_is_the_head():
    classifier = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10), nn.Softmax(-1))
    model = nn.ModuleDict({"classifier": classifier, "features": nn.Conv2d(8, 16, 3)})
    report = factorize_(model)
    assert heads(report) == {"classifier.2": "recognised by the attribute name 'classifier'"}
    assert [e.name for e in report.factorized] == ["classifier.0", "features"]


def test_a_head_of_which_no_part_stands_out_stays_dense_as_a_whole():
    model = nn.ModuleDict({"heads": nn.ModuleList([nn.Linear(16, 10), nn.Linear(16, 3)]), "body": nn.Linear(16, 16)})
    assert list(heads(factorize_(model))) == ["heads.0", "heads.1"]


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: nn.ModuleDict({"model": m}), lambda m: nn.Sequential(m)])
def test_nested_sequentials_end_with_the_head(wrap: Any):
    inner = nn.Sequential(nn.Linear(16, 16), nn.Sequential(nn.ReLU(), nn.Linear(16, 10)), nn.Softmax(-1))
    report = factorize_(wrap(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), inner)))
    (name,) = heads(report)
    assert name.endswith("2.1.1") and len(report.factorized) == 2


def test_a_convolution_may_be_the_head():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert list(heads(factorize_(model))) == ["2"]


def test_output_embeddings_are_believed():
    class Model(Branching):
        def get_output_embeddings(self) -> nn.Module:
            return self.alpha

    assert heads(factorize_(Model())) == {"alpha": "returned by get_output_embeddings()"}


@pytest.mark.parametrize("answer", [None, NotImplementedError, AttributeError])
def test_a_model_without_output_embeddings_is_searched(answer: Any):
    class Model(Reversed):
        def get_output_embeddings(self) -> None:
            if answer is not None:
                raise answer

    assert list(heads(factorize_(Model()))) == ["alpha"]


def test_a_layer_tied_to_an_embedding_is_the_head():
    model = nn.ModuleDict({"decoder": nn.Linear(16, 50), "tokens": nn.Embedding(50, 16), "body": nn.Linear(16, 16)})
    model["decoder"].weight = model["tokens"].weight
    report = factorize_(model)
    assert [e.name for e in report.factorized] == ["body"] and not report.notes
    assert next(e.reason for e in report.kept_dense if e.name == "decoder") == "its weight is tied to 'tokens'"


def test_weak_names_are_believed_when_nothing_else_is_known():
    class Model(Branching):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.alpha = self.alpha, nn.Linear(10, 10)

    assert heads(factorize_(Model())) == {"fc": "recognised by the attribute name 'fc'"}


@pytest.mark.parametrize("model", [Branching, Residual])
def test_a_head_that_cannot_be_recognised_is_said_to_be_unknown(model: type[nn.Module]):
    report = factorize_(model(), rank=1)
    assert not heads(report) and not report.kept_dense
    assert report.notes[0].startswith("No classifier head was recognised")
    assert "No classifier head was recognised" in str(report)


def test_the_projection_of_attention_is_no_head():
    report = factorize_(nn.Sequential(nn.Linear(16, 16), nn.MultiheadAttention(16, 2)))
    assert [e.name for e in report.factorized] == ["0", "1.out_proj"]


# --- with an example -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "example", [torch.ones(2, 8), (torch.ones(2, 8),), [torch.ones(2, 8)], {"x": torch.ones(2, 8)}]
)
@pytest.mark.parametrize("end", ["plain", "mapping"])
def test_the_layer_that_writes_the_output_is_seen(example: Any, end: str):
    assert heads(factorize_(Branching(end), example_inputs=example)) == {"alpha": "seen to write the output"}


def test_the_last_layer_executed_is_the_head_where_none_writes_the_output():
    model = Branching("softmax")
    assert heads(factorize_(model, example_inputs=torch.ones(2, 8))) == {"alpha": "the last layer executed"}


def test_an_example_wins_over_names():
    model = Branching()
    model.head = nn.Linear(8, 8)  # is never called
    assert list(heads(factorize_(model, example_inputs=torch.ones(2, 8)))) == ["alpha"]


def test_every_layer_that_writes_an_output_is_a_head():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.body = nn.Linear(16, 10), nn.Linear(16, 4), nn.Linear(8, 16)

        def forward(self, x: Tensor) -> Any:
            x = self.body(x)
            return SimpleNamespace(), (self.a(x), self.b(x).squeeze(-1))

    assert list(heads(factorize_(Two(), example_inputs=torch.ones(2, 8)))) == ["a", "b"]


def test_running_an_example_leaves_modes_gradients_hooks_and_randomness_alone():
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(), nn.Linear(16, 4)).train()
    model[1].eval()
    state = torch.get_rng_state()
    mean = model[1].running_mean.clone()
    factorize_(model, example_inputs=torch.ones(2, 8))
    assert model.training and not model[1].training and model[2].training
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(model[1].running_mean, mean)
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_an_example_that_does_not_fit_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        factorize_(model, example_inputs=torch.ones(2, 7))
    assert type(model[0]) is nn.Linear and model.training and not model[0]._forward_hooks


# --- asked for -------------------------------------------------------------------------------------------------------


def test_the_head_can_be_included():
    report = factorize_(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16)), include_head=True)
    assert not report.kept_dense and not report.notes


@pytest.mark.parametrize("target", [["1"], r"\d"])
def test_a_head_that_is_named_is_replaced(target: Any):
    report = factorize_(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16)), target_modules=target)
    assert report.factorized[-1].name == "1"
    assert report.notes == ("Classifier head factorised, since it was named: 1.",)


@pytest.mark.parametrize("target", ["linear", "all", nn.Linear, [nn.Linear]])
def test_a_kind_or_a_class_does_not_name_the_head(target: Any):
    report = factorize_(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16)), target_modules=target)
    assert list(heads(report)) == ["1"]
