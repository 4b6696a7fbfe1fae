"""The network in training: a frozen prefix, trainable stages, and a new head.

Depth is counted in stages, so that ``trainable=2`` means the same in every
architecture. Frozen stages are in evaluation mode and no gradient is computed for them:
neither their parameters nor their BatchNorm statistics change.
"""

import copy
import difflib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Self, cast

import torch
from torch import Tensor, nn

from sktl._backbones.new_head import WHOLE_NETWORK
from sktl._images.preprocessing import Normalization, Preprocessing
from sktl._utils.tensor_file import state_dict_digest

_SOFTNESS = 0.3  # factor of the coefficients
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def network_digest(network: nn.Sequential) -> str:
    """Return the sha256 of the weights and of the printed form of a network."""
    # The weights do not distinguish a stride of 1 from a stride of 2.
    content = state_dict_digest(network.state_dict())
    return hashlib.sha256(f"{network} {content}".encode()).hexdigest()


def soften_head(head: nn.Module) -> None:
    """Make the predictions of a linear probe less certain, in place.

    A probe that fits its few images perfectly has a loss of almost 0, and almost no
    gradient reaches the stages below it. Smaller coefficients of its last layer change
    no prediction and give a larger loss.

    Parameters
    ----------
    head : nn.Module
        Head of a network from `replace_head`.
    """
    last = [module for module in head.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        for parameter in last.parameters():
            parameter.mul_(_SOFTNESS)


def interpolate_weights(
    initial: Mapping[str, Tensor], last: Mapping[str, Tensor], alpha: float
) -> dict[str, Tensor]:
    """Interpolate between two state dicts (Wortsman et al., 2022).

    Parameters
    ----------
    initial, last : mapping of str to Tensor
        State dicts before and after a training, on any devices.
    alpha : float
        Interpolation coefficient: 0 gives `initial`, 1 gives `last`.

    Returns
    -------
    dict of str to Tensor
        Numbers that are not floating-point, such as counts of batches, from `last`.
    """
    return {
        name: initial[name].to(value.device).lerp(value, alpha)
        if value.is_floating_point()
        else value
        for name, value in last.items()
    }


def output_shape(
    network: nn.Sequential, image_size: int, n_channels: int = 3
) -> tuple[int, ...]:
    """Return the shape of the output of a network for one image, without the batch.

    Parameters
    ----------
    network : nn.Sequential
        Network, or a prefix of one, in any mode; it is not changed.
    image_size : int
        Side of the image in pixels.
    n_channels : int, default=3
        Number of channels of the image.

    Returns
    -------
    tuple of int
        Such as ``(512, 7, 7)``.
    """
    shape = (1, n_channels, image_size, image_size)
    image = torch.zeros(shape, dtype=torch.float32)
    first = next(network.parameters(), None)  # None: such as pooling alone
    image = image if first is None else image.to(first)
    # A copy, since the network may be in training mode.
    evaluated = copy.deepcopy(network).eval()
    with torch.no_grad():
        return tuple(evaluated(image).shape[1:])


def count_trainable_stages(
    trainable: str | int, stages: Sequence[str], backbone: str
) -> int:
    """Return the number of stages, counted from the head, that are trained.

    Parameters
    ----------
    trainable : {"head", "all"}, int or str
        The parameter of the estimator.
    stages : sequence of str
        Names of the stages, in order.
    backbone : str
        Name of the backbone, for the error message.

    Returns
    -------
    int
        From 0 to the number of stages.

    Raises
    ------
    ValueError
        If there is no such stage, or if there are fewer stages.
    """
    advice = f"describe_backbone({backbone!r}) shows the stages."
    if trainable == "head":
        return 0
    if trainable == "all":
        return len(stages)
    if list(stages) == [WHOLE_NETWORK] and trainable != 0:
        raise ValueError(
            f"The backbone {backbone!r} has no stages, so the 'trainable' parameter "
            f"must be 'head' or 'all'. Got {trainable!r} instead. "
            f"describe_backbone({backbone!r}) says why."
        )
    if isinstance(trainable, str):
        if trainable not in stages:
            close = difflib.get_close_matches(trainable, ["head", "all", *stages], n=1)
            raise ValueError(
                "The 'trainable' parameter must be 'head', 'all', a number of stages, "
                f"or one of the stages {', '.join(stages)}. Got {trainable!r} instead."
                f"{f' Do you mean {close[0]!r}?' if close else ''} {advice}"
            )
        return len(stages) - list(stages).index(trainable)
    if not 0 <= trainable <= len(stages):
        raise ValueError(
            f"The 'trainable' parameter must be from 0 to {len(stages)}, the number of "
            f"stages. Got {trainable!r} instead. {advice}"
        )
    return int(trainable)


def count_frozen_parts(network: nn.Sequential, n_trainable_stages: int) -> int:
    """Return the number of frozen parts of a network: the frozen depth.

    Parameters
    ----------
    network : nn.Sequential
        From `replace_head`. Its parts are the stages, the neck and the head.
    n_trainable_stages : int
        Number of stages, counted from the head, that are trained. The neck is trained
        with the last stage.

    Returns
    -------
    int
        From 0 to the number of parts minus one, since the head is always trained.
    """
    n_stages = len(network) - 2
    return n_stages - n_trainable_stages if n_trainable_stages else n_stages + 1


class PartiallyFrozen(nn.Module):
    """Network with a frozen prefix.

    Parameters
    ----------
    network : nn.Sequential
        From `replace_head`.
    n_trainable_stages : int
        As in `count_frozen_parts`.
    precision : torch.dtype, default=torch.float32
        Precision of the computation; parameters stay float32.
    freeze_batch_norm : bool, default=False
        Whether BatchNorm layers of trainable stages stay in evaluation mode.
    fuse_prefix : callable, default=None
        Returns a faster module with the same output as the frozen prefix. Called when
        images come in after the frozen depth has changed. None: the prefix itself.

    Attributes
    ----------
    n_frozen : int
        Number of frozen parts.
    """

    def __init__(
        self,
        network: nn.Sequential,
        n_trainable_stages: int,
        precision: torch.dtype = torch.float32,
        freeze_batch_norm: bool = False,
        fuse_prefix: Callable[[nn.Sequential], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.fuse_prefix = fuse_prefix
        self.freeze_batch_norm = freeze_batch_norm
        self.network = network
        self.precision = precision
        self.unfreeze(n_trainable_stages)

    def unfreeze(self, n_trainable_stages: int) -> None:
        """Make the head and `n_trainable_stages` stages trainable, freeze the rest."""
        self.n_frozen = count_frozen_parts(self.network, n_trainable_stages)
        # Downwards: a parameter that frozen and trainable parts share is frozen.
        for depth in reversed(range(len(self.network))):
            self.network[depth].requires_grad_(depth >= self.n_frozen)
        self._modes = [(cast(nn.Module, self), True), *self._training_modes()]
        self.train(self.training)
        self.release_prefix()

    def release_prefix(self) -> None:
        """Free the memory of the fused prefix; it is made again when needed."""
        # In a tuple, so that its parameters are not registered in this module.
        self._prefix: tuple[nn.Module, ...] = ()

    def train(self, mode: bool = True) -> Self:
        """Set the trainable stages to training mode, and frozen ones to evaluation."""
        # skorch calls this before every step, and a step of the head alone takes less
        # time than setting the mode of all modules. So first check if any changes.
        if all(module.training is (mode and on) for module, on in self._modes):
            return self
        super().train(mode)
        for part in self.network[: self.n_frozen]:
            part.eval()
        for module in self.network.modules():
            if self.freeze_batch_norm and isinstance(module, _BATCH_NORMS):
                module.eval()
        return self

    def _training_modes(self) -> Iterator[tuple[nn.Module, bool]]:
        for depth, part in enumerate(self.network):
            for module in part.modules():
                frozen = self.freeze_batch_norm and isinstance(module, _BATCH_NORMS)
                yield module, depth >= self.n_frozen and not frozen

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs ``(n, n_outputs)`` for ``(n, 3, h, w)``, float32."""
        if not self._prefix:  # never needed where activations come in
            prefix = self.network[: self.n_frozen]
            fuse = self.fuse_prefix if len(prefix) else None
            self._prefix = (prefix if fuse is None else fuse(prefix),)
        with self._autocast(x), torch.no_grad():
            x = self._prefix[0](x)
        return self.forward_trainable(x)

    def forward_trainable(self, x: Tensor) -> Tensor:
        """Return the outputs for activations at the end of the frozen prefix."""
        with self._autocast(x):
            outputs: Tensor = self.network[self.n_frozen :](x)
        return outputs.float()

    def _autocast(self, x: Tensor) -> torch.autocast:
        enabled = self.precision != torch.float32
        return torch.autocast(x.device.type, self.precision, enabled=enabled)


class NormalizedInput(nn.Module):
    """Network that takes pixels, which it normalizes, or cached activations.

    Parameters
    ----------
    network : PartiallyFrozen
        Network in training.
    preprocessing : Preprocessing
        Defines mean and standard deviation.
    """

    def __init__(self, network: PartiallyFrozen, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.partially_frozen = network
        self.normalization = Normalization(preprocessing)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs ``(n, n_outputs)`` for pixels or activations.

        Pixels are uint8 ``(n, side, side, 3)``; activations are float32, as the frozen
        prefix returns them.
        """
        if x.dtype == torch.uint8:
            outputs: Tensor = self.partially_frozen(self.normalization(x))
            return outputs
        layout = torch.channels_last if x.ndim == 4 else torch.contiguous_format
        return self.partially_frozen.forward_trainable(
            x.contiguous(memory_format=layout)
        )
