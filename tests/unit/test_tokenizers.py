"""A checkpoint's tokenizer: loaded without torch's models, and refused with the folder's name where
it is damaged."""

import pytest

from blockpruner.core.errors import InputError
from blockpruner.inputs.tokenizers import load_tokenizer
from tests.tiny import tiny_tokenizer


@pytest.fixture
def directory(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_it_is_the_one_that_was_saved(directory):
    assert load_tokenizer(directory)("a cat")["input_ids"] == tiny_tokenizer()("a cat")["input_ids"]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"[]", lambda b: b"\xff\xfe"]
)
def test_a_damaged_file_is_refused(directory, name, damage):
    path = directory / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(
        InputError, match=rf"the tokenizer in {directory} cannot .*fetch the checkpoint again"
    ):
        load_tokenizer(directory)
