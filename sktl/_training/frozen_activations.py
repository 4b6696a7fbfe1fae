"""Activations at the end of the frozen prefix, computed once per image and cached.

Without augmentation, or with fixed views, the output of the frozen stages does not
change between epochs. It goes through the same forward pass and the same cache as
features do, so that an epoch costs only the trainable part of the network. The frozen
depth is the number of frozen parts: the prefix ends after a stage or, if only the head
is trained, before the head.

Activations of up to a gigabyte are kept in memory. Larger ones are read from the cache
on disk batch by batch or, without a cache, computed again in each epoch. Which of these
happens changes the time, but no bit of the result.
"""

import copy
import sys
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from sktl._backbones.feature_extractor import PENULTIMATE
from sktl._backbones.new_head import NECK
from sktl._images.augmented_views import AugmentedViews
from sktl._images.preprocessing import Preprocessing
from sktl._images.sequence import ImageSequence
from sktl._inference.cached_forward import cached_forward
from sktl._inference.distributed import is_distributed
from sktl._inference.engines import (
    CompiledModel,
    get_compiled_model,
    reraise_out_of_memory,
)
from sktl._inference.execution import PRECISIONS, ExecutionConfig
from sktl._inference.extract_features import extract_features
from sktl._inference.feature_cache import Memory, open_cache, open_store
from sktl._inference.model_spec import ModelSpec
from sktl._store.feature_store import FeatureStore
from sktl._store.shard import BYTES_BESIDES_ROW
from sktl._training.initial_model import FrozenPrefix, PretrainedPrefix
from sktl._training.network import network_digest, output_shape
from sktl._utils.default_dtype import float32_default_if_needed

_MAX_BYTES_IN_MEMORY = 2**30


