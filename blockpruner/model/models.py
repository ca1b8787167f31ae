"""Models in memory: load one, mask blocks for a while, or remove them for good.

Decides how a removed block is expressed in a live transformers model. The code that removes it
ships in checkpoints (`modeling_blockpruned.py`), which makes a masked, a pruned and a loaded model
the same thing.
"""

import copy
from collections import defaultdict
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

Module = TypeVar("Module", bound=nn.Module)

LOADING_PROBLEMS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
"""The fields of transformers' loading report that are empty when weights and config match."""


@contextmanager
def without_bars() -> Iterator[None]:
    """Hide transformers' own progress bars inside the `with`; those of downloads are elsewhere."""
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()


def resolve_device(device: str) -> torch.device:
    """The device of `runtime.device`: "auto" is the first GPU, or the CPU; "split" begins at the
    first GPU."""
    gpus = accelerator.devices()
    if device == "auto":
        return gpus[0] if gpus else torch.device("cpu")
    if device == "split":
        if not gpus:
            raise InputError(
                "runtime.device 'split' needs CUDA devices, and there is none here; use auto"
            )
        return gpus[0]
    try:
        resolved = torch.device(device)
    except RuntimeError:
        resolved = torch.device("meta")
    if resolved.type == "cpu":
        return resolved
    if resolved.type not in ("cuda", accelerator.kind()):
        message = f"runtime.device {device!r} is unknown; valid: auto, cpu, cuda, cuda:<n>, split"
        raise InputError(message, rule="unknown-device", key="runtime.device", value=device)
    resolved = torch.device(resolved.type, resolved.index or 0)
    if resolved not in gpus:
        message = f"runtime.device {device!r} is not here: {len(gpus)} CUDA devices; use auto"
        raise InputError(message, rule="absent-device", key="runtime.device", value=device)
    return resolved


def require_plain(model: nn.Module) -> None:
    """Refuse a model that cannot be changed in place: with adapters, quantized, offloaded; raises
    InputError."""
    has_adapters = any(type(module).__module__.startswith("peft.") for module in model.modules())
    if has_adapters or not isinstance(model, PreTrainedModel):
        raise InputError(
            f"a {type(model).__name__} is wrapped or has adapters, and pruning needs the plain"
            " transformers model; merge adapters first: PeftModel.from_pretrained(model,"
            " adapters).merge_and_unload()",
            rule="adapted-model",
            key="model",
        )
    require_supported(model.config.to_dict())
    require_float64(model)
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if len({linear.weight.dtype for linear in linears}) > 1:
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
    """Put a model into evaluation mode inside the `with`; on exit each module has its old mode."""
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
    """The device and the attention kernel of a model, for `provenance.environment`."""
    return {
        "device": model.device.type,
        "device_name": accelerator.name(model.device),
        "attention": model.config._attn_implementation or "eager",
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
    shared_with: PreTrainedModel | None = None,
) -> PreTrainedModel:
    """Load a checkpoint directory for inference.

    Weights go to their device as they are read. A tensor that is equal to one of the model
    `shared_with`, on the same device, is shared with it; a split model shares none.

    Raises:
        InputError: the weights are damaged or do not match the config, or the attention is not
            installed.
        DeviceMemoryError: the model does not fit.
    """
    target = resolve_device(device)
    options = kernel_options(attention, dtype, target)
    shares = shared_with is not None and device != "split"
    device_map: dict[str, torch.device] | None = None
    if device == "split":
        device_map = _balanced_device_map(directory, dtype, trust_remote_code)
    elif not shares and target.type != "cpu":
        device_map = {"": target}
    # The memory of weights goes back to the system with the model; that of activations is reused.
    keep_freed_memory(False)
    with _explained_errors(directory, device):
        with usable(attention), without_bars():
            model, report = AutoModelForCausalLM.from_pretrained(
                directory,
                config=read_config(directory, trust_remote_code),
                dtype=getattr(torch, dtype),
                device_map=device_map,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            )
        if shares:
            _share_(model, shared_with)
        if device_map is None:
            model.to(target)
    _require_match(directory, report)
    keep_freed_memory(target.type == "cpu")
    loaded: PreTrainedModel = model.eval().requires_grad_(False)
    return loaded


