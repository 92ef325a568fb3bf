"""Small real models on disk, the local data folder, and one thread for the toy runs."""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from transformers import BertTokenizer, RobertaTokenizer

# Before torch and huggingface_hub are imported: tests run side by side, and none needs the hub.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

TINY_WIDTHS = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "initializer_range": 0.2,  # large enough for logits to depend on every part of the model
}
TINY_LENGTH = 64


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Runs of the tests keep token ids among the tests' files, not among the user's."""
    os.environ["BAYESIAN_LORA_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets, from the environment variable BAYESIAN_LORA_DATA."""
    value = os.environ.get("BAYESIAN_LORA_DATA")
    if not value:
        pytest.skip("BAYESIAN_LORA_DATA is not set: no local folder of real data")
    if not Path(value).is_dir():
        pytest.skip(f"BAYESIAN_LORA_DATA={value} is not a folder")
    return Path(value)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Encoders and tokenizers of the three families as the hub has them: no classifier, 2 layers.

    Keys ``bert``, ``roberta``, ``distilbert``; the weights are random, the vocabulary is that of
    the synthetic task, texts may have 64 tokens.
    """
    import torch
    import transformers

    from bayesian_lora.data.synthetic import generate

    transformers.logging.disable_progress_bar()
    sentences = generate("train", size=200).texts[0]
    root = tmp_path_factory.mktemp("models")
    bert = _wordpiece_tokenizer(sentences)
    roberta = _byte_level_tokenizer(sentences, root)
    configs = {
        "bert": (transformers.BertConfig(max_position_embeddings=TINY_LENGTH, **TINY_WIDTHS), bert),
        "roberta": (
            # RoBERTa counts positions from the padding id + 1 = 2.
            transformers.RobertaConfig(max_position_embeddings=TINY_LENGTH + 2, **TINY_WIDTHS),
            roberta,
        ),
        "distilbert": (
            transformers.DistilBertConfig(
                dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=TINY_LENGTH
            ),
            bert,
        ),
    }
    configs["distilbert"][0].initializer_range = TINY_WIDTHS["initializer_range"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, (config, tokenizer) in configs.items():
            config.vocab_size = len(tokenizer)
            transformers.AutoModel.from_config(config).save_pretrained(root / name)
            tokenizer.save_pretrained(root / name)
    return {name: root / name for name in configs}


def _wordpiece_tokenizer(sentences: list[str]) -> "BertTokenizer":
    from transformers import BertTokenizer

    words = sorted(set(re.findall(r"\w+|[^\w\s]", " ".join(sentences).lower())))
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = [*letters, *(f"##{letter}" for letter in letters), *words]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys([*special, *pieces]))}
    return BertTokenizer(vocab=vocabulary, model_max_length=TINY_LENGTH)


def _byte_level_tokenizer(sentences: list[str], folder: Path) -> "RobertaTokenizer":
    from tokenizers import AddedToken
    from tokenizers.implementations.byte_level_bpe import ByteLevelBPETokenizer
    from transformers import RobertaTokenizer

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        iter(sentences), 500, special_tokens=[AddedToken(t) for t in special], show_progress=False
    )
    bpe.save_model(str(folder))
    vocabulary, merges = str(folder / "vocab.json"), str(folder / "merges.txt")
    return RobertaTokenizer(vocab=vocabulary, merges=merges, model_max_length=TINY_LENGTH)
