"""The tokenizer of a checkpoint. Loading it needs no model and no torch."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from blockpruner.core.errors import InputError
from blockpruner.core.progress import errors_only
from blockpruner.inputs.calibration import beginning
from blockpruner.store.files import read_json


def load_tokenizer(directory: Path, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a checkpoint directory; raises InputError that names the directory and
    the reason."""
    from transformers import AutoTokenizer

    try:
        # transformers warns about the type of a pruned model, which it does not have.
        with errors_only("transformers.configuration_utils"):
            return AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=trust_remote_code
            )
    except Exception as error:
        # A damaged file raises a bare Exception in tokenizers, and anything in transformers.
        reason = textwrap.shorten(str(error), 300)
        raise InputError(
            f"the tokenizer in {directory} cannot be loaded ({type(error).__name__}: {reason}); its"
            " files are missing, truncated or damaged, or need what the reason names: fetch the"
            " checkpoint again, or install that"
        ) from error


def conversation(tokenizer: Callable[[], Any], messages: Sequence[Mapping[str, Any]]) -> str:
    """A conversation as the tokenizer's chat template writes it, without the BOS that the tokenizer
    puts before it; raises InputError if there is no template, or it refuses the messages."""
    loaded = tokenizer()
    if not loaded.chat_template:
        raise InputError(
            "the texts are records of chat messages, and the model's tokenizer has no chat"
            " template; give records with a text, or a model for chats",
            rule="no-chat-template",
        )
    try:
        text = str(loaded.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # of a template, which is code of its own
        raise InputError(
            f"the model's chat template refuses a record: {error}", rule="chat-template"
        ) from error
    return text.removeprefix(loaded.bos_token or "") if beginning(loaded) else text


def load_export_tokenizer(checkpoint: Path, dense: Path, trust_remote_code: bool) -> Any:
    """Load the tokenizer of an export, which holds no code of a tokenizer. If the run trusts its
    model's code, and the tokenizer is such code, it is the dense model's."""
    config = dense / "tokenizer_config.json"
    if trust_remote_code and config.exists() and "auto_map" in read_json(config):
        return load_tokenizer(dense, trust_remote_code=True)
    return load_tokenizer(checkpoint)
