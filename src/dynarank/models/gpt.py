"""A small GPT, and its narrower relatives of a given size."""

import math
from bisect import bisect_right
from typing import final

import torch
from torch import nn
from torch.nn import functional

DEVIATION = 0.02  # of all initial weights but those that end a residual branch


@final
class GPT(nn.Module):
    """A decoder-only transformer with LayerNorm before each branch: logits of the next token at every position.

    Every matrix is a layer of its own: ``query``, ``key``, ``value``, ``out``, ``up`` and ``down`` in each of
    ``blocks``, and ``head``. The head has no bias and is not tied to the embedding ``tokens``; positions are learned.

    Args:
        vocabulary: Number of different tokens.
        layers: Number of blocks.
        heads: Attention heads per block.
        width: Features per token, a multiple of ``heads``.
        context: Largest number of tokens in a sequence.
        mlp_ratio: Hidden units of the MLPs, as a multiple of ``width``; the product is rounded.
        dropout: Probability of dropping a feature of the embedding or of a branch, or an attention weight.

    Shape:
        - Input: ``(N, T)``, integers below ``vocabulary``, with ``T <= context``.
        - Output: ``(N, T, vocabulary)``.

    Raises:
        ValueError: If a size is below 1, if ``heads`` does not divide ``width``, if ``dropout`` is no probability below
            1, or if a sequence is longer than ``context``.

    Example:
        >>> model = GPT(65, width=64)
        >>> model(torch.zeros(2, 7, dtype=torch.int64)).shape
        torch.Size([2, 7, 65])

    Reference:
        A. Radford, J. Wu, R. Child, D. Luan, D. Amodei, I. Sutskever, Language models are unsupervised multitask
        learners, OpenAI 2019,
        https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf. There the
        head is tied to the embedding and one matrix gives query, key and value; here each is compressed by itself.
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        layers: int = 4,
        heads: int = 4,
        width: int = 128,
        context: int = 128,
        mlp_ratio: float = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        hidden = round(mlp_ratio * width)
        sizes = {"vocabulary": vocabulary, "layers": layers, "heads": heads, "width": width, "context": context}
        for name, size in (sizes | {"mlp_ratio * width": hidden}).items():
            if size < 1:
                raise ValueError(f"GPT: {name} must be at least 1, got {size}.")
        if width % heads:
            raise ValueError(f"GPT: width must be a multiple of heads = {heads}, got {width}.")
        if not 0 <= dropout < 1:
            raise ValueError(f"GPT: dropout must be at least 0 and below 1, got {dropout}.")
        self.vocabulary = vocabulary
        self.layers = layers
        self.heads = heads
        self.width = width
        self.context = context
        self.hidden = hidden
        self.mlp_ratio = mlp_ratio
        self.dropout = dropout
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads, hidden, dropout=dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        # 2 * layers branches add up in the residual stream; the factor keeps its variance from growing with depth.
        last = DEVIATION / math.sqrt(2 * self.layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=last if name.endswith(("out.weight", "down.weight")) else DEVIATION)
            elif name.endswith("bias"):
                parameter.zero_()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        length = tokens.shape[-1]
        if length > self.context:
            raise ValueError(f"GPT: a sequence must have at most context = {self.context} tokens, got {length}.")
        features = self.tokens(tokens) + self.positions.weight[:length]  # (N, T, width)
        features = self.blocks(functional.dropout(features, self.dropout, self.training))
        return self.head(self.norm(features))  # (N, T, vocabulary)

    def narrower(self, parameters: int) -> "GPT":
        """Build a freshly initialised GPT with as many layers and heads and at most ``parameters`` parameters.

        The width is the largest multiple of ``heads`` that fits with MLPs in proportion; then the MLPs alone are
        widened while that fits, since one step of the width can be many percent. The result is deterministic and never
        wider than this network, which is also what a ``parameters`` beyond its own count gives.

        Args:
            parameters: Largest number of parameters allowed: weights, biases, embeddings and LayerNorms.

        Raises:
            ValueError: If not even one feature per head fits.

        Example:
            >>> model = GPT(65).narrower(300_000)
            >>> model.width, model.hidden, sum(parameter.numel() for parameter in model.parameters())
            (72, 337, 299716)
        """

        def count(width: int, hidden: int) -> int:
            return gpt_parameters(self.vocabulary, layers=self.layers, width=width, hidden=hidden, context=self.context)

        def in_proportion(width: int) -> int:
            return max(1, round(self.mlp_ratio * width))

        widths = range(self.heads, self.width + 1, self.heads)
        fitting = bisect_right(widths, parameters, key=lambda width: count(width, in_proportion(width)))
        if fitting == 0:
            least = count(self.heads, in_proportion(self.heads))
            raise ValueError(f"GPT.narrower: parameters must be at least {least}, got {parameters}.")
        width = widths[fitting - 1]
        units = range(in_proportion(width), self.hidden + 1)
        hidden = units[bisect_right(units, parameters, key=lambda hidden: count(width, hidden)) - 1]
        return GPT(
            self.vocabulary,
            layers=self.layers,
            heads=self.heads,
            width=width,
            context=self.context,
            mlp_ratio=hidden / width,
            dropout=self.dropout,
        )


@final
class Block(nn.Module):
    """Causal self-attention, then an MLP with GELU; each reads a LayerNorm of the features and is added to them.

    Shape:
        - Input: ``(N, T, width)``.
        - Output: ``(N, T, width)``.

    Example:
        >>> Block(8, 2, 32)(torch.zeros(3, 5, 8)).shape
        torch.Size([3, 5, 8])
    """

    def __init__(self, width: int, heads: int, hidden: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.norm1 = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        features = features + self._drop(self._attend(self.norm1(features)))
        return features + self._drop(self.down(functional.gelu(self.up(self.norm2(features)))))

    def _attend(self, features: torch.Tensor) -> torch.Tensor:
        projections = (self.query(features), self.key(features), self.value(features))
        query, key, value = (p.unflatten(-1, (self.heads, -1)).transpose(-3, -2) for p in projections)
        dropout = self.dropout if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        return self.out(mixed.transpose(-3, -2).flatten(-2))  # (N, T, width)

    def _drop(self, branch: torch.Tensor) -> torch.Tensor:
        return functional.dropout(branch, self.dropout, self.training)


def gpt_parameters(vocabulary: int, *, layers: int, width: int, hidden: int, context: int) -> int:
    """Count the parameters of a `GPT` with ``hidden`` units in each MLP without building it.

    Example:
        >>> count = gpt_parameters(65, layers=4, width=128, hidden=512, context=128)
        >>> count, count == sum(parameter.numel() for parameter in GPT(65).parameters())
        (826368, True)
    """
    block = 4 * (width + 1) * width + (width + 1) * hidden + (hidden + 1) * width
    return (2 * vocabulary + context) * width + layers * block + (2 * layers + 1) * 2 * width
