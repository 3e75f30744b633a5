import numpy as np
import pytest

from nanochat_ray import storage
from nanochat_ray.data.loader import Rows
from nanochat_ray.data.tokenizer import Tokenizer
from nanochat_ray.evals.tasks import arithmetic, spelling
from nanochat_ray.train.sft import prepare_conversations


@pytest.fixture
def tokenizer(golden):
    return Tokenizer.load(str(golden / "nanochat_d2"))


def test_no_token_of_a_conversation_is_lost_and_only_the_assistants_are_learned(tokenizer):
    splits = {"train": arithmetic.conversations("train", 50), "val": spelling.conversations("val", 10)}
    folder = prepare_conversations(splits, tokenizer, 128)
    for split, conversations in splits.items():
        rendered = [tokenizer.render_conversation(c) for c in conversations]
        rows = Rows(storage.join(folder, split))
        tokens, mask = rows[range(len(rows))], rows.mask(range(len(rows)))
        learned = sorted(t for ids, flags in rendered for t, flag in zip(ids, flags, strict=True) if flag)
        assert sorted(tokens[mask == 1].tolist()) == learned
        everything = np.bincount([t for ids, _ in rendered for t in ids], minlength=tokenizer.vocab_size)
        padding = tokens.size - everything.sum()
        everything[tokenizer.bos_id] += padding
        assert (np.bincount(tokens.ravel(), minlength=tokenizer.vocab_size) == everything).all()
        _, targets = rows.batch([0])
        assert ((targets == -1) == (mask[:1, 1:] == 0)).all()


def test_the_same_conversations_are_packed_once(tokenizer):
    splits = {"train": arithmetic.conversations("train", 5), "val": arithmetic.conversations("val", 5)}
    folder = prepare_conversations(splits, tokenizer, 128)
    assert prepare_conversations(splits, tokenizer, 128) == folder
    assert prepare_conversations(splits, tokenizer, 256) != folder
    with pytest.raises(ValueError, match="no val conversations"):
        prepare_conversations({"train": splits["train"], "val": []}, tokenizer, 128)
