"""The one way through a network: device, precision, and the forward loop.

Three things are promised here. The network computes what it was trained to compute:
evaluation mode, no gradients, no TensorFloat-32. A row does not depend on its
neighbours: see `forward`. And the network never waits for the disk: pictures are
decoded in threads, at most two batches ahead.
"""

import contextlib
import copy
import itertools
import re
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar, cast

import joblib
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.nn.utils.parametrize import is_parametrized
from tqdm.auto import tqdm

from sktl._preprocessing import Preprocessing

PRECISIONS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
Network = TypeVar("Network", bound=nn.Module)
Item = TypeVar("Item")


class PictureSequence(Protocol):
    """What `forward` asks of pictures: `sktl._images.Pictures` for instance."""

    def __len__(self) -> int:
        """Give the number of pictures."""

    def __getitem__(self, position: int) -> Image.Image:
        """Decode one, in mode RGB; several threads may ask at once."""


_MAX_PREPARED = 4
_MADE_BY = "_sktl_made_by"  # attribute of a tensor: the convolution it comes from
_FOLDING_TOLERANCE = 1e-5  # of the largest output, float32

_prepared: OrderedDict[Hashable, nn.Module] = OrderedDict()
_prepared_lock = threading.Lock()


def resolve_device(device: str | torch.device) -> torch.device:
    """Turn ``"auto"`` into the accelerator of this machine, or its CPU.

    Raises
    ------
    ValueError
        If the name is not one of torch's, or the device is not there.
    """
    if device == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return found or torch.device("cpu")
    try:
        # With its index, which another thread may choose differently: "cuda:0".
        probe = torch.empty(0, device=device)
        probe.cpu()  # what computes nothing, such as "meta", has nothing to give back
        return probe.device
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(
            f"The 'device' parameter must be 'auto' or a device of this machine. Got "
            f"{str(device)!r} instead: {str(error).splitlines()[0]}"
        ) from error


def prepared(
    key: Hashable,
    build: Callable[[], Network],
    *,
    side: int,
    device: torch.device,
    precision: str,
) -> Network:
    """Give the network that `build` makes, folded, on its device, in its precision.

    Parameters
    ----------
    key : hashable
        What `build` depends on. The last few networks are kept under it and what
        follows, so that clones of an estimator and repeated calls share one. (The
        cache of backbones is another one: of each, several may be made.)
    build : callable
        Gives a network that nobody else holds; it is changed here.
    side : int
        Side in pixels of the pictures that it is made for.
    device : torch.device
        Where it is to run.
    precision : {"float32", "bfloat16", "float16"}
        What its weights are cast to.

    Returns
    -------
    nn.Module
        In evaluation mode. It is shared: not to be changed.

    Raises
    ------
    ValueError
        If the network does not run on pictures of that size.
    """
    key = (key, side, device, precision)
    with _prepared_lock:
        if key not in _prepared:
            network = build().eval()
            with torch.no_grad(), _size_explained(side), memory_explained(1):
                fold_batch_norm(network, side)
            network.to(device, PRECISIONS[precision])
            _prepared[key] = network.to(memory_format=torch.channels_last)
            while len(_prepared) > _MAX_PREPARED:
                _prepared.popitem(last=False)
        _prepared.move_to_end(key)
        return cast(Network, _prepared[key])


def fold_batch_norm(network: nn.Module, side: int) -> int:
    """Merge every BatchNorm into the convolution whose output it alone reads.

    Which pairs there are is seen in one pass of a random picture, so it needs no
    knowledge of the architecture. Modules with hooks are left alone: somebody wants
    to see what goes in or comes out of them.

    Parameters
    ----------
    network : nn.Module
        In evaluation mode, float32, on the CPU. It is changed in place.
    side : int
        Side in pixels of the picture.

    Returns
    -------
    int
        Number of pairs merged: 0, and the network as it was, where there is none, or
        where the output would move by more than 1e-5 of the largest value (as it does
        when something else reads the convolution too).
    """
    generator = torch.Generator().manual_seed(0)
    picture = torch.randn(1, 3, side, side, generator=generator)
    pairs, before = _conv_bn_pairs(network, picture)
    unfolded = []
    for name, bn_name in pairs:
        conv, bn = network.get_submodule(name), network.get_submodule(bn_name)
        unfolded += [(name, conv), (bn_name, bn)]
        # In float64, so that the weights are rounded once.
        folded = fuse_conv_bn_eval(
            cast(nn.Conv2d, copy.deepcopy(conv).double()),
            cast(nn.BatchNorm2d, copy.deepcopy(bn).double()),
        )
        network.set_submodule(name, folded.float())
        network.set_submodule(bn_name, nn.Identity())
    moved = (network(picture) - before).abs().max() if pairs else 0
    if moved <= _FOLDING_TOLERANCE * before.abs().max():
        return len(pairs)
    for name, module in unfolded:
        network.set_submodule(name, module)
    return 0


