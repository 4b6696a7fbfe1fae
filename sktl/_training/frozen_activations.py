"""What the frozen part of a network says of each image: computed once, then known.

While stages are frozen and images are not varied, or in fixed views, what leaves the
frozen part never changes. So it goes through the forward loop and the feature store, as
features do, and an epoch costs only what trains. A *boundary* is where the frozen part
ends: at the end of a stage or, where only the head trains, before the head.

Activations that fit into a gigabyte are kept in memory. Of more, each batch is read
from the store, or, where nothing is remembered, computed again in each epoch. Which of
these it is changes time, and not a bit of the result.
"""

import copy
import sys
from collections.abc import Generator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from sktl._backbones.feature_extractor import PENULTIMATE
from sktl._backbones.registry import BackboneSpec
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
from sktl._inference.feature_cache import FeatureCache, Memory, open_store
from sktl._inference.model_spec import ModelSpec
from sktl._store.feature_store import FeatureStore
from sktl._training.datasets import Batch, ImageDataset
from sktl._training.network import NECK, network_digest

_MOST_KEPT = 2**30  # bytes of activations in memory
_BYTES_BESIDE_A_ROW = 36  # in a store: its key and its checksum


class FrozenActivations:
    """What the frozen part of a network gives, for a sequence of images.

    Parameters
    ----------
    network : nn.Sequential
        From `replace_head`. Its frozen part must stay as it is.
    images : ImageSequence or AugmentedViews
        All that will be asked for.
    preprocessing : Preprocessing
        What they go through before.
    execution : ExecutionConfig
        How the frozen part is computed.
    pretrained : (int, BackboneSpec)
        How many parts of the network, from below, are as a backbone has them, and that
        backbone.
    memory : str, path-like, FeatureStore, joblib.Memory or None
        Where activations are remembered.
    spread : bool, default=True
        Whether workers of a cluster may compute, if there is one.
    """

    def __init__(
        self,
        network: nn.Sequential,
        images: ImageSequence | AugmentedViews,
        preprocessing: Preprocessing,
        execution: ExecutionConfig,
        *,
        pretrained: tuple[int, BackboneSpec],
        memory: Memory,
        spread: bool = True,
    ) -> None:
        self._network = network
        self._images = images
        self._preprocessing = preprocessing
        self._execution = execution
        self._pretrained = pretrained
        self._store = open_store(memory)
        self._spread = spread and is_distributed(execution.n_jobs)
        self._remembered: set[int] = set()  # boundaries of which a cluster did all
        self._kept: dict[int, NDArray[np.float32]] = {}
        self._shapes: dict[int, tuple[int, ...]] = {}
        self._digests: dict[int, str] = {}

    def rows(self, n_frozen: int, positions: Sequence[int]) -> Tensor:
        """Give the activations of some images.

        Parameters
        ----------
        n_frozen : int
            Number of parts of the network that are frozen; at least 1.
        positions : sequence of int
            Which images.

        Returns
        -------
        Tensor of shape (len(positions), ...), float32
            What the next part takes.

        Raises
        ------
        ValueError
            If an image cannot be read: names the row, the path and the reason.
        MemoryError
            If a batch does not fit into memory.
        """
        shape = self._shape(n_frozen)
        if n_frozen in self._kept:
            rows = self._kept[n_frozen][np.asarray(positions)]
        else:
            rows = self._computed(
                n_frozen, self._images.subset(positions), spread=False
            )
        return torch.from_numpy(rows).view(-1, *shape)

    def compute(self, n_frozen: int) -> None:
        """Compute the activations of all images and keep them, if they fit.

        If they do not, the workers of a cluster, if there is one, compute what is to be
        remembered; else each batch is computed when it is asked for.

        Parameters
        ----------
        n_frozen : int
            Number of parts of the network that are frozen; at least 1.
        """
        if n_frozen in self._kept or n_frozen in self._remembered:
            return
        n_images = len(self._images)
        at_once = _MOST_KEPT // (4 * int(np.prod(self._shape(n_frozen))))
        if at_once >= n_images:
            self._kept.clear()  # of a boundary that was before
            self._kept[n_frozen] = self._computed(n_frozen, self._images)
        elif self._may_spread(n_frozen) and self._store_for(n_frozen) is not None:
            starts = range(0, n_images, max(1, at_once))
            for start in starts:
                some = range(start, n_images)[: starts.step]
                self._computed(n_frozen, self._images.subset(some))
            self._remembered.add(n_frozen)

    def features(self) -> NDArray[np.float32]:
        """Give what the head sees of all images: ``(n, n_features)``."""
        n_frozen = len(self._network) - 1
        if n_frozen not in self._kept:
            self._kept[n_frozen] = self._computed(n_frozen, self._images)
        return self._kept[n_frozen]

    def logits(self, n_frozen: int) -> NDArray[np.float32]:
        """Let the other parts of the network say what they make of the activations.

        Parameters
        ----------
        n_frozen : int
            Number of parts of the network that are frozen; at least 1.

        Returns
        -------
        ndarray of shape (n_samples, n_outputs)
            Of all images. As in `forward`, a row does not depend on its neighbours.
        """
        self.compute(n_frozen)
        n_samples = len(self._images)
        device, precision = self._execution.device, self._execution.precision
        above = self._network[n_frozen:].eval()
        if device.type != "cpu":
            above = copy.deepcopy(above).to(device)
        size = self._execution.batch_size
        mixed = torch.autocast(
            device.type, PRECISIONS[precision], enabled=precision != "float32"
        )
        batch = torch.zeros(size, *self._shape(n_frozen), device=device)
        out = []
        for start in range(0, n_samples, size):
            positions = range(start, min(start + size, n_samples))
            rows = self.rows(n_frozen, positions)
            with (
                reraise_out_of_memory(size),
                self._execution.exact_inference_mode(),
                mixed,
            ):
                batch[: len(rows)] = rows.to(device)
                out.append(above(batch)[: len(rows)].float().cpu().numpy())
        return np.concatenate(out)

    def most_bytes(self, n_frozen: int) -> int:
        """Say how much a store may grow by the activations at a boundary."""
        bytes_of_row = 4 * int(np.prod(self._shape(n_frozen)))
        return len(self._images) * (bytes_of_row + _BYTES_BESIDE_A_ROW)

    def _shape(self, n_frozen: int) -> tuple[int, ...]:
        """Say what shape the activations of one image have, and tell the user."""
        if n_frozen not in self._shapes:
            side = self._preprocessing.crop_size
            first = next(self._network.parameters())
            image = first.new_zeros(1, 3, side, side)
            # A copy, for the network may be in training just now.
            frozen = copy.deepcopy(self._network[:n_frozen]).eval()
            with torch.no_grad():
                self._shapes[n_frozen] = tuple(frozen(image).shape[1:])
            self._announce(n_frozen)
        return self._shapes[n_frozen]

    def _announce(self, n_frozen: int) -> None:
        if self._store is None or not self._execution.verbose:
            return
        kept = self._store_for(n_frozen) is not None
        tqdm.write(
            f"The activations of {len(self._images)} images after "
            f"{self._layer(n_frozen)} of {self._pretrained[1].name} take at most "
            f"{self.most_bytes(n_frozen) / 1e6:.1f} MB in {self._store!r}"
            f"{'.' if kept else ', more than it may have: they are not remembered.'}",
            file=sys.stderr,
        )

    def _store_for(self, n_frozen: int) -> FeatureStore | None:
        store = self._store
        if store is not None and store.max_bytes is not None:
            # Each row would be gone before it is asked for again.
            return store if self.most_bytes(n_frozen) <= store.max_bytes else None
        return store

    def _layer(self, n_frozen: int) -> str:
        name = list(dict(self._network.named_children()))[n_frozen - 1]
        return PENULTIMATE if name == NECK else name

    def _may_spread(self, n_frozen: int) -> bool:
        return self._spread and n_frozen <= self._pretrained[0]

    def _computed(
        self,
        n_frozen: int,
        images: ImageSequence | AugmentedViews,
        *,
        spread: bool = True,
    ) -> NDArray[np.float32]:
        # The same as those of PretrainedFeatures, so that they are shared.
        layer = self._layer(n_frozen)
        pooling = "avg" if layer == PENULTIMATE else "flatten"
        given = self._preprocessing, self._execution
        spec = ModelSpec(self._pretrained[1], (layer,), pooling, *given)
        store, cache = self._store_for(n_frozen), None
        if spread and self._may_spread(n_frozen):
            return extract_features(spec, images, store)
        if store is not None:
            namespace = {**spec.namespace(), **images.decode_fingerprint()}
            namespace["weights"] = self._digest_of(n_frozen)
            cache = FeatureCache(store, namespace)
        network = partial(self._prepared, n_frozen)
        return cached_forward(network, images, *given, cache)

    def _prepared(self, n_frozen: int) -> CompiledModel:
        layer = self._layer(n_frozen)
        return get_compiled_model(
            ("frozen", self._pretrained[1].name, self._digest_of(n_frozen), layer),
            lambda: nn.Sequential(
                copy.deepcopy(self._network[:n_frozen]).cpu(), nn.Flatten(1)
            ),
            self._preprocessing,
            self._execution,
            name=f"{self._pretrained[1].name} up to {layer}",
        )

    def _digest_of(self, n_frozen: int) -> str:
        n_pretrained, reference = self._pretrained
        if n_frozen <= n_pretrained:
            return reference.digest
        if n_frozen not in self._digests:
            frozen = self._network[:n_frozen]
            self._digests[n_frozen] = network_digest(frozen)
        return self._digests[n_frozen]


