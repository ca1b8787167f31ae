"""Models in memory: load one, mask blocks for a while, or remove them for good.

Decides how a removed block is expressed in a live transformers model. The code that removes it
ships in checkpoints (`modeling_blockpruned.py`), which makes a masked, a pruned and a loaded model
the same thing.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from blockpruner.core.blocks import BlockId, BlockKind, Mask, format_mask, pack_layers
from blockpruner.core.errors import DeviceMemoryError, InputError
from blockpruner.core.families import FAMILIES, Family, is_linear, require_supported
from blockpruner.model import accelerator
from blockpruner.model import modeling_blockpruned as blockpruned
from blockpruner.model.allocator import keep_freed_memory
from blockpruner.model.classes import model_class, read_config

Part = TypeVar("Part", bound=nn.Module)


@contextmanager
def without_bars() -> Iterator[None]:
    """Within, transformers draws no bars of its own; those of downloads are elsewhere."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def resolve_device(device: str) -> torch.device:
    """The device of `runtime.device`: "auto" is the first one, or the CPU; "split" begins at the
    first one."""
    here = accelerator.devices()
    if device == "auto":
        return here[0] if here else torch.device("cpu")
    if device == "split":
        if not here:
            raise InputError(
                "runtime.device 'split' needs CUDA devices, and there is none here; use auto"
            )
        return here[0]
    try:
        found = torch.device(device)
    except RuntimeError:
        found = torch.device("meta")
    if found.type not in ("cpu", "cuda", accelerator.kind()):
        message = f"runtime.device {device!r} is unknown; valid: auto, cpu, cuda, cuda:<n>, split"
        raise InputError(message, rule="unknown-device", key="runtime.device", value=device)
    if found.type == "cpu":
        return found
    found = torch.device(found.type, found.index or 0)
    if found not in here:
        message = f"runtime.device {device!r} is not here: {len(here)} CUDA devices; use auto"
        raise InputError(message, rule="absent-device", key="runtime.device", value=device)
    return found


