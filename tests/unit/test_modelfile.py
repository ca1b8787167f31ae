"""Ollama's Modelfile against transformers' chat templates; a reader of Ollama's template is written here."""

import re

import pytest
from transformers import PreTrainedTokenizerFast

from blockpruner.checkpoints.modelfile import modelfile
from tests.tiny import tiny_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITH_DEFAULT = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are \"tiny\".<|im_end|>\n' }}{% endif %}" + CHATML
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m.role + '<|end|>\n\n' + m.content + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% elif m.role == 'user' %}{{ '[INST] ' }}{% if loop.index == 2 and messages[0].role == 'system' %}"
    "{{ messages[0].content + '\n\n' }}{% endif %}{{ m.content + ' [/INST]' }}{% endif %}{% endfor %}"
)
CONVERSATIONS = [
    [("user", "Hello")],
    [("system", "Be brief.\n"), ("user", " a b ")],
    [("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4"), ("user", "{{ 5 }}")],
]


def tokenizer(template):
    """Its class has no template of its own; some Llama tokenizers put a <s> before a text, this one does not."""
    found = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer().backend_tokenizer, bos_token="<s>", eos_token="</s>"
    )
    found.chat_template = template
    return found


def commands(text):
    """A Modelfile by its commands."""
    parts = re.findall(r'(?ms)^(FROM|TEMPLATE|SYSTEM|PARAMETER stop) (?:"""(.*?)"""|"(.*?)"|(\S+))$', text)
    assert "".join(command for command, *_ in parts)
    return {command: "".join(values) for command, *values in parts}


def ollamas(given, messages):
    """What Ollama makes of messages: Go's `range`, `if eq .Role` and `.Content`, and its own system message."""
    if given.get("SYSTEM") and messages[0][0] != "system":
        messages = [("system", given["SYSTEM"]), *messages]
    body, end = re.fullmatch(r"(?s)\{\{ range \.Messages \}\}(.*)\{\{ end \}\}(.*)", given["TEMPLATE"]).groups()
    branches = re.fullmatch(
        r'(?s)\{\{ if eq \.Role "(\w+)" \}\}(.*)\{\{ else if eq \.Role "(\w+)" \}\}(.*)\{\{ else \}\}(.*)\{\{ end \}\}',
        body,
    ).groups()
    by_role = {branches[0]: branches[1], branches[2]: branches[3]}
    said = [by_role.get(role, branches[4]).split("{{ .Content }}") for role, _ in messages]
    return "".join(before + text + after for (before, after), (_, text) in zip(said, messages, strict=True)) + end


@pytest.mark.parametrize(
    ("template", "adds_bos", "system"),
    [
        (CHATML, False, None),
        (WITH_DEFAULT, False, 'You are "tiny".'),
        (ZEPHYR, False, None),
        (LLAMA_3, True, None),
    ],
)
def test_ollama_says_what_the_chat_template_says(template, adds_bos, system):
    """Whoever adds the first special token."""
    source = tokenizer(template)
    found = commands(modelfile("model-Q8_0.gguf", source, adds_bos))
    assert (found["FROM"], found["PARAMETER stop"]) == ("./model-Q8_0.gguf", "</s>")
    assert found.get("SYSTEM") == system
    for turns in CONVERSATIONS:
        messages = [{"role": role, "content": content} for role, content in turns]
        expected = source.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert ("<s>" if adds_bos else "") + ollamas(found, turns) == expected


@pytest.mark.parametrize(
    ("template", "adds_bos"),
    [
        (None, False),
        (MISTRAL, True),  # the system message is within the first user's
        (LLAMA_3, False),  # before the first message alone, whose ever it is
        (CHATML, True),  # Ollama would put a <s> where the template has none
        (CHATML.replace("m.content", "m.content | upper"), False),
        (WITH_DEFAULT.replace('"tiny"', "tiny on ' + strftime_now('%d') + '"), False),
        (CHATML.replace("<|im_end|>", "<|{{|>"), False),
        (WITH_DEFAULT.replace('"tiny".', '"tiny"'), False),  # ends with the quote that would end it
        ("{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML, False),
        (CHATML.replace("<|im_start|>' +", "<|im_start|>' + loop.index|string +"), False),
    ],
)
def test_a_template_that_ollama_cannot_tell_is_left_to_it(template, adds_bos):
    assert modelfile("m.gguf", tokenizer(template), adds_bos) == 'FROM ./m.gguf\nPARAMETER stop "</s>"\n'
