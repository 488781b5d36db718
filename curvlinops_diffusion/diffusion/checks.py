"""Checks of images, conditions, predictions and of the network's mode."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from warnings import warn

import torch
from torch import Tensor, nn

from curvlinops_diffusion.diffusion.batch import has_rows
from curvlinops_diffusion.runtime.sharded_networks import is_divided, is_sharded


def check_images(x0: Any, indices: Sequence[int] | None = None) -> Tensor:
    """Return clean examples ``[batch, ...]`` of some indices if the diffusion can start there."""
    if not isinstance(x0, Tensor):
        raise ValueError(
            "Clean examples must be a floating-point tensor of shape [batch, ...], got "
            f"{type(x0).__name__}. (Of a data set of Hugging Face: with_format('torch').)"
        )
    if not x0.is_floating_point():
        raise ValueError(
            f"Clean examples must be floating-point numbers, got {x0.dtype}. Scale them as in "
            "training (images usually to [-1, 1])."
        )
    if x0.ndim < 2 or x0.numel() == 0:
        raise ValueError(
            "A batch of clean examples must not be empty, and of shape [batch, ...] (for images "
            f"[batch, channels, height, width]), got {tuple(x0.shape)}."
        )
    bad = ~x0.flatten(1).isfinite().all(1)
    if bad.any():
        places = bad.nonzero().flatten()[:8].tolist()
        named = places if indices is None else [indices[place] for place in places]
        raise ValueError(
            f"{int(bad.sum())} example(s) hold NaN or infinite entries, at index {named} of the "
            "data. Remove or repair them."
        )
    return x0


# So many entries, none of them negative, are no chance
_ENOUGH = 256


def warn_of_range(x0: Tensor) -> None:
    """Warn if a batch of images (of four axes) seems to be in [0, 1] or [0, 255]."""
    if x0.ndim != 4 or x0.numel() < _ENOUGH:
        return
    low, high = float(x0.min()), float(x0.max())
    if low >= 0 and high > 0:
        shown = "x / 127.5 - 1" if high > 1 else "2 * x - 1"
        warn(
            f"The first images have pixels from {low:g} to {high:g}, none below 0. Networks of "
            f"diffusion models are usually trained on [-1, 1]: if yours was, pass {shown}; if it "
            "was trained on these values, all is well.",
            stacklevel=2,
        )


def check_condition(condition: Any, batch_size: int, name: str = "condition") -> None:
    """Check that every tensor of a (nested) condition has one entry for each example."""
    if isinstance(condition, Mapping):
        for key, value in condition.items():
            check_condition(value, batch_size, f"{name}[{key!r}]")
        return
    if has_rows(condition) and len(condition) != batch_size:
        shape = tuple(condition.shape) if isinstance(condition, Tensor) else (len(condition),)
        raise ValueError(
            f"The first axis of {name} must have one entry for each of the {batch_size} clean "
            f"examples, got shape {shape}. (A tensor without axes is passed to the model as it is.)"
        )


def check_parameters(model: nn.Module) -> None:
    """Check that the parameters are there, whole, and can be differentiated."""
    wrapped = any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules())
    for name, p in model.named_parameters():
        if isinstance(p, nn.UninitializedParameter):
            raise ValueError(
                f"Parameter '{name}' has no shape yet, as those of lazy modules before their first "
                "call. Call the network once, or leave the module out."
            )
        if p.layout is not torch.strided:
            raise ValueError(
                f"Parameter '{name}' has the layout {p.layout}. Replace it by its to_dense()."
            )
        if any(stride == 0 and size > 1 for stride, size in zip(p.stride(), p.shape, strict=True)):
            raise ValueError(
                f"Entries of parameter '{name}' share one place in memory (it was expanded). Give "
                "it values of its own: p.data = p.data.clone()."
            )
        if p.is_meta:
            raise ValueError(
                f"Parameter '{name}' has no values here (it is on the device 'meta'): weights were "
                "not loaded, or are kept elsewhere by accelerate. Load the whole network onto one "
                "device."
            )
        of_one_axis = getattr(getattr(p, "device_mesh", None), "ndim", 0) == 1
        otherwise = is_divided(p) and not (of_one_axis and is_sharded(model))
        if wrapped or otherwise or type(p).__name__ == "FlatParameter":
            raise ValueError(
                f"Parameter '{name}' is divided among processes by something else than "
                "torch.distributed.fsdp.fully_shard over a mesh of one axis (FSDP1, tensor "
                "parallelism or a mesh of more). Use that, or pass the whole network to each "
                "process; PassOptions(distributed=True) divides the data."
            )
        if p.is_inference():
            raise ValueError(
                f"Parameter '{name}' was made under torch.inference_mode(), and cannot be "
                "differentiated. Load or make the network outside of it."
            )
    for name, buffer in model.named_buffers():
        if buffer.is_meta or buffer.is_inference():
            why = "has no values" if buffer.is_meta else "was made under torch.inference_mode()"
            raise ValueError(
                f"Buffer '{name}' {why}. Load or make the network outside of such a context, onto "
                "a device."
            )


def check_deterministic_mode(model: nn.Module) -> None:
    """Check that no layer draws random numbers or couples the examples of a batch."""
    for name, module in model.named_modules():
        dropout = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        drops_labels = getattr(module, "dropout_prob", 0) > 0  # diffusers' label embedding
        if module.training and (dropout or batch_norm or drops_labels):
            raise ValueError(
                f"Layer '{name}' ({type(module).__name__}) is in train mode, which makes the loss "
                "of an example random or dependent on the rest of its batch. Call model.eval() "
                "first."
            )
        if batch_norm and module.running_mean is None:
            raise ValueError(
                f"Layer '{name}' ({type(module).__name__}) has no running statistics, so that the "
                "loss of an example depends on the rest of its batch. Replace it, for instance by "
                "a GroupNorm."
            )


def check_surroundings(device: torch.device) -> None:
    """Check that no autocast rounds factors and scores, and that tensors have values."""
    if torch.is_autocast_enabled(device.type):
        raise ValueError(
            f"torch.autocast is on for '{device.type}', and would compute curvature in low "
            "precision. Leave its context, and pass autocast=torch.bfloat16 to DenoisingObjective "
            "to run the network alone in low precision."
        )
    _check_default_device()


def check_modes() -> None:
    """Check that tensors that are made now have values, and can be differentiated."""
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "torch.inference_mode() is on, in which nothing can be differentiated. Leave its "
            "context; torch.no_grad() is no obstacle."
        )
    _check_default_device()


def _check_default_device() -> None:
    if torch.empty(0).is_meta:
        raise ValueError(
            "torch's default device is 'meta', on which tensors have no values. Leave the context "
            "(of torch.device('meta'), or of accelerate's init_empty_weights), or call "
            "torch.set_default_device(None)."
        )


def check_prediction(prediction_BD: Tensor, names: Iterable[str], level_B: Tensor) -> None:
    """Check that the network's output on a batch is finite, before anything is made of it."""
    bad = (~prediction_BD.isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        known = list(names)
        named = ", ".join(f"{known[b]} at noise level {int(level_B[b])}" for b in bad[:4])
        raise ValueError(
            f"The network's output is NaN or infinite for {len(bad)} example(s) of a batch: "
            f"{named}. Check its weights; if it runs in float16 or bfloat16, try float32."
        )
