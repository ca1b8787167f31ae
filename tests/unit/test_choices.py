"""Log-likelihoods of choices against plain forwards, request by request, and what is computed once."""

import pytest
import torch

from blockpruner.core.blocks import parse_mask
from blockpruner.evaluation import choices
from blockpruner.evaluation.choices import answers, groups
from blockpruner.model.models import prune_
from tests.tiny import VARIANTS, VARIANTS_DAILY, tiny_model


def requests_of(rng, vocabulary):
    """Items with choices behind one text, choices before it, a choice of one token, an item alone, and a long one."""

    def some(count):
        return torch.randint(3, vocabulary, (count,), generator=rng).tolist()

    found = []
    for length, choices_ in ((30, (5, 9, 1, 4)), (12, (3, 3)), (9, (1, 1, 1)), (3, (2, 2)), (45, (7, 6, 8, 2))):
        given = some(length)
        found += [(given, some(count)) for count in choices_]
    before, after = some(15), some(6)
    found += [([*before, *some(count)], after) for count in (2, 3)]
    return [*found, (some(20), some(4)), (some(70), some(9)), (some(70), some(9))]


def oracle(model, given, rest, max_length):
    """One plain forward of the whole request."""
    tokens = [*given, *rest][-(max_length + 1) :]
    logits = model(torch.tensor([tokens[:-1]]), use_cache=False).logits[0].double().log_softmax(-1)[-len(rest) :]
    total = sum(logits[i, token].item() for i, token in enumerate(rest))
    return total, logits.argmax(-1).tolist() == rest


@pytest.mark.parametrize(
    "family", [one if one in VARIANTS_DAILY else pytest.param(one, marks=pytest.mark.slow) for one in VARIANTS]
)
@pytest.mark.parametrize("tokens", [1, 512])
def test_answers_are_those_of_plain_forwards(family, tokens, monkeypatch):
    monkeypatch.setattr(choices, "TOKENS", tokens)  # 1: each group on its own
    dtype = torch.float32 if family == "gemma2" else torch.float64  # its attention's softmax knows no wider mask
    model = prune_(tiny_model(family, dtype=dtype), parse_mask("mha.0,mlp.1"))
    requests = requests_of(torch.Generator().manual_seed(1), model.config.vocab_size)
    done = []
    found = answers(model, requests, 60, done.append)
    assert done[-1] == len(requests)
    for answer, (given, rest) in zip(found, requests, strict=True):
        expected = oracle(model, given, rest, 60)
        assert (
            answer[0] == pytest.approx(expected[0], rel=1e-4 if dtype == torch.float32 else 1e-6)
            and answer[1] is expected[1]
        )


def test_what_choices_have_in_common_is_read_once(monkeypatch):
    model = tiny_model(dtype=torch.float64)
    read = []
    model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    given = list(range(3, 43))
    answers(model, [(given, [5, 6, 7]), (given, [8, 9, 10]), (given, [11, 12, 13]), (given, [5, 5, 5])], 60)
    assert read == [39, 4 * 3]  # all but the last given token, which predicts; then it and two tokens of each choice


def test_a_row_that_fits_beside_fewer_common_tokens_is_tried_beside_these_and_nothing_is_scored_twice(monkeypatch):
    """As if after one pass no other row fitted beside the common tokens of two groups."""
    model = tiny_model(dtype=torch.float64)
    given = [(n, *range(3, 13)) for n in range(4)]
    requests = [(tokens, (20 + n, *range(30, 49))) for tokens in given for n in range(7)]  # one pass does not hold 28
    expected, score = answers(model, requests, 60), choices._score
    beside_several, scored, failed = [], [], []

    def scarce(model, requests_left, before=None):
        if before is not None and len(before[1]) > 1:
            if beside_several:
                failed.append(len(requests_left))
                raise torch.OutOfMemoryError("CUDA out of memory.")
            beside_several.append(requests_left)
        scored.extend(request.number for request in requests_left)
        return score(model, requests_left, before)

    monkeypatch.setattr(choices, "_score", scarce)
    found = answers(model, requests, 60)
    assert sorted(scored) == list(range(len(requests))) and max(failed) > min(failed) == 1
    assert [hit for _, hit in found] == [hit for _, hit in expected]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-9)


def test_groups_end_where_little_is_common():
    def request(number, *tokens):
        return choices.Continuation(number, tokens, 1)

    a, b = tuple(range(20)), tuple(range(12))
    found = groups([request(0, *a, 1, 2), request(1, *a, 3, 4), request(2, *b, 7, 8), request(3, 9, 9)])
    assert [(group.common, [one.number for one in group.requests]) for group in found] == [
        (20, [0, 1]), (0, [2]), (0, [3]),
    ]  # fmt: skip
