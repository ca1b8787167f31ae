"""The streamed engine against the engine in memory, bit for bit, and against full forward
passes."""

import json
import os
import random
import re
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from blockpruner.core.blocks import DENSE, all_blocks, parse_mask
from blockpruner.core.errors import DeviceMemoryError, InputError
from blockpruner.model.models import load_model, masked
from blockpruner.scoring.engine import Engine
from blockpruner.scoring.large import memory, streaming
from blockpruner.scoring.large.streaming import StreamingEngine
from blockpruner.scoring.work import Task
from tests.oracles import make_rows, score_all, sweep
from tests.tiny import GRID, full_nll, tiny_model, tolerance


def save(directory, family="llama", dtype=torch.float64, shard="5GB", **config):
    tiny_model(family, dtype=dtype, **config).save_pretrained(directory, max_shard_size=shard)
    return directory


def both(checkpoint, masks, rows, dtype="float64", batch_tokens=40, **options):
    """The streamed values and those of the engine in memory."""
    streamed = StreamingEngine(
        checkpoint, dtype, device="cpu", batch_tokens=batch_tokens, **options
    )
    in_memory = Engine(load_model(checkpoint, dtype, "cpu"), batch_tokens)
    return score_all(streamed, masks, rows), score_all(in_memory, masks, rows)


def random_masks(count, layers=4, seed=11):
    chosen = random.Random(seed)
    blocks = all_blocks(layers)
    return list(
        {frozenset(chosen.sample(blocks, chosen.randint(0, len(blocks)))) for _ in range(count)}
    )


@pytest.mark.parametrize("family", GRID)
@pytest.mark.parametrize(
    ("tied", "lengths"),
    [(False, [16] * 5), (True, [16, 3, 9, 12, 2, 7])],
    ids=["untied, even", "tied, padded"],
)
def test_equals_the_engine_in_memory_and_full_forwards(tmp_path, family, tied, lengths):
    rows, masks = make_rows(lengths), sweep()
    checkpoint = save(tmp_path, family, tie_word_embeddings=tied)
    streamed, in_memory = both(checkpoint, masks, rows)
    assert streamed == in_memory
    model = tiny_model(family, tie_word_embeddings=tied)
    for mask in masks:
        with masked(model, mask):
            for index, row in enumerate(rows):
                assert streamed[mask, index] == pytest.approx(
                    full_nll(model, row), abs=tolerance(family)
                )


@pytest.mark.parametrize("family", ["qwen2", "gpt_neox"])
def test_arbitrary_masks(tmp_path, family):
    """Among them dense, layers without both blocks, and nothing left at all."""
    masks = [DENSE, frozenset(all_blocks(4)), parse_mask("mha.0,mlp.0"), *random_masks(30)]
    masks = list(dict.fromkeys(masks))
    rows = make_rows([10, 4, 10])
    streamed, in_memory = both(save(tmp_path, family), masks, rows)
    assert streamed == in_memory


def test_tasks_with_masks_of_their_own(tmp_path):
    """As after a resumed run: each batch lacks other masks."""
    rows = make_rows([8, 5, 8])
    tasks = [Task(range(i, i + 1), tuple(random_masks(6, seed=i))) for i in range(3)]
    streamed = StreamingEngine(save(tmp_path), "float64", device="cpu")
    in_memory = Engine(load_model(tmp_path, "float64", "cpu"))
    units = list(streamed.run(tasks, rows))
    assert {(unit.mask, unit.span): unit.loss for unit in units} == {
        (unit.mask, unit.span): unit.loss for unit in in_memory.run(tasks, rows)
    }
    assert len(units) == sum(len(task.masks) for task in tasks)


EXPERTS = {"mixtral": "num_local_experts", "qwen3_moe": "num_experts"}


@pytest.mark.parametrize(
    ("family", "stored", "dtype", "shard", "config"),
    [
        ("llama", "float64", "float64", "60KB", {}),
        ("llama", "float64", "float64", "60KB", {"tie_word_embeddings": True}),
        ("llama", "bfloat16", "float32", "5GB", {}),
        ("llama", "float16", "float32", "5GB", {}),
        ("llama", "bfloat16", "bfloat16", "5GB", {}),
        *((family, "float64", "float64", "5GB", {name: 12}) for family, name in EXPERTS.items()),
    ],
    ids=str,
)
def test_shards_dtypes_and_experts(tmp_path, family, stored, dtype, shard, config):
    """Experts are ordered by number: of twelve, 10 and 11 come last."""
    save(tmp_path, family, getattr(torch, stored), shard, **config)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 3) is (shard == "60KB")
    streamed, in_memory = both(tmp_path, sweep(), make_rows([16, 9]), dtype)
    assert streamed == in_memory


