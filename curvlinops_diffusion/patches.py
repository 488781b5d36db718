"""A convolution's input as patches, which turn it into a linear layer with weight sharing."""

from torch import Tensor, nn
from torch.nn.functional import pad, unfold


def patches(module: nn.Conv2d, x: Tensor) -> Tensor:
    """The patches that a convolution multiplies with its weight.

    Args:
        module: The convolution, without groups. Any stride, dilation, padding and padding mode.
        x: Its input, shape ``[N, C, H, W]``.

    Returns:
        One patch for each output pixel, shape ``[N, S, C * K1 * K2]``; entries are ordered like
        ``module.weight.flatten(1)``.
    """
    # the module keeps its padding as (left, right, top, bottom), strings already resolved
    padding: list[int] = module._reversed_padding_repeated_twice
    if any(padding):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = pad(x, padding, mode=mode)
    columns = unfold(x, module.kernel_size, dilation=module.dilation, stride=module.stride)
    return columns.transpose(1, 2)
