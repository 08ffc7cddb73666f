"""A text as one token per character, and blocks of it for training a language model."""

from dataclasses import dataclass
from typing import Self, final

import torch


@final
@dataclass(frozen=True, eq=False, repr=False)
class CharacterText:
    """Three consecutive parts of a text as one token per character.

    Args:
        characters: The vocabulary, sorted; the token of a character is its index.
        train: Tokens of the first part, for training.
        validation: Tokens of the part that follows, for every choice.
        test: Tokens of the rest; looked at once, at the end.

    Shape:
        - train, validation, test: ``(T,)``, int64, of different lengths.

    Example:
        >>> text = CharacterText.from_text("to be or not to be, ")
        >>> text
        CharacterText(8 characters: train (18,), validation (1,), test (1,))
        >>> text.encode("not")
        tensor([4, 5, 7])
        >>> text.decode(text.train[:5])
        'to be'
    """

    characters: str
    train: torch.Tensor  # (T,)
    validation: torch.Tensor
    test: torch.Tensor

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Split a text after 90 % and 95 % of its characters, rounded down; all parts share one vocabulary."""
        characters = "".join(sorted(set(text)))
        parts = _encode(text, characters).tensor_split((9 * len(text) // 10, 19 * len(text) // 20))
        return cls(characters, *parts)

    def encode(self, text: str) -> torch.Tensor:
        """Return the tokens of a text.

        Shape:
            ``(len(text),)``, int64.

        Raises:
            ValueError: If a character is not in the vocabulary.
        """
        return _encode(text, self.characters)

    def decode(self, tokens: torch.Tensor) -> str:
        """Return the text of tokens ``(T,)``; the inverse of `encode`.

        Raises:
            ValueError: If the tokens are not one row of integers, or one of them is not in the vocabulary.
        """
        _check_row("decode", tokens)
        allowed = range(len(self.characters))
        if outside := sorted(set(tokens.tolist()) - set(allowed)):
            raise ValueError(f"decode: tokens must be between 0 and {allowed[-1]}, got {outside[0]}.")
        return "".join(self.characters[token] for token in tokens.tolist())

    def __repr__(self) -> str:
        shapes = ", ".join(f"{part} {tuple(getattr(self, part).shape)}" for part in ("train", "validation", "test"))
        return f"CharacterText({len(self.characters)} characters: {shapes})"


def random_blocks(
    tokens: torch.Tensor, length: int, count: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return blocks of consecutive tokens that begin at random places, and for each token the one that follows it.

    Places are drawn with replacement, and blocks may overlap.

    Args:
        tokens: The text.
        length: Tokens per block.
        count: Number of blocks.
        generator: Source of the places; its state alone decides them.

    Shape:
        - tokens: ``(T,)`` with T > length.
        - inputs, targets: ``(count, length)`` each.

    Raises:
        ValueError: If the tokens are not one row of integers, or ``length`` or ``count`` is out of range.

    Example:
        >>> inputs, targets = random_blocks(torch.arange(10), 3, 2, torch.Generator().manual_seed(0))
        >>> inputs.shape, torch.equal(targets, inputs + 1)
        (torch.Size([2, 3]), True)
    """
    _check_length("random_blocks", tokens, length)
    if count < 1:
        raise ValueError(f"random_blocks: count must be at least 1, got {count}.")
    starts = torch.randint(len(tokens) - length, (count, 1), generator=generator, device=generator.device)
    places = starts.to(tokens.device) + torch.arange(length, device=tokens.device)  # (count, length)
    return tokens[places], tokens[places + 1]


def all_blocks(tokens: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the text cut into consecutive blocks, and for each token the one that follows it.

    The tokens at the end that do not fill a block are left out.

    Args:
        tokens: The text.
        length: Tokens per block.

    Shape:
        - tokens: ``(T,)`` with T > length.
        - inputs, targets: ``((T - 1) // length, length)`` each, views of ``tokens``.

    Raises:
        ValueError: If the tokens are not one row of integers, or ``length`` is out of range.

    Example:
        >>> all_blocks(torch.arange(6), 2)
        (tensor([[0, 1], [2, 3]]), tensor([[1, 2], [3, 4]]))
    """
    _check_length("all_blocks", tokens, length)
    end = (len(tokens) - 1) // length * length
    return tokens[:end].view(-1, length), tokens[1 : end + 1].view(-1, length)


def _encode(text: str, characters: str) -> torch.Tensor:
    tokens = {character: token for token, character in enumerate(characters)}
    if unknown := "".join(sorted(set(text) - set(tokens))):
        raise ValueError(f"encode: characters must be among {characters!r}, got {unknown!r}.")
    return torch.tensor([tokens[character] for character in text], dtype=torch.int64)  # (T,)


def _check_length(where: str, tokens: torch.Tensor, length: int) -> None:
    _check_row(where, tokens)
    if not 1 <= length < len(tokens):
        allowed = f"between 1 and the number of tokens - 1 = {len(tokens) - 1}"
        raise ValueError(f"{where}: length must be {allowed}, got {length}.")


def _check_row(where: str, tokens: torch.Tensor) -> None:
    if tokens.ndim != 1 or tokens.is_floating_point():
        got = f"{tuple(tokens.shape)} of {tokens.dtype}"
        raise ValueError(f"{where}: tokens must have shape (T,) and an integer dtype, got {got}.")