def test_a_tied_weight_that_is_stored_as_the_head(tmp_path):
    file = save(tmp_path, tie_word_embeddings=True) / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    streamed, in_memory = both(tmp_path, sweep(), make_rows([16, 9]))
    assert streamed == in_memory


@pytest.mark.parametrize(("room", "passes"), [(4, 3), (9, 1)])
def test_as_many_passes_as_the_states_need(tmp_path, monkeypatch, room, passes):
    """Half of the free memory holds so many of nine states. The last pass has the dense model, so
    each reads all."""
    rows, tile = make_rows([16] * 12), 12 * 16 * 32 * 8
    engine = StreamingEngine(save(tmp_path), "float64", device="cpu", batch_tokens=1000)
    monkeypatch.setattr(streaming, "available_memory", lambda: 2 * room * tile)
    in_memory = Engine(load_model(tmp_path, "float64", "cpu"), 1000)
    assert score_all(engine, sweep(), rows) == score_all(in_memory, sweep(), rows)
    assert engine._weights.bytes_read == passes * sum(
        weight.nbytes for weight in tiny_model().parameters()
    )


def test_weights_and_states_that_do_not_fit_are_refused_before_reading(tmp_path, monkeypatch):
    engine = StreamingEngine(save(tmp_path), "float64", device="cpu", batch_tokens=10**5)
    held = engine.plan_of([Task(range(1), (DENSE,))], make_rows([16])).weights_held
    for free, words in (
        (2 * held - 2, "weights take .*half of the free memory"),
        (2 * held, "a state takes .*half of the free memory"),
    ):
        monkeypatch.setattr(streaming, "available_memory", lambda free=free: free)
        with pytest.raises(DeviceMemoryError, match=rf"{words}.*Nothing was read"):
            score_all(engine, sweep(), make_rows([16] * 200))
    assert engine._weights.bytes_read == 0


def test_each_weight_is_read_once_and_no_weight_that_all_masks_remove(tmp_path):
    engine = StreamingEngine(save(tmp_path), "float64", device="cpu", batch_tokens=20)
    rows, base = make_rows([16, 9, 16]), parse_mask("mha.1,mlp.1,mlp.2")
    sizes = {name: p.numel() * 8 for name, p in tiny_model().named_parameters()}
    score_all(engine, sweep(), rows)
    assert engine._weights.bytes_read == sum(sizes.values())
    score_all(engine, sweep(base), rows)
    gone = ("layers.1.", "layers.2.mlp.", "layers.2.post_attention_layernorm.")
    remaining = sum(size for name, size in sizes.items() if not any(part in name for part in gone))
    assert engine._weights.bytes_read == sum(sizes.values()) + remaining


def readers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


def test_a_file_that_is_cut_meanwhile_is_named(tmp_path):
    engine = StreamingEngine(save(tmp_path, shard="60KB"), "float64", device="cpu")
    places = json.loads((tmp_path / "model.safetensors.index.json").read_bytes())["weight_map"]
    file = tmp_path / places["model.layers.2.mlp.up_proj.weight"]
    os.truncate(file, 4000)
    with pytest.raises(
        InputError, match=rf"^{file} ends at byte 4000, before its last tensor does; fetch"
    ):
        score_all(engine, sweep(), make_rows([16]))
    assert not readers()
    assert all(parameter.is_meta for parameter in engine.model.parameters())


@pytest.mark.parametrize("most", [3, 1, 0])
def test_batches_are_halved_where_memory_runs_out(tmp_path, monkeypatch, most):
    """What a pass has left is done in another one; not even one row is an error that names the
    fix."""
    engine, rows = (
        StreamingEngine(save(tmp_path), "float64", device="cpu", batch_tokens=64),
        make_rows([16] * 7),
    )
    expected = score_all(
        Engine(load_model(tmp_path, "float64", "cpu"), 16 * max(1, most)), sweep(), rows
    )
    block = engine.run_block

    def small(which, hidden, *rest):
        if len(hidden) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a lot")
        return block(which, hidden, *rest)

    monkeypatch.setattr(engine, "run_block", small)
    if most:
        assert score_all(engine, sweep(), rows) == pytest.approx(expected, abs=1e-12)
        assert engine.origin()["batch_tokens"] == 16 * (2 if most == 3 else 1)
    else:
        with pytest.raises(
            DeviceMemoryError, match=r"one row of 16 tokens.*CUDA out of memory"
        ) as raised:
            score_all(engine, sweep(), rows)
        assert "streaming" not in str(raised.value)
    assert all(parameter.is_meta for parameter in engine.model.parameters())