def _conv_bn_pairs(
    network: nn.Module, picture: Tensor
) -> tuple[list[tuple[str, str]], Tensor]:
    """Names of the convolutions and BatchNorms that follow each other, and the output.

    Each of the two runs exactly once, and what the one gives is what the other gets.
    """
    found: list[tuple[str, str]] = []
    ran: list[str] = []

    def after_conv(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
            ran.append(name)
            setattr(out, _MADE_BY, name)

        return hook

    def before_bn(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            ran.append(name)
            if hasattr(inputs[0], _MADE_BY):
                found.append((getattr(inputs[0], _MADE_BY), name))

        return hook

    handles = []
    for name, module in network.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            continue
        if isinstance(module, nn.Conv2d) and not is_parametrized(module):
            handles.append(module.register_forward_hook(after_conv(name)))
        elif isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
            handles.append(module.register_forward_pre_hook(before_bn(name)))
    output = network(picture)
    for handle in handles:
        handle.remove()
    convs = [conv for conv, _ in found]
    once = [
        (conv, bn)
        for conv, bn in found
        if ran.count(conv) == ran.count(bn) == convs.count(conv) == 1
    ]
    return once, output


def forward(
    network: nn.Module,
    pictures: PictureSequence,
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    device: torch.device,
    precision: str,
    n_jobs: int | None = None,
    verbose: int = 0,
) -> NDArray[np.float32]:
    """Run every picture through a network.

    A row does not depend on its neighbours. A library of convolutions chooses its
    algorithm by the shape of the batch, and another algorithm rounds differently; so
    the shape is not left to chance. From `batch_size` pictures on, every batch has
    `batch_size` pictures (the last is filled up, and what fills it is thrown away);
    below, every picture goes through on its own, which is also the quickest for one.

    Parameters
    ----------
    network : nn.Module
        From `prepared`: turns ``(n, 3, side, side)`` into ``(n, n_outputs)``.
    pictures : PictureSequence
        Sequence of n_samples pictures, decoded as they are needed.
    preprocessing : Preprocessing
        Turns a picture into ``(side, side, 3)`` uint8, and has mean and deviation.
    batch_size : int
        Number of pictures that go through at a time.
    device, precision
        Those that `network` was prepared for.
    n_jobs : int or None
        Threads that decode, in joblib's counting.
    verbose : int
        Above 0, a bar on whatever takes longer than a second.

    Returns
    -------
    ndarray of shape (n_samples, n_outputs), float32

    Raises
    ------
    ValueError
        If a picture is bad, or its output is not finite; the row is named.
    MemoryError
        If a batch does not fit; it says what to change.
    """
    n_samples = len(pictures)
    rows: NDArray[np.float32] | None = None
    results = batches(
        network,
        pictures,
        range(n_samples),
        preprocessing,
        batch_size=shape_of_batch(n_samples, batch_size),
        device=device,
        precision=precision,
        n_jobs=n_jobs,
        verbose=verbose,
    )
    with contextlib.closing(results):
        for positions, out in results:
            if rows is None:
                rows = np.empty((n_samples, out.shape[1]), dtype=np.float32)
            rows[positions] = out
    assert rows is not None  # there is at least one picture
    return rows


def shape_of_batch(n_samples: int, batch_size: int) -> int:
    """Say how many pictures go through at a time in a call with `n_samples`."""
    return batch_size if n_samples >= batch_size else 1


def batches(
    network: nn.Module,
    pictures: PictureSequence,
    order: Sequence[int],
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    device: torch.device,
    precision: str,
    n_jobs: int | None = None,
    verbose: int = 0,
    skip: Callable[[int], bool] = lambda position: False,
) -> Generator[tuple[list[int], NDArray[np.float32]], None, None]:
    """Run pictures through a network, batch by batch; see `forward`.

    Parameters
    ----------
    network, pictures, preprocessing, device, precision, n_jobs, verbose
        As in `forward`.
    order : sequence of int
        Which pictures, and in what order.
    batch_size : int
        Number of pictures that go through at a time, in any case.
    skip : callable
        Asked of a position immediately before its picture goes through: True to leave
        it out.

    Yields
    ------
    positions : list of int
        Of the pictures of one batch; at most `batch_size`.
    out : ndarray of shape (len(positions), n_outputs), float32
        Their outputs.

    Raises
    ------
    ValueError, MemoryError
        As `forward` does.
    """
    side = preprocessing.crop_size
    # What fills up the last batch are pictures of the batch before.
    batch = np.empty((batch_size, side, side, 3), dtype=np.uint8)
    bar: Any = contextlib.nullcontext()
    if verbose:  # else not even made: every bar has a thread that watches it
        bar = tqdm(total=len(order), unit="picture", delay=1)
    n_threads = joblib.effective_n_jobs(n_jobs)
    ahead = 2 * max(batch_size, n_threads)

    def load(position: int) -> tuple[int, NDArray[np.uint8]]:
        return position, preprocessing(pictures[position])

    decoded = in_threads(load, order, n_threads=n_threads, ahead=ahead)
    wanted = ((i, pixels) for i, pixels in decoded if not skip(i))
    with contextlib.closing(decoded), bar:
        while chunk := list(itertools.islice(wanted, batch_size)):
            positions = [position for position, _ in chunk]
            for i, (_, pixels) in enumerate(chunk):
                batch[i] = pixels
            with memory_explained(batch_size), _as_trained(device):
                x = torch.from_numpy(batch).permute(0, 3, 1, 2)  # (n, 3, side, side)
                x = normalized(x.to(device), preprocessing).to(PRECISIONS[precision])
                out = network(x)[: len(chunk)].float().cpu().numpy()  # (n, n_outputs)
            _check_finite(out, positions, precision)
            if verbose:
                bar.update(len(chunk))
            yield positions, out


def normalized(x: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Turn uint8 ``(n, 3, h, w)`` into float32, step by step as torchvision does."""
    mean = torch.tensor(preprocessing.mean, device=x.device).view(3, 1, 1)
    std = torch.tensor(preprocessing.std, device=x.device).view(3, 1, 1)
    return x.float().div_(255).sub_(mean).div_(std)


def in_threads(
    load: Callable[[int], Item], order: Sequence[int], *, n_threads: int, ahead: int
) -> Generator[Item, None, None]:
    """Load what stands at some positions in threads, in order, a little ahead.

    Threads suffice for pictures, because Pillow lets go of the interpreter while it
    decodes.

    Parameters
    ----------
    load : callable
        Gives the item at a position; called by several threads at once.
    order : sequence of int
        The positions.
    n_threads : int
        How many threads.
    ahead : int
        How many items at most are loaded before they are asked for.

    Yields
    ------
    object
        What `load` gives, in that order.
    """
    if len(order) == 1:  # a thread would only cost
        yield load(order[0])
        return
    pool = ThreadPoolExecutor(n_threads)
    waiting: deque[Future[Item]] = deque()
    try:
        for i in order:
            waiting.append(pool.submit(load, i))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        # Reached on a bad picture and on Ctrl-C too: what waits is given up.
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _as_trained(device: torch.device) -> Iterator[None]:
    """No gradients, and on a GPU no TensorFloat-32, which keeps 10 bits of 23."""
    with torch.inference_mode():
        if device.type != "cuda":
            yield
            return
        _flags.enter()
        try:
            yield
        finally:
            _flags.leave()


class _ExactFlags:
    """Switches of the process that decide how exactly, and in what way, a GPU computes.

    They belong to all threads, so passes that overlap are counted: the first sets the
    switches, the last puts them back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_inside = 0
        self._before: list[Any] = []

    def enter(self) -> None:
        with self._lock:
            if self._n_inside == 0:
                self._before = [getattr(*where) for where, _ in self._wanted()]
                for where, value in self._wanted():
                    setattr(*where, value)
            self._n_inside += 1

    def leave(self) -> None:
        with self._lock:
            self._n_inside -= 1
            if self._n_inside == 0:
                for (where, _), value in zip(self._wanted(), self._before, strict=True):
                    setattr(*where, value)

    def _wanted(self) -> list[tuple[tuple[Any, str], Any]]:
        cudnn: Any = torch.backends.cudnn  # its types lack `conv`
        cuda = torch.backends.cuda
        return [
            ((cudnn.conv, "fp32_precision"), "ieee"),
            ((cuda.matmul, "fp32_precision"), "ieee"),
            ((cudnn, "benchmark"), False),
            ((cudnn, "deterministic"), True),
        ]


_flags = _ExactFlags()


@contextlib.contextmanager
def _size_explained(side: int) -> Iterator[None]:
    """Turn what torch says of a picture that is too small, or not its size."""
    try:
        yield
    except RuntimeError as error:
        raise ValueError(
            f"The network must run on pictures of {side} pixels a side, and does not: "
            f"{str(error).splitlines()[0]} Choose another image_size."
        ) from error


@contextlib.contextmanager
def memory_explained(batch_size: int) -> Iterator[None]:
    """Turn torch's errors about memory, on any device, into Python's own."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not re.search("out of memory|can't allocate|ALLOC_FAILED", str(error)):
            raise
        raise MemoryError(
            f"A batch of {batch_size} pictures does not fit into memory. Reduce "
            "batch_size or image_size, choose precision='bfloat16', or ask for fewer "
            "features."
        ) from error


def _check_finite(
    out: NDArray[np.float32], positions: Sequence[int], precision: str
) -> None:
    finite = np.isfinite(out).all(axis=1)
    if not finite.all():
        advice = "These weights do not fit this network or this layer."
        if precision == "float16":
            advice = "Numbers above 65504 overflow in float16: try 'bfloat16'."
        row = positions[int(finite.argmin())]
        raise ValueError(
            f"The output of the network for X[{row}] must be finite. Got NaN or "
            f"infinity with precision={precision!r}. {advice}"
        )
