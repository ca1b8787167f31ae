"""The Modelfile beside GGUF files, of which Ollama makes a model.

Decides whether Ollama's language can tell a chat template. Of a template that is neither told here nor among those that
Ollama knows, it makes no chat.
"""

from __future__ import annotations

from typing import Any

ROLES = {"S": "system", "U": "user", "A": "assistant"}
TRIED = ("U", "SU", "UAU", "SUAU", "UAUAU")
"""Conversations in which the two templates must agree."""

CONTENTS = {"system": "Say 1 of\n\n2 <things>.", "user": "What's 3?", "assistant": "4, and\n5."}
TEMPLATE = (
    '{{{{ range .Messages }}}}{{{{ if eq .Role "system" }}}}{system}{{{{ else if eq .Role "user" }}}}{user}'
    "{{{{ else }}}}{assistant}{{{{ end }}}}{{{{ end }}}}{begin}"
)


def modelfile(weights: str, tokenizer: Any, adds_bos: bool) -> str:
    """The text of a Modelfile.

    Args:
        weights: the name of the GGUF file.
        adds_bos: whether Ollama will put the first special token before a text.
    """
    lines = [f"FROM ./{weights}"]
    if (found := _chat(tokenizer, tokenizer.bos_token if adds_bos else "")) is not None:
        template, system = found
        lines.append(f'TEMPLATE """{template}"""')
        lines += [f'SYSTEM """{system}"""'] if system else []
    if tokenizer.eos_token:
        lines.append(f'PARAMETER stop "{tokenizer.eos_token}"')
    return "\n".join(lines) + "\n"


def _chat(tokenizer: Any, bos: str) -> tuple[str, str] | None:
    """Ollama's template, and the system message of a conversation without one.

    None where the text around a message does not depend on its role alone, or on the day: the two would not agree.
    """
    system, user, assistant = CONTENTS.values()
    try:
        if "strftime_now" in tokenizer.get_chat_template():
            return None
        said = {turns: _said(tokenizer, turns, True) for turns in TRIED}
        one, pair, four = (_said(tokenizer, turns, False) for turns in ("U", "UA", "SUAU"))
    except Exception:  # there is no template, or it refuses: it is the code of others
        return None
    before, _, after_user = one.partition(user)
    begin, after_answer = said["U"].removeprefix(one), pair.partition(assistant)[2]
    before_user = four.partition(assistant)[2].partition(user)[0].removeprefix(after_answer)
    head, _, rest = four.partition(system)
    after_system = rest.partition(user)[0].removesuffix(before_user)
    default = "" if before == bos + before_user else before.removeprefix(head).removesuffix(after_system + before_user)
    around = {
        "system": (head.removeprefix(bos), after_system),
        "user": (before_user, after_user),
        "assistant": (begin, after_answer),
    }

    def told(turns: str) -> str:
        messages = [(ROLES[turn], CONTENTS[ROLES[turn]]) for turn in turns]
        messages = [("system", default), *messages] if default and "S" not in turns else messages
        return bos + "".join(around[role][0] + text + around[role][1] for role, text in messages) + begin

    if any("{{" in text for texts in around.values() for text in texts) or any(told(t) != said[t] for t in TRIED):
        return None
    parts = {role: "{{ .Content }}".join(texts) for role, texts in around.items()}
    template = TEMPLATE.format(begin=begin, **parts)
    is_quotable = all(f'{text}"""'.index('"""') == len(text) for text in (template, default))
    return (template, default) if is_quotable else None


def _said(tokenizer: Any, turns: str, begun: bool) -> str:
    messages = [{"role": ROLES[turn], "content": CONTENTS[ROLES[turn]]} for turn in turns]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=begun))