UP = "model.layers.2.mlp.up_proj.weight"
EDITS = {
    "missing": lambda tensors: tensors.pop(UP),
    "unexpected": lambda tensors: tensors.update({UP.replace("2", "9"): torch.zeros(2)}),
    "mismatched": lambda tensors: tensors.update({UP: tensors[UP][:-1].clone()}),
    "dtype": lambda tensors: tensors.update({UP: tensors[UP].to(torch.int8)}),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"missing keys: model\.layers\.2\.mlp\.up_proj\.weight"),
        ("unexpected", r"unexpected keys: model\.layers\.9\.mlp\.up_proj\.weight"),
        ("mismatched", r"mismatched keys: model\.layers\.2\.mlp\.up_proj\.weight"),
        ("dtype", r"streamed \(F64, F32, F16, BF16\): model\.layers\.2\.mlp\.up_proj\.weight"),
    ],
)
def test_weights_that_do_not_match(tmp_path, change, message):
    file = save(tmp_path) / "model.safetensors"
    tensors = load_file(file)
    EDITS[change](tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=message):
        StreamingEngine(tmp_path, "float64", device="cpu")


@pytest.mark.parametrize(
    ("family", "extra"),
    [
        (
            "gpt_neox",
            {
                f"gpt_neox.layers.{i}.attention.bias": torch.ones(1, 1, 4, 4).bool()
                for i in range(4)
            },
        ),
        ("llama", {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
    ],
    ids=["masks of Pythia", "old rotary buffers"],
)
def test_what_the_model_ignores_may_be_of_any_dtype(tmp_path, family, extra):
    file = save(tmp_path, family) / "model.safetensors"
    save_file(load_file(file) | extra, file, metadata={"format": "pt"})
    streamed, in_memory = both(tmp_path, sweep(), make_rows([9]))
    assert streamed == in_memory


def test_tensors_that_are_not_aligned_to_their_items(tmp_path):
    """Old writers did not pad the header, so that the data begins anywhere."""
    file = save(tmp_path) / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip(b" ")
    header += b" " * ((3 - len(header)) % 8)
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    assert (8 + len(header)) % 8 == 3
    streamed, in_memory = both(tmp_path, sweep(), make_rows([9]))
    assert streamed == pytest.approx(in_memory, abs=1e-12)


def test_a_missing_shard_or_no_weights_are_named(tmp_path):
    save(tmp_path, shard="60KB")
    sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    with pytest.raises(InputError, match=r"model-00002-of-.*fetch"):
        StreamingEngine(tmp_path, "float64", device="cpu")
    for file in tmp_path.glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(
        InputError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"
    ):
        StreamingEngine(tmp_path, "float64", device="cpu")


@pytest.mark.parametrize("family", GRID)
def test_buffers_are_those_of_a_loaded_model(tmp_path, family):
    engine = StreamingEngine(save(tmp_path, family, dtype=torch.float32), "bfloat16", device="cpu")
    loaded = dict(load_model(tmp_path, "bfloat16", "cpu").named_buffers())
    buffers = dict(engine.model.named_buffers())
    assert buffers.keys() == loaded.keys()
    assert buffers or family == "baichuan"
    for name, buffer in buffers.items():
        assert buffer.dtype == loaded[name].dtype
        assert torch.equal(buffer, loaded[name])


def test_memory_is_what_the_tightest_cgroup_leaves(tmp_path, monkeypatch):
    """A limit less what is used and cannot be reclaimed: pages of files can, but for mapped
    ones."""
    own = re.findall(r"^0::/(.*)$", Path("/proc/self/cgroup").read_text(), re.MULTILINE)
    if not own:
        pytest.skip("this process is in no group of cgroups v2")
    group = tmp_path / own[0]
    group.mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    (group / "memory.max").write_text("max\n")
    unlimited = memory.available_memory()
    (group / "memory.max").write_text("1000\n")
    (group / "memory.current").write_text("900\n")
    (group / "memory.stat").write_text(
        "anon 7\nactive_file 100\ninactive_file 200\nfile_mapped 50\n"
    )
    assert memory.available_memory() == 1000 - 900 + 250 < unlimited
    (group / "memory.current").write_text("1500\n")
    assert memory.available_memory() == 0
