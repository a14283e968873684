"""Unprocessed frames, and a tokenizer for their prompt."""

import torch
from conftest import ACTION, CAMERAS, DIMS, OBS_STATE
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

TASK = "reach the red cube"


def sample(seed: int = 0) -> dict:
    """One frame in raw units, without a batch dimension; only the chunk has one, because LeRobot adds none to it."""
    draw = torch.Generator().manual_seed(seed)
    images = {key: torch.rand(3, 64, 64, generator=draw) for key in CAMERAS}
    return images | {
        OBS_STATE: torch.randn(DIMS, generator=draw) * 40,
        ACTION: torch.randn(1, 50, DIMS, generator=draw) * 40,
        "task": TASK,
    }


def word_tokenizer(folder) -> str:
    """A folder with a real tokenizer of five words. It pads on the other side, which must not matter."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", *TASK.split()])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", padding_side="left"
    ).save_pretrained(folder)
    return str(folder)
