"""No stranger's code runs: `auto_map` of others, local or of another repository, through every step
of every family."""

import json
import shutil

import pytest

from blockpruner.checkpoints import verification
from blockpruner.checkpoints.hf import export_hf
from blockpruner.checkpoints.verification import verify_checkpoint
from blockpruner.core.errors import InputError
from blockpruner.evaluation.suite import Checkpoint
from blockpruner.inputs.tokenizers import load_tokenizer
from blockpruner.model.classes import ENTRIES, has_our_code
from tests.fakes import InProcess
from tests.plans import fetch, plan_of, pruning
from tests.tiny import VARIANTS_DAILY, save_tiny

MODULES = {
    "AutoConfig": "configuration_phi3.Phi3Config",
    "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
}
UPSTREAM = {name: f"microsoft/Phi-3-mini-4k-instruct--{text}" for name, text in MODULES.items()}
MIXED = {"AutoConfig": "stranger.Config", "AutoModelForCausalLM": "someone/model--stranger.Model"}
CASES = [("phi3", MODULES), ("phi3", UPSTREAM), *((family, MIXED) for family in VARIANTS_DAILY)]
"""First what microsoft/Phi-3-mini-4k-instruct has, and what its fine-tunes have."""

MARKER = (
    "import pathlib\npathlib.Path({path!r}).touch()\nclass Config: ...\nclass Model: ...\nclass"
    " Tokenizer: ...\n"
)


def poison(folder, auto_map, marker):
    """Add `auto_map` to all configs, and the code that it names, which leaves a mark when it is
    run."""
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        path = folder / name
        config = json.loads(path.read_text()) if path.exists() else {}
        wanted = {**auto_map, "AutoTokenizer": ["stranger.Tokenizer", None]}
        path.write_text(json.dumps(config | {"auto_map": wanted}))
    for text in ("stranger.x", *auto_map.values()):
        module = text.rpartition("--")[2].partition(".")[0]
        (folder / f"{module}.py").write_text(MARKER.format(path=str(marker)))
    return folder


def asks_for(folder):
    """Every `auto_map` in a folder."""
    found = [json.loads(path.read_text()).get("auto_map") for path in folder.glob("*.json")]
    return [entry for entry in found if entry]


@pytest.mark.parametrize(("family", "auto_map"), CASES)
def test_no_code_of_strangers_runs(tmp_path, in_process, family, auto_map):
    """Fetch, both kinds of export, verification, and what benchmark and recover load. A mark would
    be left by any step that runs the code; every folder asks for our own code at most."""
    marker = tmp_path / "marker"
    source = poison(save_tiny(tmp_path / "mine", family), auto_map, marker)
    dense = fetch(source, tmp_path / "model")
    assert asks_for(dense) == [] and not list(dense.glob("*.py"))
    # as if it had come by another way, for instance from a remote of DVC
    for file in source.glob("*.py"):
        shutil.copy(file, dense)
    poisoned = poison(dense, auto_map, marker)
    for name, order in {
        "holes": ["mha.0", "mlp.3"],
        "whole": ["mha.1,mlp.1", "mha.2,mlp.2"],
    }.items():
        out = tmp_path / name
        export_hf(pruning(poisoned, plan_of(poisoned, order)), out)
        ours = [path.name for path in out.glob("*.py")]
        modelling = f"{ours[0].removesuffix('.py')}." if ours else None
        assert ours in ([], ["modeling_blockpruned.py"])
        assert all(text.startswith(modelling) for entry in asks_for(out) for text in entry.values())
        assert {key for entry in asks_for(out) for key in entry} <= {*ENTRIES}
        assert has_our_code(out) is bool(ours)
        export = Checkpoint(out, "float32", "cpu", trust_remote_code=False, dense=dense)
        assert export.key and export.model.num_parameters() and export.tokenizer("a")["input_ids"]
    assert not marker.exists()


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    root = tmp_path_factory.mktemp("export")
    dense = fetch(save_tiny(root / "mine"), root / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "subprocess", InProcess)
        export_hf(pruning(dense, plan_of(dense, ["mha.0"])), root / "out")
    return root / "out"


def edit_config(folder, **auto_map):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"auto_map": config["auto_map"] | auto_map})
    )


TAMPERED = {
    "our file changed": lambda folder, code: (
        (folder / "modeling_blockpruned.py").open("a").write(code)
    ),
    "a file beside it": lambda folder, code: (folder / "other.py").write_text(code),
    "custom generate": lambda folder, code: (
        (folder / "custom_generate").mkdir()
        or (folder / "custom_generate/generate.py").write_text(code)
    ),
    "another repository": lambda folder, _: edit_config(
        folder, AutoModelForCausalLM="a/b--modeling_blockpruned.X"
    ),
    "another entry": lambda folder, _: edit_config(folder, AutoTokenizer="modeling_blockpruned.X"),
}


@pytest.mark.parametrize("how", TAMPERED)
def test_an_export_is_trusted_only_with_our_file_as_it_is_installed(tmp_path, export, how):
    folder, marker = shutil.copytree(export, tmp_path / "copy"), tmp_path / "marker"
    TAMPERED[how](folder, MARKER.format(path=str(marker)))
    for step in (has_our_code, lambda path: verify_checkpoint(path, tmp_path / "reference", 1.0)):
        with pytest.raises(
            InputError, match="copy holds or names code that is not the installed blockpruner's"
        ):
            step(folder)
    assert not marker.exists()


def test_a_tokenizer_never_asks_for_trust(export):
    """The way of the card; transformers would ask on the terminal without `False`."""
    card = (export / "README.md").read_text()
    assert 'AutoTokenizer.from_pretrained("<this directory>", trust_remote_code=False)' in card
    assert (
        load_tokenizer(export)("some text")["input_ids"]
        == load_tokenizer(export.parent / "model")("some text")["input_ids"]
    )


def test_a_run_that_trusts_has_its_model_and_tokenizer_loaded(tmp_path, in_process):
    """The dense model by `baseline`; an export by `benchmark`, with the tokenizer of the dense
    model, since it holds no code of strangers."""
    folder = save_tiny(tmp_path / "mine")
    (folder / "words.py").write_text(
        "from transformers import PreTrainedTokenizerFast\nclass Words(PreTrainedTokenizerFast):\n "
        "   mine = True\n"
    )
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {
        "tokenizer_class": "Words",
        "auto_map": {"AutoTokenizer": [None, "words.Words"]},
    }
    path.write_text(json.dumps(config))
    dense = fetch(folder, tmp_path / "model", trust_remote_code=True)
    export_hf(pruning(dense, plan_of(dense, ["mha.0"]), trust_remote_code=True), tmp_path / "out")
    assert not (tmp_path / "out/words.py").exists()
    for checkpoint in (
        Checkpoint(dense, "float32", "cpu", True),
        Checkpoint(tmp_path / "out", "float32", "cpu", True, dense),
    ):
        assert checkpoint.tokenizer.mine and checkpoint.model.num_parameters()
