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
    auto_map = {**auto_map, "AutoTokenizer": ["stranger.Tokenizer", None]}
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        path = folder / name
        config = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(config | {"auto_map": auto_map}))
    code = MARKER.format(path=str(marker))
    for class_path in ("stranger.x", auto_map["AutoConfig"], auto_map["AutoModelForCausalLM"]):
        module = class_path.rpartition("--")[2].partition(".")[0]
        (folder / f"{module}.py").write_text(code)
    return folder


def auto_maps(folder):
    """Every `auto_map` in a folder."""
    configs = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return [config["auto_map"] for config in configs if config.get("auto_map")]


@pytest.mark.parametrize(("family", "auto_map"), CASES)
def test_no_code_of_strangers_runs(tmp_path, in_process, family, auto_map):
    """Fetch, both kinds of export, verification, and what benchmark and recover load. Any step that
    runs the code would leave a mark; every folder names our own code at most."""
    marker = tmp_path / "marker"
    source = poison(save_tiny(tmp_path / "mine", family), auto_map, marker)
    dense = fetch(source, tmp_path / "model")
    assert auto_maps(dense) == [] and not list(dense.glob("*.py"))
    # Code may come by another way, for instance from a remote of DVC.
    for file in source.glob("*.py"):
        shutil.copy(file, dense)
    poison(dense, auto_map, marker)
    plans = {"holes": ["mha.0", "mlp.3"], "layers": ["mha.1,mlp.1", "mha.2,mlp.2"]}
    for name, blocks in plans.items():
        out = tmp_path / name
        export_hf(pruning(dense, plan_of(dense, blocks)), out)
        code_files = [path.name for path in out.glob("*.py")]
        assert code_files in ([], ["modeling_blockpruned.py"])
        assert has_our_code(out) is bool(code_files)
        for entries in auto_maps(out):
            assert code_files and entries.keys() <= {*ENTRIES}
            for class_path in entries.values():
                assert class_path.startswith("modeling_blockpruned.")
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


def change_our_file(folder, code):
    (folder / "modeling_blockpruned.py").open("a").write(code)


def add_a_file(folder, code):
    (folder / "other.py").write_text(code)


def add_custom_generate(folder, code):
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate/generate.py").write_text(code)


def edit_auto_map(folder, **auto_map):
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] |= auto_map
    (folder / "config.json").write_text(json.dumps(config))


def name_another_repository(folder, code):
    edit_auto_map(folder, AutoModelForCausalLM="a/b--modeling_blockpruned.X")


def name_another_entry(folder, code):
    edit_auto_map(folder, AutoTokenizer="modeling_blockpruned.X")


@pytest.mark.parametrize(
    "tamper",
    [
        change_our_file,
        add_a_file,
        add_custom_generate,
        name_another_repository,
        name_another_entry,
    ],
)
def test_an_export_is_trusted_only_with_our_file_as_it_is_installed(tmp_path, export, tamper):
    folder = shutil.copytree(export, tmp_path / "copy")
    marker = tmp_path / "marker"
    tamper(folder, MARKER.format(path=str(marker)))
    message = "copy holds or names code that is not the installed blockpruner's"
    with pytest.raises(InputError, match=message):
        has_our_code(folder)
    with pytest.raises(InputError, match=message):
        verify_checkpoint(folder, tmp_path / "reference", 1.0)
    assert not marker.exists()


def test_a_tokenizer_never_asks_for_trust(export):
    """As the card loads it; transformers would ask on the terminal without `False`."""
    card = (export / "README.md").read_text()
    assert 'AutoTokenizer.from_pretrained("<this directory>", trust_remote_code=False)' in card
    ids = load_tokenizer(export)("some text")["input_ids"]
    assert ids == load_tokenizer(export.parent / "model")("some text")["input_ids"]


TOKENIZER_CODE = """
from transformers import PreTrainedTokenizerFast

class Words(PreTrainedTokenizerFast):
    mine = True
"""


def test_a_run_that_trusts_has_its_model_and_tokenizer_loaded(tmp_path, in_process):
    """The dense model by `baseline`; an export by `benchmark`, with the tokenizer of the dense
    model, since it holds no code of strangers."""
    folder = save_tiny(tmp_path / "mine")
    (folder / "words.py").write_text(TOKENIZER_CODE)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config |= {"tokenizer_class": "Words", "auto_map": {"AutoTokenizer": [None, "words.Words"]}}
    path.write_text(json.dumps(config))
    dense = fetch(folder, tmp_path / "model", trust_remote_code=True)
    out = tmp_path / "out"
    export_hf(pruning(dense, plan_of(dense, ["mha.0"]), trust_remote_code=True), out)
    assert not (out / "words.py").exists()
    baseline = Checkpoint(dense, "float32", "cpu", True)
    export = Checkpoint(out, "float32", "cpu", True, dense)
    for checkpoint in (baseline, export):
        assert checkpoint.tokenizer.mine and checkpoint.model.num_parameters()
