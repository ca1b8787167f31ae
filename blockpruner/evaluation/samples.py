"""What a model answers: greedy texts for people to read, a pruned model's beside the dense one's.

Decides the prompts, and how a turn of a conversation is put to a model. No number is made of the
texts.
"""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from blockpruner.core.errors import InputError

PROMPTS = (
    "What is the capital of France?",
    "Explain in one sentence why the sky is blue.",
    "Write two sentences about a fox who wants to learn to swim.",
)

NEW_TOKENS = 48
"""The most in a sample: about two sentences."""


def answer(
    model: PreTrainedModel,
    tokenizer: Any,
    turns: Sequence[str],
    limit: int = NEW_TOKENS,
    streamer: Any = None,
) -> str:
    """Answer the last turn, greedily. Turns are the user's and the model's, one after the other. A
    model without a chat template continues the last one. Raises InputError for an empty one."""
    messages = []
    for number, turn in enumerate(turns):
        role = "assistant" if number % 2 else "user"
        messages.append({"role": role, "content": turn})
    is_chat, text = bool(tokenizer.chat_template), turns[-1]
    if is_chat:
        try:
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        # A template is code, which raises what it likes.
        except Exception as error:
            raise InputError(
                f"the model's chat template refuses the turns: {error}", rule="chat-template"
            ) from error
    # A chat template writes the special tokens itself.
    ids = tokenizer(text, add_special_tokens=not is_chat, return_tensors="pt").input_ids
    ids = ids.to(model.device)
    if not ids.numel():
        raise InputError(
            "the prompt has no token; give some words", rule="no-token", key="prompt", value=text
        )
    mask = ids.new_ones(ids.shape)
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=limit,
        do_sample=False,
        pad_token_id=0,
        streamer=streamer,
    )
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