class FrozenActivations:
    """Activations of a sequence of images at the end of the frozen prefix.

    Parameters
    ----------
    network : nn.Sequential
        From `replace_head`. Its frozen prefix must not change.
    images : ImageSequence or AugmentedViews
        All images that activations will be read of.
    preprocessing : Preprocessing
        Preprocessing of the images.
    execution : ExecutionConfig
        How the frozen prefix is computed.
    pretrained : PretrainedPrefix
        The parts of the network that have the weights of a backbone.
    prefix : FrozenPrefix or None, default=None
        Frozen prefix of a fitted network, whose digest and shape are known.
    memory : str, path-like, FeatureStore, joblib.Memory or None
        Cache of the activations.
    read_only : bool, default=False
        Whether cached activations are read, and none are written.
    distribute : bool, default=True
        Whether worker processes may compute, if the user chose such a backend.
    """

    def __init__(
        self,
        network: nn.Sequential,
        images: ImageSequence | AugmentedViews,
        preprocessing: Preprocessing,
        execution: ExecutionConfig,
        *,
        pretrained: PretrainedPrefix,
        memory: Memory,
        prefix: FrozenPrefix | None = None,
        read_only: bool = False,
        distribute: bool = True,
    ) -> None:
        self._network = network
        self._images = images
        self._preprocessing = preprocessing
        self._execution = execution
        self._pretrained = pretrained
        self._store = open_store(memory)
        self._read_only = read_only
        self._distribute = distribute and is_distributed(execution.n_jobs)
        self._stored: set[int] = set()  # depths that workers have computed and stored
        self._in_memory: dict[int, NDArray[np.float32]] = {}
        self._reported: set[int] = set()
        self._shapes: dict[int, tuple[int, ...]] = {}
        self._digests: dict[int, str] = {}
        if prefix is not None:
            self._shapes[prefix.n_parts] = prefix.output_shape
            self._digests[prefix.n_parts] = prefix.digest

    def rows(self, n_frozen: int, positions: Sequence[int]) -> Tensor:
        """Return the activations of some images.

        Parameters
        ----------
        n_frozen : int
            Frozen depth; at least 1.
        positions : sequence of int
            Positions of the images.

        Returns
        -------
        Tensor of shape (len(positions), ...), float32
            Input of the first trainable part.

        Raises
        ------
        ValueError
            If an image cannot be read: names the row, the path and the reason.
        MemoryError
            If a batch does not fit into memory.
        """
        shape = self._shape(n_frozen)
        if n_frozen in self._in_memory:
            rows = self._in_memory[n_frozen][np.asarray(positions)]
        else:
            rows = self._compute_here(n_frozen, self._images.subset(positions))
        return torch.from_numpy(rows).view(-1, *shape)

    def compute(self, n_frozen: int) -> None:
        """Compute the activations of all images and keep them, if they fit in memory.

        If they do not, worker processes compute and cache them, if there are any; else
        each batch is computed when it is read.

        Parameters
        ----------
        n_frozen : int
            Frozen depth; at least 1.
        """
        if n_frozen in self._in_memory or n_frozen in self._stored:
            return
        self._report_size(n_frozen)
        n_images = len(self._images)
        bytes_per_row = 4 * int(np.prod(self._shape(n_frozen)))
        n_in_memory = _MAX_BYTES_IN_MEMORY // bytes_per_row
        if n_in_memory >= n_images:
            self._in_memory.clear()  # of another depth
            self._in_memory[n_frozen] = self._compute(n_frozen, self._images)
        elif self._can_distribute(n_frozen) and self._store_for(n_frozen) is not None:
            step = max(1, n_in_memory)
            for start in range(0, n_images, step):
                positions = range(start, min(start + step, n_images))
                self._compute(n_frozen, self._images.subset(positions))
            self._stored.add(n_frozen)

    def features(self) -> NDArray[np.float32]:
        """Return the input of the head for all images: ``(n, n_features)``."""
        n_frozen = len(self._network) - 1
        if n_frozen not in self._in_memory:
            self._in_memory[n_frozen] = self._compute(n_frozen, self._images)
        return self._in_memory[n_frozen]

    def outputs(self, n_frozen: int) -> NDArray[np.float32]:
        """Return the outputs of the network for all images.

        Parameters
        ----------
        n_frozen : int
            Frozen depth; at least 1.

        Returns
        -------
        ndarray of shape (n_samples, n_outputs)
            As in `forward`, a row does not depend on the other rows.
        """
        self.compute(n_frozen)
        n_samples, size = len(self._images), self._execution.batch_size
        device, precision = self._execution.device, self._execution.precision
        above = self._network[n_frozen:].eval()
        if device.type != "cpu":
            above = copy.deepcopy(above).to(device)
        autocast = torch.autocast(
            device.type, PRECISIONS[precision], enabled=precision != "float32"
        )
        shape = (size, *self._shape(n_frozen))
        batch = torch.zeros(shape, device=device, dtype=torch.float32)
        outputs = []
        for start in range(0, n_samples, size):
            rows = self.rows(n_frozen, range(start, min(start + size, n_samples)))
            exact = self._execution.exact_inference_mode()
            dtype = float32_default_if_needed()
            with reraise_out_of_memory(size), exact, autocast, dtype:
                batch[: len(rows)] = rows.to(device)
                outputs.append(above(batch)[: len(rows)].float().cpu().numpy())
        return np.concatenate(outputs)

    def max_bytes(self, n_frozen: int) -> int:
        """Return how much the activations at a frozen depth can add to a store."""
        row_bytes = 4 * int(np.prod(self._shape(n_frozen)))
        return len(self._images) * (row_bytes + BYTES_BESIDES_ROW)

    def _shape(self, n_frozen: int) -> tuple[int, ...]:
        """Return the shape of the activations of one image."""
        if n_frozen not in self._shapes:
            self._shapes[n_frozen] = output_shape(
                self._network[:n_frozen],
                self._preprocessing.crop_size,
                self._preprocessing.n_channels,
            )
        return self._shapes[n_frozen]

    def _report_size(self, n_frozen: int) -> None:
        writes = self._store is not None and not self._read_only
        verbose = writes and self._execution.verbose
        if not verbose or n_frozen in self._reported:
            return
        self._reported.add(n_frozen)
        cached = self._store_for(n_frozen) is not None
        tqdm.write(
            f"The activations of {len(self._images)} images after "
            f"{self._layer(n_frozen)} of {self._pretrained.backbone.name} take at most "
            f"{self.max_bytes(n_frozen) / 1e6:.1f} MB in {self._store!r}"
            f"{'.' if cached else ', more than its max_bytes: they are not cached.'}",
            file=sys.stderr,
        )

    def _store_for(self, n_frozen: int) -> FeatureStore | None:
        """Return the store, unless it would evict rows before they are read again."""
        store = self._store
        if store is not None and store.max_bytes is not None:
            return store if self.max_bytes(n_frozen) <= store.max_bytes else None
        return store

    def _layer(self, n_frozen: int) -> str:
        name = list(dict(self._network.named_children()))[n_frozen - 1]
        return PENULTIMATE if name == NECK else name

    def _can_distribute(self, n_frozen: int) -> bool:
        return self._distribute and n_frozen <= self._pretrained.n_parts

    def _compute(
        self, n_frozen: int, images: ImageSequence | AugmentedViews
    ) -> NDArray[np.float32]:
        if not self._can_distribute(n_frozen):
            return self._compute_here(n_frozen, images)
        spec = self._spec(n_frozen)
        return extract_features(
            spec, images, self._store_for(n_frozen), read_only=self._read_only
        )

    def _compute_here(
        self, n_frozen: int, images: ImageSequence | AugmentedViews
    ) -> NDArray[np.float32]:
        model = {**self._spec(n_frozen).namespace(), "weights": self._digest(n_frozen)}
        return cached_forward(
            lambda: self._compile(n_frozen),
            images,
            self._preprocessing,
            self._execution,
            open_cache(
                self._store_for(n_frozen),
                model,
                images.decode_fingerprint(),
                read_only=self._read_only,
            ),
        )

    def _spec(self, n_frozen: int) -> ModelSpec:
        # As in PretrainedFeatures, so that the cached rows are shared with it.
        layer = self._layer(n_frozen)
        return ModelSpec(
            self._pretrained.backbone,
            (layer,),
            "avg" if layer == PENULTIMATE else "flatten",
            self._preprocessing,
            self._execution,
        )

    def _compile(self, n_frozen: int) -> CompiledModel:
        name, layer = self._pretrained.backbone.name, self._layer(n_frozen)
        return get_compiled_model(
            ("frozen", name, self._digest(n_frozen), layer),
            lambda: nn.Sequential(
                copy.deepcopy(self._network[:n_frozen]).cpu(), nn.Flatten(1)
            ),
            self._preprocessing,
            self._execution.for_network(self._network),
            name=f"{name} up to {layer}",
        )

    def _digest(self, n_frozen: int) -> str:
        if n_frozen <= self._pretrained.n_parts:
            return self._pretrained.backbone.digest
        if n_frozen not in self._digests:
            self._digests[n_frozen] = network_digest(self._network[:n_frozen])
        return self._digests[n_frozen]
