"""Laws of CharacterText and of blocks: nothing is lost, targets are the inputs one place on."""

import pytest
import torch

from dynarank.data.text import CharacterText, all_blocks, random_blocks

TEXT = "All the world's a stage,\nAnd all the men and women merely players.\n"


@pytest.mark.parametrize("text", [TEXT, TEXT[:20], "ä→b", "a", ""])
def test_the_parts_in_order_are_the_text(text: str):
    parts = CharacterText.from_text(text)
    assert parts.characters == "".join(sorted(set(text)))
    assert parts.decode(torch.cat([parts.train, parts.validation, parts.test])) == text
    assert len(parts.train) == int(0.9 * len(text))
    assert len(parts.train) + len(parts.validation) == int(0.95 * len(text))


def test_encode_and_decode_are_inverse():
    text = CharacterText.from_text(TEXT)
    assert text.decode(text.encode("All players")) == "All players"
    tokens = torch.randint(len(text.characters), (30,))
    assert torch.equal(text.encode(text.decode(tokens)), tokens)
    assert tokens.dtype == text.train.dtype == torch.int64


def test_what_is_not_in_the_vocabulary_is_named():
    text = CharacterText.from_text("abcabc")
    with pytest.raises(ValueError, match="encode: characters must be among 'abc', got 'xz'"):
        text.encode("zaxx")
    for token in (-1, 3):
        with pytest.raises(ValueError, match=f"decode: tokens must be between 0 and 2, got {token}"):
            text.decode(torch.tensor([0, token]))


TOKENS = torch.arange(100, 123)  # a token tells its place


@pytest.mark.parametrize("length", [1, 4, 22])
def test_random_blocks_are_stretches_of_the_text(length: int):
    inputs, targets = random_blocks(TOKENS, length, 500, torch.Generator().manual_seed(0))
    assert inputs.shape == targets.shape == (500, length)
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(length))
    # Every place comes up, the last one included.
    assert inputs[:, 0].unique().tolist() == TOKENS[: len(TOKENS) - length].tolist()


def test_the_generator_alone_decides():
    generator, before = torch.Generator().manual_seed(0), torch.get_rng_state()
    state = generator.get_state()
    first, second = (random_blocks(TOKENS, 4, 6, generator)[0] for _ in range(2))
    generator.set_state(state)
    assert torch.equal(random_blocks(TOKENS, 4, 6, generator)[0], first)
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("length", [1, 2, 4, 11, 21, 22])
def test_all_blocks_cover_the_text_in_order(length: int):
    inputs, targets = all_blocks(TOKENS, length)
    assert inputs.shape == targets.shape == (22 // length, length)
    assert torch.equal(inputs.flatten(), TOKENS[: inputs.numel()])
    assert torch.equal(targets, inputs + 1)
    assert inputs.numel() + length > 22  # less than one block is left out


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gets_the_same_blocks():
    expected = random_blocks(TOKENS, 4, 6, torch.Generator().manual_seed(0))
    blocks = random_blocks(TOKENS.cuda(), 4, 6, torch.Generator().manual_seed(0))
    for block, other in zip(blocks, expected, strict=True):
        assert block.is_cuda
        assert torch.equal(block.cpu(), other)


@pytest.mark.parametrize("length", [0, 23])
def test_impossible_lengths_are_refused(length: int):
    message = f"length must be between 1 and the number of tokens - 1 = 22, got {length}"
    with pytest.raises(ValueError, match=f"all_blocks: {message}"):
        all_blocks(TOKENS, length)
    with pytest.raises(ValueError, match=f"random_blocks: {message}"):
        random_blocks(TOKENS, length, 2, torch.Generator())


def test_an_impossible_count_is_refused():
    with pytest.raises(ValueError, match="random_blocks: count must be at least 1, got 0"):
        random_blocks(TOKENS, 4, 0, torch.Generator())


@pytest.mark.parametrize("tokens", [torch.zeros(2, 3, dtype=torch.int64), torch.zeros(9)])
def test_tokens_must_be_one_row_of_integers(tokens: torch.Tensor):
    with pytest.raises(ValueError, match=r"all_blocks: tokens must have shape \(T,\) and an integer dtype, got \("):
        all_blocks(tokens, 1)
    with pytest.raises(ValueError, match="decode: tokens must have shape"):
        CharacterText.from_text(TEXT).decode(tokens)
