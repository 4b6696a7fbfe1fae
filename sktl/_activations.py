"""What the frozen part of a network says of each picture: computed once, then known.

While stages are frozen and pictures are not varied, or in fixed views, what leaves the
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

from sktl._backbones import Reference
from sktl._batches import Batch, LabelledPictures
from sktl._engines import Prepared, memory_explained, prepared
from sktl._execution import PRECISIONS, Execution
from sktl._feature_store import FeatureStore
from sktl._frozen_features import frozen_features
from sktl._images import Pictures
from sktl._inference import shape_of_batch
from sktl._layers import PENULTIMATE
from sktl._memory import Memory, as_store, forward_once
from sktl._preprocessing import Preprocessing
from sktl._spreading import is_spread
from sktl._trainable import NECK, network_digest
from sktl._views import Views

_MOST_KEPT = 2**30  # bytes of activations in memory
_BYTES_BESIDE_A_ROW = 36  # in a store: its key and its checksum


class Activations:
    """What the frozen part of a network gives, for a sequence of pictures.

    Parameters
    ----------
    network : nn.Sequential
        From `new_network`. Its frozen part must stay as it is.
    pictures : Pictures or Views
        All that will be asked for.
    preprocessing : Preprocessing
        What they go through before.
    execution : Execution
        How the frozen part is computed.
    pretrained : (int, Reference)
        How many parts of the network, from below, are as a backbone has them, and that
        backbone.
    memory : str, path-like, FeatureStore, joblib.Memory or None
        Where activations are remembered.
    batch_size : int
        Number of pictures that go through the frozen part at a time.
    n_jobs, verbose, n_samples
        As `forward` has them.
    spread : bool, default=True
        Whether workers of a cluster may compute, if there is one.
    """

    def __init__(
        self,
        network: nn.Sequential,
        pictures: Pictures | Views,
        preprocessing: Preprocessing,
        execution: Execution,
        *,
        pretrained: tuple[int, Reference],
        memory: Memory,
        batch_size: int,
        n_jobs: int | None,
        verbose: int,
        n_samples: int | None = None,
        spread: bool = True,
    ) -> None:
        self._network = network
        self._pictures = pictures
        self._preprocessing = preprocessing
        self._execution = execution
        self._pretrained = pretrained
        self._store = as_store(memory)
        self._options: dict[str, Any]
        self._options = {"batch_size": batch_size, "n_jobs": n_jobs, "verbose": verbose}
        self._options["n_samples"] = n_samples or len(pictures)
        self._spread = spread and is_spread(n_jobs)
        self._remembered: set[int] = set()  # boundaries of which a cluster did all
        self._kept: dict[int, NDArray[np.float32]] = {}
        self._shapes: dict[int, tuple[int, ...]] = {}
        self._digests: dict[int, str] = {}

    def rows(self, n_frozen: int, positions: Sequence[int]) -> Tensor:
        """Give the activations of some pictures.

        Parameters
        ----------
        n_frozen : int
            Number of parts of the network that are frozen; at least 1.
        positions : sequence of int
            Which pictures.

        Returns
        -------
        Tensor of shape (len(positions), ...), float32
            What the next part takes.

        Raises
        ------
        ValueError
            If a picture cannot be read: names the row, the path and the reason.
        MemoryError
            If a batch does not fit into memory.
        """
        shape = self._shape(n_frozen)
        if n_frozen in self._kept:
            rows = self._kept[n_frozen][np.asarray(positions)]
        else:
            rows = self._computed(n_frozen, self._pictures.at(positions), spread=False)
        return torch.from_numpy(rows).view(-1, *shape)

    def compute(self, n_frozen: int) -> None:
        """Compute the activations of all pictures and keep them, if they fit.

        If they do not, the workers of a cluster, if there is one, compute what is to be
        remembered; else each batch is computed when it is asked for.

        Parameters
        ----------
        n_frozen : int
            Number of parts of the network that are frozen; at least 1.
        """
        if n_frozen in self._kept or n_frozen in self._remembered:
            return
        n_pictures = len(self._pictures)
        at_once = _MOST_KEPT // (4 * int(np.prod(self._shape(n_frozen))))
        if at_once >= n_pictures:
            self._kept.clear()  # of a boundary that was before
            self._kept[n_frozen] = self._computed(n_frozen, self._pictures)
        elif self._may_spread(n_frozen) and self._store_for(n_frozen) is not None:
            starts = range(0, n_pictures, max(1, at_once))
            for start in starts:
                some = range(start, n_pictures)[: starts.step]
                self._computed(n_frozen, self._pictures.at(some))
            self._remembered.add(n_frozen)

    def features(self) -> NDArray[np.float32]:
        """Give what the head sees of all pictures: ``(n, n_features)``."""
        n_frozen = len(self._network) - 1
        if n_frozen not in self._kept:
            self._kept[n_frozen] = self._computed(n_frozen, self._pictures)
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
            Of all pictures. As in `forward`, a row does not depend on its neighbours.
        """
        self.compute(n_frozen)
        n_samples = len(self._pictures)
        device, precision = self._execution.device, self._execution.precision
        above = self._network[n_frozen:].eval()
        if device.type != "cpu":
            above = copy.deepcopy(above).to(device)
        size = shape_of_batch(n_samples, int(self._options["batch_size"]))
        mixed = torch.autocast(
            device.type, PRECISIONS[precision], enabled=precision != "float32"
        )
        batch = torch.zeros(size, *self._shape(n_frozen), device=device)
        out = []
        for start in range(0, n_samples, size):
            positions = range(start, min(start + size, n_samples))
            rows = self.rows(n_frozen, positions)
            with memory_explained(size), self._execution.as_trained(), mixed:
                batch[: len(rows)] = rows.to(device)
                out.append(above(batch)[: len(rows)].float().cpu().numpy())
        return np.concatenate(out)

    def most_bytes(self, n_frozen: int) -> int:
        """Say how much a store may grow by the activations at a boundary."""
        bytes_of_row = 4 * int(np.prod(self._shape(n_frozen)))
        return len(self._pictures) * (bytes_of_row + _BYTES_BESIDE_A_ROW)

    def _shape(self, n_frozen: int) -> tuple[int, ...]:
        """Say what shape the activations of one picture have, and tell the user."""
        if n_frozen not in self._shapes:
            side = self._preprocessing.crop_size
            first = next(self._network.parameters())
            picture = first.new_zeros(1, 3, side, side)
            # A copy, for the network may be in training just now.
            frozen = copy.deepcopy(self._network[:n_frozen]).eval()
            with torch.no_grad():
                self._shapes[n_frozen] = tuple(frozen(picture).shape[1:])
            self._announce(n_frozen)
        return self._shapes[n_frozen]

    def _announce(self, n_frozen: int) -> None:
        if self._store is None or not self._options["verbose"]:
            return
        kept = self._store_for(n_frozen) is not None
        tqdm.write(
            f"The activations of {len(self._pictures)} pictures after "
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
        self, n_frozen: int, pictures: Pictures | Views, *, spread: bool = True
    ) -> NDArray[np.float32]:
        # The same as those of PretrainedFeatures, so that they are shared.
        layer = self._layer(n_frozen)
        pooling = "avg" if layer == PENULTIMATE else "flatten"
        _, reference = self._pretrained
        given = pictures, self._preprocessing, self._execution
        options = {**self._options, "memory": self._store_for(n_frozen)}
        if spread and self._may_spread(n_frozen):
            return frozen_features(reference, [layer], pooling, *given, **options)
        space = {"backbone": reference.name, "weights": self._digest_of(n_frozen)}
        space |= {"layer": layer, "pooling": pooling}
        network = partial(self._prepared, n_frozen)
        return forward_once(network, *given, space=space, **options)

    def _prepared(self, n_frozen: int) -> Prepared:
        layer = self._layer(n_frozen)
        return prepared(
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


class LabelledActivations(Dataset[Any]):
    """Some rows of the user's pictures, as what leaves the frozen part, to train on.

    It stands in for a `LabelledPictures`, whose pixels it gives where nothing is
    frozen.

    Parameters
    ----------
    pictures : LabelledPictures
        Without augmentation, or of views.
    activations : Activations
        Of all of the user's pictures, or of the views.
    """

    def __init__(self, pictures: LabelledPictures, activations: Activations) -> None:
        self._pictures = pictures
        self._activations = activations
        self._n_frozen = 0

    def __len__(self) -> int:
        """Give the number of pictures."""
        return len(self._pictures)

    def freeze(self, n_frozen: int) -> None:
        """Say how many parts of the network are frozen from now on."""
        self._n_frozen = n_frozen

    def prepare(self, n_epochs: int) -> None:
        """Let all activations be computed, unless more than will be seen."""
        if self._n_frozen and n_epochs >= self._pictures.n_views:
            self._activations.compute(self._n_frozen)

    def batches(
        self, order: Sequence[int], n_batches: int
    ) -> Generator[Batch, None, None]:
        """Give activations, labels and weights; as `LabelledPictures.batches`."""
        if self._n_frozen == 0:
            yield from self._pictures.batches(order, n_batches)
            return
        seen = np.array_split(self._pictures.seen(order), n_batches)
        parts = np.array_split(np.asarray(order), n_batches)
        for part, rows in zip(parts, seen, strict=True):
            x = self._activations.rows(self._n_frozen, rows.tolist())
            yield x, self._pictures.targets(part)
