"""Pushing to the hub, against a stand-in that keeps what it is given."""

import json

import pytest

from blockpruner.checkpoints.card import model_card
from blockpruner.checkpoints.hub import push
from blockpruner.core.errors import InputError
from blockpruner.store.files import write_sealed_json
from blockpruner.store.manifest import manifest
from tests.fakes import PushHub
from tests.plans import plan_of
from tests.tiny import tiny_model

LICENCE = {"license": "llama2", "license_link": "LICENSE.txt"}


@pytest.fixture
def checkpoint(tmp_path):
    folder, dense = tmp_path / "mine-0.2" / "hf", tmp_path / "dense"
    folder.mkdir(parents=True)
    dense.mkdir()
    source = {"source": {"repo": "meta-llama/Llama-2-7b-hf"}, "licence": LICENCE}
    (dense / "blockpruner_source.json").write_text(json.dumps(source))
    (dense / "config.json").write_text('{"model_type": "llama"}')
    plan = plan_of(tiny_model().config.to_dict(), ["mha.1", "mlp.2"])
    (folder / "README.md").write_text(model_card(plan, dense, "hf", "modeling_blockpruned.py"))
    (folder / "config.json").write_text("{}")
    write_sealed_json(
        folder / "verification.json", {"ok": True, "engine": "nobody", "manifest": manifest(folder)}
    )
    return folder


def test_what_is_verified_is_pushed_private_in_one_commit(checkpoint, monkeypatch):
    hub = PushHub(monkeypatch)
    assert (
        push(checkpoint, "me/small", True, LICENCE, "mine-0.2")
        == "https://hub.invalid/me/small/commit/1"
    )
    (_, card), (_, repo, made), (_, _, files, sent) = hub.calls
    assert card["base_model"] == "meta-llama/Llama-2-7b-hf"
    assert repo == "me/small"
    assert card["base_model_relation"] == "finetune"
    assert made == {"private": True, "exist_ok": True}
    assert "mine-0.2" in sent["commit_message"]
    contents = {file.path_in_repo: file.path_or_fileobj for file in files}
    assert set(contents) == {"config.json", "README.md", "verification.json"}
    local, shown = (checkpoint / "README.md").read_text(), contents["README.md"].decode()
    assert "vllm serve <this directory>" in local
    assert "vllm serve me/small" in shown
    assert 'from_pretrained("me/small"' in shown
    assert "<this directory>" not in shown


def test_a_repository_of_another_visibility_gets_nothing(checkpoint, monkeypatch):
    hub = PushHub(monkeypatch, private=False)
    with pytest.raises(
        InputError, match="'me/small' is there and public, and push.private is true; nothing was up"
    ):
        push(checkpoint, "me/small", True, LICENCE, "mine-0.2")
    assert [name for name, *_ in hub.calls] == ["validate", "create_repo"]


@pytest.mark.parametrize("name", ["config.json", "notes/keys.txt"])
def test_what_was_changed_or_added_since_stays_here(checkpoint, monkeypatch, name):
    hub = PushHub(monkeypatch)
    (checkpoint / name).parent.mkdir(exist_ok=True)
    (checkpoint / name).write_text('{"other": 1}')
    with pytest.raises(
        InputError, match=f"hf is not what was verified: {name} changed, or came or went"
    ):
        push(checkpoint, "me/small", True, LICENCE, "mine-0.2")
    assert hub.calls == []


def test_a_card_without_the_bases_licence_stays_here(checkpoint, monkeypatch):
    hub = PushHub(monkeypatch)
    card = checkpoint / "README.md"
    card.write_text(card.read_text().replace("license: llama2\n", ""))  # a card may be edited
    with pytest.raises(
        InputError, match=r"README\.md has no license, and the base model's is llama2: add it"
    ):
        push(checkpoint, "me/small", True, LICENCE, "mine-0.2")
    assert hub.calls == []
    assert push(checkpoint, "me/small", True, {}, "mine-0.2")


@pytest.mark.parametrize(
    ("report", "words"),
    [
        (None, "is not a verified checkpoint; give a folder that"),
        (
            {"ok": None, "engine": "xllamacpp", "unchecked": "xllamacpp is not installed"},
            "was not verified .xllamacpp is not installed.",
        ),
    ],
)
def test_what_is_not_verified_stays_here(checkpoint, monkeypatch, report, words):
    hub = PushHub(monkeypatch)
    (checkpoint / "verification.json").unlink()
    if report:
        write_sealed_json(checkpoint / "verification.json", report | {"manifest": {}})
    with pytest.raises(InputError, match=words):
        push(checkpoint, "me/small", True, LICENCE, "mine-0.2")
    assert hub.calls == []


@pytest.mark.parametrize("name", ["README.md", "notes.txt"])
def test_a_link_out_of_the_checkpoint_stays_here(checkpoint, monkeypatch, name):
    hub = PushHub(monkeypatch)
    (checkpoint.parent / "secret").write_text("PRIVATE KEY")
    (checkpoint / name).unlink(missing_ok=True)
    (checkpoint / name).symlink_to("../secret")
    report = {"ok": True, "engine": "nobody", "manifest": manifest(checkpoint)}
    write_sealed_json(checkpoint / "verification.json", report)
    with pytest.raises(InputError, match=f"{name} is a link out of its folder"):
        push(checkpoint, "me/small", True, {}, "mine-0.2")
    assert hub.calls == []


@pytest.mark.parametrize(
    "card", [b"---\n\xff\n---\n", b"---\nlicense: !!python/object/apply:os.system [ls]\n---\n"]
)
def test_a_card_that_is_no_yaml_is_refused_by_name(checkpoint, monkeypatch, card):
    hub = PushHub(monkeypatch)
    (checkpoint / "README.md").write_bytes(card)
    with pytest.raises(InputError, match="README.md: its metadata are no valid YAML"):
        push(checkpoint, "me/small", True, LICENCE, "mine-0.2")
    assert hub.calls == []