def require_plain(model: nn.Module) -> None:
    """Refuse a model that cannot be changed in place: with adapters, quantized, offloaded; raises
    InputError."""
    adapted = any(type(module).__module__.startswith("peft.") for module in model.modules())
    if adapted or not isinstance(model, PreTrainedModel):
        raise InputError(
            f"a {type(model).__name__} is wrapped or has adapters, and pruning needs the plain"
            " transformers model; merge adapters first: PeftModel.from_pretrained(model,"
            " adapters).merge_and_unload()",
            rule="adapted-model",
            key="model",
        )
    require_supported(model.config.to_dict())
    require_float64(model)
    if (
        len({module.weight.dtype for module in model.modules() if isinstance(module, nn.Linear)})
        > 1
    ):
        message = (
            "the model's layers are of several dtypes; convert it first, as in"
            " model.to(torch.bfloat16)"
        )
        raise InputError(message, rule="several-dtypes", key="model")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise InputError(
            "some of the model's weights are offloaded, and pruning needs all in memory; load it"
            " without device_map, or use `blockpruner prune --streaming`, which scores one layer at"
            " a time",
            rule="offloaded-model",
            key="model",
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within, a model is in evaluation mode; at the end each module is in its own again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def require_float64(model: PreTrainedModel) -> None:
    """Refuse a device without float64, in which losses are added; raises InputError."""
    if model.device.type == "mps":
        raise InputError(
            'MPS has no float64; move the model first: model.to("cpu")',
            rule="mps-model",
            key="device",
        )


def placement(model: PreTrainedModel) -> dict[str, str]:
    """Where a model computes and by which attention kernel, for `provenance.environment`."""
    kernel = model.config._attn_implementation or "eager"
    return {
        "device": model.device.type,
        "device_name": accelerator.name(model.device),
        "attention": kernel,
    }


def set_threads(threads: int | str) -> None:
    """Set torch's intra-op threads; "auto" leaves torch's own choice."""
    if threads != "auto":
        torch.set_num_threads(int(threads))


def load_model(
    directory: Path,
    dtype: str,
    device: str = "auto",
    trust_remote_code: bool = False,
    attention: str = "auto",
    beside: PreTrainedModel | None = None,
) -> PreTrainedModel:
    """Load a checkpoint directory for inference. Raises InputError for weights that are damaged or
    do not match the config, or an attention that is not installed; and DeviceMemoryError where the
    model does not fit.

    Weights go to their device as they are read. Where a tensor is equal to one of a model on the
    same device, `beside` it, that one is taken; a split shares none.
    """
    place = resolve_device(device)
    keep_freed_memory(False)
    options = kernel_options(attention, dtype, place)
    reading = {
        "local_files_only": True,
        "use_safetensors": True,
        "trust_remote_code": trust_remote_code,
    }
    reading |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    mismatch = f"the weights in {directory} do not match its config.json "
    repair = "fetch the checkpoint again, or repair its config"
    places: dict[str, torch.device] | None = None
    if device == "split":
        places = _spread(directory, dtype, trust_remote_code)
    elif beside is None and place.type != "cpu":
        places = {"": place}
    try:
        with usable(attention), without_bars():
            config = read_config(directory, trust_remote_code)
            model, report = AutoModelForCausalLM.from_pretrained(
                directory,
                config=config,
                dtype=getattr(torch, dtype),
                device_map=places,
                **reading,
                **options,
            )
        if beside is not None and device != "split":
            _share_(model, beside)
        result: PreTrainedModel = model if places else model.to(place)
    except SafetensorError as error:
        raise InputError(
            f"weights in {directory} are truncated or damaged ({error}); fetch the checkpoint again"
        ) from error
    except RuntimeError as error:
        if accelerator.is_out_of_memory(error):
            raise _too_large(directory, device) from error
        if "conversion" not in str(error):  # parts of a weight that do not add up to it
            raise
        raise InputError(
            f"{mismatch}(experts that are missing or of other shapes); {repair}"
        ) from error
    except InputError:
        raise
    except (
        Exception
    ) as error:  # transformers takes config.json, and an adapter's beside it, for its own
        raise InputError(
            f"the model in {directory} cannot be loaded ({error!r}); {repair}"
        ) from error
    problems = [
        f"{name.replace('_', ' ')}: {', '.join(sorted(str(key) for key in report[name])[:5])}"
        for name in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
        if report.get(name)
    ]
    if problems:
        raise InputError(f"{mismatch}({'; '.join(problems)}); {repair}")
    keep_freed_memory(place.type == "cpu")
    return result.eval().requires_grad_(False)


def _share_(model: PreTrainedModel, other: PreTrainedModel) -> None:
    """Replace each parameter of a model by an equal one of another model, or else by one on the
    device of that."""
    known: dict[tuple[Any, ...], list[nn.Parameter]] = {}
    for weight in other.parameters():
        known.setdefault(_beginning(weight), []).append(weight)
    new = {}
    for own in list(model.parameters()):
        moved = own.to(other.device)
        equal = (weight for weight in known.get(_beginning(own), ()) if torch.equal(weight, moved))
        new[own] = next(equal, nn.Parameter(moved, requires_grad=False))
    replace_parameters_(model, new)


def _beginning(weight: Tensor) -> tuple[Any, ...]:
    """What is alike in equal weights, and in few others."""
    return weight.shape, weight.dtype, *weight.flatten()[:16].tolist()


def replace_parameters_(model: nn.Module, new: Mapping[nn.Parameter, nn.Parameter]) -> None:
    """Replace parameters of a model wherever they stand in it; the old ones may belong to another
    model, too."""
    for module in model.modules():
        for name, old in module._parameters.items():
            module._parameters[name] = None if old is None else new.get(old, old)


def move_buffers_(model: PreTrainedModel, device: torch.device) -> None:
    """Move a model's buffers to a device; its parameters stay where they are."""
    for module in model.modules():
        module._buffers.update(
            {name: buffer.to(device) for name, buffer in module._buffers.items()}
        )


def kernel_options(attention: str, dtype: str, device: torch.device) -> dict[str, str]:
    """Keyword arguments for transformers' implementation of attention and, in float64, of experts:
    the usual one knows no float64. Raises InputError if flash attention has no kernel for this
    dtype or device."""
    if attention.startswith("flash") and (
        device.type != "cuda" or dtype not in ("bfloat16", "float16")
    ):
        raise InputError(
            f"runtime.attention {attention} has no kernel for {dtype} on {device.type}: it needs a"
            " CUDA device and model.dtype bfloat16 or float16; use auto or sdpa"
        )
    options = {} if attention == "auto" else {"attn_implementation": attention}
    return options | ({"experts_implementation": "eager"} if dtype == "float64" else {})


@contextmanager
def usable(attention: str) -> Iterator[None]:
    """Within, a model is made; raises InputError if this attention is not installed, or the model
    does not have it."""
    try:
        yield
    except (ImportError, ValueError) as error:
        if attention == "auto":
            raise
        reason = str(error).partition(". ")[0]
        raise InputError(
            f"runtime.attention {attention!r} cannot be used here: {reason}; use auto"
        ) from error


def _spread(directory: Path, dtype: str, trust_remote_code: bool) -> dict[str, torch.device]:
    """Which device each part of a model goes to, if all devices share it; a tenth of each stays
    free."""
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    config = read_config(directory, trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code
        )
    devices, whole = accelerator.devices(), model._no_split_modules
    room = {
        number: accelerator.free_memory(device) * 9 // 10 for number, device in enumerate(devices)
    }
    numbers = infer_auto_device_map(model, get_balanced_memory(model, room, whole), whole)
    if not set(numbers.values()) <= room.keys():  # the rest would go to the disk
        raise _too_large(directory, "split")
    return {name: devices[number] for name, number in numbers.items()}


def _too_large(directory: Path, device: str) -> DeviceMemoryError:
    return DeviceMemoryError(
        f"the model in {directory} does not fit into the memory of runtime.device {device!r}; use a"
        " larger device, device: split over several, or, for scoring, runtime.streaming: true"
    )


def room_beside(model: PreTrainedModel, device: torch.device) -> int:
    """Bytes: nine tenths of a device's memory, less the model's weights there."""
    weights: int = sum(weight.nbytes for weight in model.parameters() if weight.device == device)
    return accelerator.total_memory(device) * 9 // 10 - weights


def shared_copy(model: Part) -> Part:
    """A model, or a part of one, with its own modules and config over the same tensors; it can be
    pruned while the first stays whole."""
    return copy.deepcopy(
        model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    )


def model_family(model: PreTrainedModel) -> Family:
    """The family of a model, dense, block-pruned or sliced."""
    return FAMILIES[model.config.model_type.removesuffix("_blockpruned").removesuffix("_slicegpt")]


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    layers: nn.ModuleList = attrgetter(model_family(model).layers)(model)
    return layers


def head_of(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """The function from a decoder's last states [..., H] to logits [..., V], scaled and capped as
    in the family. Of 16-bit states that want no gradient they are float32 on CUDA: the product adds
    up in float32, and is not rounded."""
    head, family = model.get_output_embeddings(), model_family(model)
    cap: float | None = getattr(model.config, family.logit_cap) if family.logit_cap else None
    scale: float = 1.0
    if family.logit_scale is not None:
        field, power = family.logit_scale
        scale = float(getattr(model.config, field)) ** power

    def logits(states: Tensor) -> Tensor:
        if widens(head) and not states.requires_grad:
            wide = torch.mm(states.flatten(0, -2), head.weight.T, out_dtype=torch.float32)
            found = wide.view(*states.shape[:-1], -1)
        else:
            found = head(states)
        found = found if scale == 1 else found * scale
        return found if cap is None else cap * torch.tanh(found / cap)

    return logits


def widens(head: nn.Linear) -> bool:
    """Whether there is a product of this kind: torch has it on CUDA, from 2.8 on, and not on
    ROCm."""
    kinds: list[str] = torch.ops.aten.mm.overloads()  # type: ignore[no-untyped-call]
    is_narrow, is_cuda = head.weight.dtype.itemsize == 2, head.weight.device.type == "cuda"
    return (
        is_cuda
        and torch.version.hip is None
        and is_narrow
        and head.bias is None
        and "dtype" in kinds
    )


@contextmanager
def restored(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Within, layers, modules, parameters and config may be replaced; on exit the model is as
    before, to the bit."""
    layers, config = decoder_layers(model), model.config
    dense = list(layers)
    modules = [
        (part, dict(part._modules), dict(part._parameters))
        for layer in dense
        for part in layer.modules()
    ]
    attentions = [getattr(layer, model_family(model).mha.names(layer)[0]) for layer in dense]
    numbers = [attention.layer_idx for attention in attentions]
    config_class, fields = config.__class__, dict(config.__dict__)
    try:
        yield model
    finally:
        del layers[:]
        layers.extend(dense)
        for part, children, parameters in modules:
            for name in children.keys() & part.__dict__.keys():  # in place of a norm
                delattr(part, name)
            part._modules.clear()
            part._modules.update(children)
            part._parameters.update(parameters)
        for attention, number in zip(attentions, numbers, strict=True):
            attention.layer_idx = number
        config.__class__ = config_class
        config.__dict__.clear()
        config.__dict__.update(fields)


@contextmanager
def masked(model: PreTrainedModel, mask: Mask) -> Iterator[PreTrainedModel]:
    """The model without the blocks of `mask`, with every layer kept; restored on exit. Raises
    InputError for a block that the model does not have. Meanwhile remaining attentions are
    renumbered and the config describes the holes: cached decoding is right, too."""
    with restored(model):
        remove_(model, mask, range(len(decoder_layers(model))))
        yield model


def prune_(model: PreTrainedModel, mask: Mask) -> PreTrainedModel:
    """Remove the blocks of `mask` from the model in place, for good. Raises InputError for a block
    that it has not.

    Layers that lose both blocks are dropped, and remaining attentions renumbered 0..n-1 (else
    cached decoding is silently wrong). If the rest fills whole layers (`blocks.pack_layers`), the
    model keeps its own class with fewer layers. Else model and config become the block-pruned
    classes of the family, which `save_pretrained` and `from_pretrained(...,
    trust_remote_code=True)` round-trip.
    """
    family, layers = model_family(model), decoder_layers(model)
    _check(mask, len(layers))
    packed = pack_layers(mask, len(layers))
    whole = [(mha, mlp) for mha, mlp in packed if mha is not None and mlp is not None]
    fields = model.config.to_dict()
    # by these a cache counts
    counts = any(mha is not None and not is_linear(fields, mha) for mha, _ in packed)
    if (
        len(whole) == len(packed)
        and not family.is_parallel(fields)
        and (counts or family.mha.linear is None)
    ):
        for mha, mlp in whole:
            for name in (family.mlp.module, *family.mlp.norms):
                setattr(layers[mha], name, getattr(layers[mlp], name))
        keep_layers_(model, whole)
        return model
    kept = [
        n for n in range(len(layers)) if not mask.issuperset(BlockId(kind, n) for kind in BlockKind)
    ]
    remove_(model, mask, kept)
    model.__class__ = model_class(family)
    # weights of a loaded model may have had other names (GPT-NeoX's head, experts); the new class
    # reads its own
    model._weight_conversions = []
    return model


def keep_layers_(model: PreTrainedModel, kept: Sequence[tuple[int, int]]) -> None:
    """Keep these layers alone, their attentions numbered anew, and make the config describe them;
    each has the MHA of one layer, whose place it has, and the MLP of another."""
    family, layers, config = model_family(model), decoder_layers(model), model.config
    blockpruned.drop_layers_(layers, [mha for mha, _ in kept])
    blockpruned.number_attentions_(layers, family.mha.module)
    for field, value in family.renumbered(config.to_dict(), kept).items():
        setattr(config, field, value)
    config.num_hidden_layers = len(kept)


def _check(mask: Mask, layers: int) -> None:
    beyond = frozenset(block for block in mask if block.layer >= layers)
    if beyond:
        raise InputError(
            f"mask removes {format_mask(beyond)}, but the model has layers 0 to {layers - 1}"
        )


def remove_(model: PreTrainedModel, mask: Mask, kept: Sequence[int]) -> None:
    """Cut the holes, keep the layers `kept`, number the attentions, and enter all that into the
    config."""
    family, layers, config = model_family(model), decoder_layers(model), model.config
    _check(mask, len(layers))
    mha, mlp = ({block.layer for block in mask if block.kind is kind} for kind in BlockKind)
    branches = ((family.mha.module, *family.mha.norms), (family.mlp.module, *family.mlp.norms))
    blockpruned.remove_blocks_(layers, mha, mlp, branches)
    keep_layers_(model, [(layer, layer) for layer in kept])
    config.__class__ = model_class(family).config_class
    config.layers_without_mha = [n for n, layer in enumerate(kept) if layer in mha]
    config.layers_without_mlp = [n for n, layer in enumerate(kept) if layer in mlp]
    config.source_layers = list(kept)
