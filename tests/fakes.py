"""Stand-ins for what is slow or remote: processes that verify exports, clocks, and the hub."""

from __future__ import annotations

import hashlib
import json
import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import huggingface_hub
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects
from transformers import CONFIG_MAPPING

from blockpruner.checkpoints import verification
from blockpruner.evaluation import latency, speed


class InProcess:
    """Stands in for `verification.subprocess`: the verdict of an engine's script without a fresh
    process, which takes seconds."""

    @staticmethod
    def run(command: Sequence[str], **_: Any) -> SimpleNamespace:
        *_, script, checkpoint, reference, tolerance = command
        verify, ours = runpy.run_path(script)["verify"], sys.modules.pop("blockpruner")
        try:
            # the checkpoint's own code is run
            with patch.dict(CONFIG_MAPPING._extra_content, clear=True):
                report = verify(checkpoint, reference, float(tolerance))
        except Exception as error:  # of which a process leaves its traceback
            return SimpleNamespace(returncode=1, stdout="", stderr=str(error))
        finally:
            sys.modules["blockpruner"] = ours
        return SimpleNamespace(
            returncode=int(not report["ok"]), stdout=json.dumps(report), stderr=""
        )


@contextmanager
def unverified() -> Iterator[None]:
    """Within, exports are written and not verified."""
    answer = SimpleNamespace(returncode=0, stdout='{"ok": true, "engine": "nobody"}\n', stderr="")
    with patch.object(verification.subprocess, "run", lambda *_, **__: answer):
        yield


@contextmanager
def made_up_times() -> Iterator[None]:
    """Within, generation without the MHA blocks takes 0.8, without the MLP blocks 0.9, with all 1
    second."""
    seconds = {"dense": 1.0, "mha": 0.8, "mlp": 0.9}

    def generate(model: Any, prompt: Any, new_tokens: int) -> speed.Generation:
        without = [
            name for name in ("mha", "mlp") if getattr(model.config, f"layers_without_{name}", None)
        ]
        return speed.Generation(prompt, seconds[without[0] if without else "dense"], 0.0, 0)

    with patch.object(latency, "generate", generate):
        yield


SHA = "0123456789" * 4


class Hub:
    """A stand-in for the hub: whatever the revision, commit SHA of every repository is a local
    folder."""

    def __init__(self, folder: Path, monkeypatch: Any) -> None:
        self.folder, self.cache = folder, folder.with_name(f"{folder.name}-cache")
        self.asked: list[tuple[str, str]] = []
        self.downloaded: list[str] = []
        self.breaks_after: int | None = None
        """After so many files the line is cut."""
        monkeypatch.setattr(
            huggingface_hub.HfApi, "model_info", lambda api, *a, **k: self.model_info(*a, **k)
        )
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.download)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.file)

    def model_info(self, repo: str, revision: str) -> Any:
        self.asked.append((repo, revision))
        return type("Info", (), {"sha": SHA})()

    def file(self, repo: str, name: str, *, revision: str) -> str:
        assert revision == SHA, f"{revision!r} is unknown"
        return str(self.folder / name)

    def download(
        self, repo: str, *, revision: str, allow_patterns: Any, ignore_patterns: Any
    ) -> str:
        """Into a cache, which keeps what came before the line was cut."""
        assert revision == SHA, f"{revision!r} is unknown"
        names = [
            path.relative_to(self.folder).as_posix()
            for path in self.folder.rglob("*")
            if path.is_file()
        ]
        for name in filter_repo_objects(
            names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            place, content = self.cache / name, (self.folder / name).read_bytes()
            if place.exists():
                continue
            if len(self.downloaded) == self.breaks_after:
                self.breaks_after = None
                raise ConnectionError("the line is cut")
            blob = self.cache / "blobs" / hashlib.sha256(content).hexdigest()
            for path in (place, blob):
                path.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(content)
            place.unlink(missing_ok=True)
            place.symlink_to(blob)
            self.downloaded.append(name)
        return str(self.cache)


class PushHub:
    """A stand-in for the hub that keeps what it is given."""

    def __init__(self, monkeypatch: Any, private: bool = True) -> None:
        self.calls: list[Any] = []
        monkeypatch.setattr(
            huggingface_hub.HfApi,
            "model_info",
            lambda api, repo: type("Info", (), {"private": private})(),
        )
        monkeypatch.setattr(
            ModelCard, "validate", lambda card: self.calls.append(("validate", card.data.to_dict()))
        )
        for name in ("create_repo", "create_commit"):
            monkeypatch.setattr(
                huggingface_hub.HfApi, name, lambda api, *a, _name=name, **k: self.call(_name, a, k)
            )

    def call(self, name: str, args: Any, options: Any) -> Any:
        self.calls.append((name, *args, options))
        return type("Commit", (), {"commit_url": "https://hub.invalid/me/small/commit/1"})
