"""SmolLM2, dense and pruned, by lm-eval's own command line: choices, knowledge, last words and
generated sums."""

import pytest

from blockpruner.checkpoints.registry import EXPORTS
from blockpruner.config.params import load_run
from blockpruner.evaluation.tasks import fetch_tasks
from blockpruner.evaluation.zero_shot import evaluate
from blockpruner.inputs.tokenizers import load_tokenizer
from blockpruner.model.models import load_model
from stages import CACHE, PINS
from tests.harness import assert_same, command_line
from tests.plans import pruning

pytestmark = pytest.mark.slow

TASKS = (
    "piqa",
    "winogrande",
    "hellaswag",
    "arc_easy",
    "arc_challenge",
    "mmlu_marketing",
    "lambada_openai",
    "gsm8k",
)
ITEMS = 10


@pytest.fixture(scope="module")
def task_dir(tmp_path_factory):
    wanted, directory = load_run("smollm2").evaluate.zero_shot, tmp_path_factory.mktemp("tasks")
    fetch_tasks(
        wanted.model_copy(update={"tasks": TASKS}), directory, directory, CACHE, PINS, print
    )
    return directory


@pytest.mark.parametrize("name", ["dense", "pruned"])
def test_the_command_line_gives_the_same_items(name, smollm2, plans, task_dir, tmp_path):
    checkpoint = smollm2
    if name == "pruned":
        checkpoint = tmp_path / "hf"
        EXPORTS["hf"].write(pruning(smollm2, list(plans.values())[1]), checkpoint)
    results, samples = command_line(
        checkpoint, task_dir, TASKS, tmp_path / "out", "--limit", str(ITEMS)
    )
    model = load_model(checkpoint, "float32", "cpu", trust_remote_code=True)
    for task in TASKS:
        ours = evaluate(model, load_tokenizer(checkpoint), task, task_dir, ITEMS)
        print(name, task, ours.scores)
        assert_same(results[task], samples[task], ours)