class ActivationDataset(Dataset[Any]):
    """Some rows of the user's images, as what leaves the frozen part, to train on.

    It stands in for a `ImageDataset`, whose pixels it gives where nothing is
    frozen.

    Parameters
    ----------
    images : ImageDataset
        Without augmentation, or of views.
    activations : FrozenActivations
        Of all of the user's images, or of the views.
    """

    def __init__(self, images: ImageDataset, activations: FrozenActivations) -> None:
        self._images = images
        self._activations = activations
        self._n_frozen = 0

    def __len__(self) -> int:
        """Give the number of images."""
        return len(self._images)

    def set_frozen_depth(self, n_frozen: int) -> None:
        """Say how many parts of the network are frozen from now on."""
        self._n_frozen = n_frozen

    def cache_activations(self, n_epochs: int) -> None:
        """Let all activations be computed, unless more than will be seen."""
        if self._n_frozen and n_epochs >= self._images.n_views:
            self._activations.compute(self._n_frozen)

    def batches(
        self, order: Sequence[int], n_batches: int
    ) -> Generator[Batch, None, None]:
        """Give activations, labels and weights; as `ImageDataset.batches`."""
        if self._n_frozen == 0:
            yield from self._images.batches(order, n_batches)
            return
        seen = np.array_split(self._images.seen(order), n_batches)
        parts = np.array_split(np.asarray(order), n_batches)
        for part, rows in zip(parts, seen, strict=True):
            x = self._activations.rows(self._n_frozen, rows.tolist())
            yield x, self._images.targets(part)
