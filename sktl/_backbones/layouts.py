"""Axes of activations with four axes: (n, c, h, w) or (n, h, w, c).

torch has no mark for the channel axis. But rows and columns grow with the image, and
channels do not.
"""

from torch import nn

LAYOUTS = ("NCHW", "NHWC")
# Modules that define their layout; subclasses may change it, as LayerNorm2d does.
_CHANNELS_FIRST = {
    *(nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.InstanceNorm2d, nn.GroupNorm),
    *(nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.AvgPool2d, nn.MaxPool2d),
}
_CHANNELS_LAST = {nn.Linear, nn.LayerNorm}


def is_channels_last(
    module: nn.Module, shape: tuple[int, ...], larger: tuple[int, ...] | None
) -> bool | None:
    """Return whether the output of a module is ``(n, h, w, c)``.

    Parameters
    ----------
    module : Module
        The module.
    shape : tuple of int
        Shape of its output, of four axes.
    larger : tuple of int or None
        Shape of its output for larger images, or None if it is not known.

    Returns
    -------
    bool or None
        None if it cannot be determined.
    """
    if larger is not None and len(larger) == 4:
        grown = [axis for axis in (1, 2, 3) if larger[axis] != shape[axis]]
        if grown in ([1, 2], [2, 3]):
            return grown == [1, 2]
    while type(module) is nn.Sequential and len(module):
        module = module[-1]
    if type(module) in _CHANNELS_FIRST:
        return False
    if type(module) is nn.LayerNorm and len(module.normalized_shape) > 1:
        return None  # it normalizes several axes, which may be (c, h, w)
    if type(module) in _CHANNELS_LAST:
        return True
    # One position is left.
    single = [axis for axis in (1, 2, 3) if shape[axis] == 1]
    return single == [1, 2] if single in ([1, 2], [2, 3]) else None
