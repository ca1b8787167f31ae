"""Texts of users and of strangers inside Markdown: nothing in them is markup."""

import re


def plain(text: str) -> str:
    """Keep Markdown from reading a text as markup; line breaks become spaces."""
    return re.sub(r"([\\`*\[\]<>|&])", r"\\\1", " ".join(text.split()))


def code(text: str) -> str:
    """A text as a span of code, which a backtick would end."""
    return f"`{' '.join(text.replace('`', chr(39)).split())}`"
