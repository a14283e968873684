"""A tokenizer with whole words, made for the sentences of a dataset: read as bytes, they have four times the tokens."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from lerobot_pi0.network.sizes import BYTE_VOCAB

PADDING = "<pad>"


def save_tokenizer(sentences: Iterable[str], folder: Path, vocabulary: int = BYTE_VOCAB) -> Path:
    """Write a tokenizer for `--policy.text_tokenizer_name`; returns its folder.

    The words that most sentences have are one token each, as many as the vocabulary has room for. Other words are
    tokens of bytes, so every text has tokens. Upper and lower case are the same.

    Args:
        sentences: each as often as its words should count.
        folder: where it is written.
        vocabulary: how many tokens the network knows.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.ByteLevel(add_prefix_space=True)
    counts = Counter(word for each in sentences for word in {word for word, _ in split.pre_tokenize_str(each.lower())})
    signs = [PADDING, *sorted(split.alphabet())]
    words = sorted(counts.keys() - {*signs}, key=lambda word: (-counts[word], word))
    vocab = {token: i for i, token in enumerate([*signs, *words][:vocabulary])}
    # Without merges there are bytes alone; `ignore_merges` looks a whole word up before.
    tokenizer = Tokenizer(models.BPE(vocab, [], ignore_merges=True))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), split
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PADDING).save_pretrained(folder)
    return folder