@contextmanager
def _explained_errors(directory: Path, device: str) -> Iterator[None]:
    """Turn transformers' errors of loading a checkpoint into InputErrors."""
    try:
        yield
    except InputError:
        raise
    except SafetensorError as error:
        raise InputError(
            f"weights in {directory} are truncated or damaged ({error}); fetch the checkpoint again"
        ) from error
    except RuntimeError as error:
        if accelerator.is_out_of_memory(error):
            raise _too_large(directory, device) from error
        # transformers merges the experts of a mixture: it fails where shapes do not add up.
        if "conversion" not in str(error):
            raise
        raise _mismatch(directory, "experts that are missing or of other shapes") from error
    except Exception as error:
        # A wrong config.json, or an adapter's next to it, raises anything.
        raise InputError(
            f"the model in {directory} cannot be loaded ({error!r}); fetch the checkpoint again, or"
            " repair its config"
        ) from error


def _require_match(directory: Path, report: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose weights are not those of its config."""
    problems = []
    for problem in LOADING_PROBLEMS:
        keys = sorted(map(str, report.get(problem) or ()))
        if keys:
            problems.append(f"{problem.replace('_', ' ')}: {', '.join(keys[:5])}")
    if problems:
        raise _mismatch(directory, "; ".join(problems))


def _mismatch(directory: Path, reason: str) -> InputError:
    return InputError(
        f"the weights in {directory} do not match its config.json ({reason}); fetch the checkpoint"
        " again, or repair its config"
    )


def _share_(model: PreTrainedModel, other: PreTrainedModel) -> None:
    """Replace each parameter by an equal one of another model, or move it to that model's
    device."""
    candidates: dict[tuple[Any, ...], list[nn.Parameter]] = defaultdict(list)
    for weight in other.parameters():
        candidates[_sharing_key(weight)].append(weight)
    replacements = {}
    for parameter in list(model.parameters()):
        moved = parameter.to(other.device)
        replacements[parameter] = nn.Parameter(moved, requires_grad=False)
        for weight in candidates[_sharing_key(parameter)]:
            if torch.equal(weight, moved):
                replacements[parameter] = weight
                break
    replace_parameters_(model, replacements)


def _sharing_key(weight: Tensor) -> tuple[Any, ...]:
    """A cheap key, the same for equal weights: only weights of one key are compared in full."""
    return weight.shape, weight.dtype, *weight.flatten()[:16].tolist()


def replace_parameters_(
    model: nn.Module, replacements: Mapping[nn.Parameter, nn.Parameter]
) -> None:
    """Replace parameters in all modules of a model; another model may use the old ones, too."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = replacements.get(parameter, parameter)


def move_buffers_(model: PreTrainedModel, device: torch.device) -> None:
    """Move a model's buffers to a device; its parameters stay on theirs."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer.to(device)


def kernel_options(attention: str, dtype: str, device: torch.device) -> dict[str, str]:
    """Keyword arguments of transformers for the kernels of attention and experts.

    Raises InputError if flash attention has no kernel for this dtype or device.
    """
    has_flash_kernel = device.type == "cuda" and dtype in ("bfloat16", "float16")
    if attention.startswith("flash") and not has_flash_kernel:
        raise InputError(
            f"runtime.attention {attention} has no kernel for {dtype} on {device.type}: it needs a"
            " CUDA device and model.dtype bfloat16 or float16; use auto or sdpa"
        )
    options = {}
    if attention != "auto":
        options["attn_implementation"] = attention
    if dtype == "float64":
        # The grouped product of experts, which is the default, has no float64.
        options["experts_implementation"] = "eager"
    return options


@contextmanager
def usable(attention: str) -> Iterator[None]:
    """Refuse an attention that is not installed, or that the model made inside the `with` does not
    have; raises InputError."""
    try:
        yield
    except (ImportError, ValueError) as error:
        if attention == "auto":
            raise
        reason = str(error).partition(". ")[0]
        raise InputError(
            f"runtime.attention {attention!r} cannot be used here: {reason}; use auto"
        ) from error


def _balanced_device_map(
    directory: Path, dtype: str, trust_remote_code: bool
) -> dict[str, torch.device]:
    """The device of each module if all devices share a model; a tenth of each stays free."""
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    config = read_config(directory, trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code
        )
    devices = accelerator.devices()
    limits = {
        index: accelerator.free_memory(device) * 9 // 10 for index, device in enumerate(devices)
    }
    unsplit = model._no_split_modules
    balanced_limits = get_balanced_memory(model, limits, unsplit)
    index_by_module = infer_auto_device_map(model, balanced_limits, unsplit)
    # What does not fit would go to the host or to the disk, and be slow.
    if not set(index_by_module.values()) <= limits.keys():
        raise _too_large(directory, "split")
    return {name: devices[index] for name, index in index_by_module.items()}


def _too_large(directory: Path, device: str) -> DeviceMemoryError:
    return DeviceMemoryError(
        f"the model in {directory} does not fit into the memory of runtime.device {device!r}; use a"
        " larger device, device: split over several, or, for scoring, runtime.streaming: true"
    )


def room_beside(model: PreTrainedModel, device: torch.device) -> int:
    """Bytes: nine tenths of a device's memory, less the model's weights on it."""
    weights: int = sum(weight.nbytes for weight in model.parameters() if weight.device == device)
    return accelerator.total_memory(device) * 9 // 10 - weights


def shared_copy(module: Module) -> Module:
    """A model, or a module of one, with modules and config of its own over the same tensors: it can
    be pruned without a change to the original."""
    tensors = chain(module.parameters(), module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


def model_family(model: PreTrainedModel) -> Family:
    """The family of a model, dense, block-pruned or sliced."""
    return FAMILIES[model.config.model_type.removesuffix("_blockpruned").removesuffix("_slicegpt")]


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder's layers, as the list in the model."""
    layers: nn.ModuleList = attrgetter(model_family(model).layers)(model)
    return layers


def head_of(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """The function from a decoder's last states [..., H] to logits [..., V], scaled and capped as
    in the family.

    Logits of 16-bit states without gradient are float32 on CUDA: the product adds up in float32,
    and is not rounded.
    """
    head = model.get_output_embeddings()
    family = model_family(model)
    cap: float | None = getattr(model.config, family.logit_cap) if family.logit_cap else None
    scale = 1.0
    if family.logit_scale is not None:
        field, power = family.logit_scale
        scale = float(getattr(model.config, field)) ** power

    def logits_of(states: Tensor) -> Tensor:
        if widens(head) and not states.requires_grad:
            flat = states.flatten(0, -2)
            product = torch.mm(flat, head.weight.T, out_dtype=torch.float32)
            logits = product.view(*states.shape[:-1], -1)
        else:
            logits = head(states)
        if scale != 1:
            logits = logits * scale
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        return logits

    return logits_of


def widens(head: nn.Linear) -> bool:
    """Whether a head's product of 16-bit numbers can give float32: torch has it on CUDA, from 2.8
    on, and not on ROCm."""
    if head.weight.device.type != "cuda" or torch.version.hip is not None:
        return False
    if head.weight.dtype.itemsize != 2 or head.bias is not None:
        return False
    return "dtype" in torch.ops.aten.mm.overloads()


@contextmanager
def restored(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Let layers, modules, parameters and config be replaced inside the `with`; on exit the model
    is as before, to the bit."""
    layers = decoder_layers(model)
    dense_layers = list(layers)
    saved_modules = []
    for layer in dense_layers:
        for module in layer.modules():
            saved_modules.append((module, dict(module._modules), dict(module._parameters)))
    mha = model_family(model).mha
    attentions = [getattr(layer, mha.names(layer)[0]) for layer in dense_layers]
    cache_indices = [attention.layer_idx for attention in attentions]
    config = model.config
    config_class = config.__class__
    config_fields = dict(config.__dict__)
    try:
        yield model
    finally:
        del layers[:]
        layers.extend(dense_layers)
        for module, children, parameters in saved_modules:
            # A removed norm is a plain function, which hides the module of the same name.
            for name in children.keys() & module.__dict__.keys():
                delattr(module, name)
            module._modules.clear()
            module._modules.update(children)
            module._parameters.update(parameters)
        for attention, cache_index in zip(attentions, cache_indices, strict=True):
            attention.layer_idx = cache_index
        config.__class__ = config_class
        config.__dict__.clear()
        config.__dict__.update(config_fields)


@contextmanager
def masked(model: PreTrainedModel, mask: Mask) -> Iterator[PreTrainedModel]:
    """The model without the blocks of `mask`, with every layer kept; restored on exit.

    Raises InputError for a block that the model does not have. Meanwhile the attentions that are
    left are renumbered and the config describes the holes, so cached decoding is right, too.
    """
    with restored(model):
        remove_(model, mask, range(len(decoder_layers(model))))
        yield model


def prune_(model: PreTrainedModel, mask: Mask) -> PreTrainedModel:
    """Remove the blocks of `mask` from the model in place, for good. Raises InputError for a block
    that the model does not have.

    Layers that lose both blocks are dropped. If the rest fills full layers (`blocks.pack_layers`),
    the model keeps its own class with fewer layers. Else model and config become the block-pruned
    classes of the family, which `save_pretrained` and `from_pretrained(...,
    trust_remote_code=True)` round-trip.
    """
    family = model_family(model)
    layers = decoder_layers(model)
    _check(mask, len(layers))
    full_layers = _full_layers(model, mask)
    if full_layers is not None:
        for mha, mlp in full_layers:
            for name in (family.mlp.module, *family.mlp.norms):
                setattr(layers[mha], name, getattr(layers[mlp], name))
        keep_layers_(model, full_layers)
        return model
    kept_layers = []
    for index in range(len(layers)):
        blocks = {BlockId(kind, index) for kind in BlockKind}
        if not blocks <= mask:
            kept_layers.append(index)
    remove_(model, mask, kept_layers)
    become_blockpruned_(model)
    return model


def become_blockpruned_(model: PreTrainedModel) -> None:
    """Give a model the block-pruned class of its family."""
    model.__class__ = model_class(model_family(model))
    # The weights of a loaded model may have had other names in the file (GPT-NeoX's head, experts),
    # which saving would restore; the new class reads its own names.
    model._weight_conversions = []


def _full_layers(model: PreTrainedModel, mask: Mask) -> list[tuple[int, int]] | None:
    """The layers without the blocks of `mask`, each by the layers of its MHA and its MLP. None if
    the family's own class cannot run them."""
    family = model_family(model)
    fields = model.config.to_dict()
    # A parallel layer's blocks read the same states, so blocks of two layers cannot share one.
    if family.is_parallel(fields):
        return None
    full_layers = []
    has_full_attention = False
    for mha, mlp in pack_layers(mask, len(decoder_layers(model))):
        if mha is None or mlp is None:
            return None
        full_layers.append((mha, mlp))
        has_full_attention = has_full_attention or not is_linear(fields, mha)
    # A hybrid's cache takes its length from a full attention.
    if family.mha.linear is not None and not has_full_attention:
        return None
    return full_layers


def keep_layers_(model: PreTrainedModel, layer_pairs: Sequence[tuple[int, int]]) -> None:
    """Keep some layers, number their attentions anew, and make the config describe them.

    A pair names the layer that an MHA comes from, which is the one that stays, and the layer of
    the MLP in it.
    """
    family = model_family(model)
    layers = decoder_layers(model)
    config = model.config
    blockpruned.drop_layers_(layers, [mha for mha, _ in layer_pairs])
    blockpruned.number_attentions_(layers, family.mha.module)
    for field, value in family.renumbered(config.to_dict(), layer_pairs).items():
        setattr(config, field, value)
    config.num_hidden_layers = len(layer_pairs)


def _check(mask: Mask, layer_count: int) -> None:
    beyond = frozenset(block for block in mask if block.layer >= layer_count)
    if beyond:
        raise InputError(
            f"mask removes {format_mask(beyond)}, but the model has layers 0 to {layer_count - 1}"
        )


def remove_(model: PreTrainedModel, mask: Mask, kept_layers: Sequence[int]) -> None:
    """Cut the holes, drop all layers but `kept_layers`, number the attentions, and enter all that
    into the config."""
    family = model_family(model)
    layers = decoder_layers(model)
    config = model.config
    _check(mask, len(layers))
    without_mha = {block.layer for block in mask if block.kind is BlockKind.MHA}
    without_mlp = {block.layer for block in mask if block.kind is BlockKind.MLP}
    blockpruned_class = model_class(family)
    branches = blockpruned_class.layer_branches
    blockpruned.remove_blocks_(layers, without_mha, without_mlp, branches)
    keep_layers_(model, [(index, index) for index in kept_layers])
    config.__class__ = blockpruned_class.config_class
    config.layers_without_mha = _positions(kept_layers, without_mha)
    config.layers_without_mlp = _positions(kept_layers, without_mlp)
    config.source_layers = list(kept_layers)


def _positions(kept_layers: Sequence[int], layers: set[int]) -> list[int]:
    """The positions of some layers among those that are kept."""
    return [position for position, layer in enumerate(kept_layers) if layer in layers]
