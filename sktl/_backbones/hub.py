"""Fetch weights files from the Hugging Face Hub, through its client and cache.

``huggingface_hub`` reads ``HF_HOME``, ``HF_HUB_OFFLINE``, ``HF_ENDPOINT`` and the token
of the user. A file gets its name in the cache when it is complete. Its content is not
checked there, but the name of the file that the cache stores is its sha256, which is
checked each time weights are read, see `sktl._backbones.weights`.
"""

from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from sktl._utils.keyed_cache import KeyedCache

# Caches nothing: threads that need the same file wait for one download.
_downloads: KeyedCache[tuple[str, str, str | None], str] = KeyedCache(max_size=0)


def fetch_hub_file(
    repository: str, filename: str, revision: str | None, *, progress: bool
) -> Path:
    """Return the local copy of a file of the hub; download it if it is missing.

    A file in the cache is returned without a request and without writing anything. For
    a name of a revision such as ``"main"`` it is therefore the file of the time when it
    was downloaded.

    Parameters
    ----------
    repository : str
        Such as ``"timm/resnet50.a1_in1k"``.
    filename : str
        Name of the file in the repository.
    revision : str or None
        Branch, tag or commit; None for the main branch.
    progress : bool
        Whether to show a progress bar of the download.

    Returns
    -------
    Path
        The file in the cache of the hub.

    Raises
    ------
    ConnectionError
        If the file cannot be downloaded.
    ImportError
        If the client of the hub is not installed.
    """
    client = _import_client()
    cached = client.try_to_load_from_cache(repository, filename, revision=revision)
    if not isinstance(cached, str):
        download = partial(_download, client, repository, filename, revision, progress)
        cached = _downloads.get_or_create((repository, filename, revision), download)
    return Path(cached)


def _import_client() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            "The weights of networks of timm require the package huggingface_hub: "
            f"{error}. Run pip install 'sktl[timm]', or pass the path of a file as "
            "`weights`."
        ) from error
    return huggingface_hub


def _download(
    client: Any, repository: str, filename: str, revision: str | None, progress: bool
) -> str:
    options = {} if progress else {"tqdm_class": _hidden_progress}
    try:
        return client.hf_hub_download(
            repository, filename, revision=revision, **options
        )
    # Broad on purpose: errors of the client's HTTP libraries have no common base class.
    except Exception as error:
        address = client.hf_hub_url(repository, filename, revision=revision)
        raise ConnectionError(
            f"The weights {filename!r} of {repository!r} are not in the cache of the "
            f"Hugging Face Hub, {client.constants.HF_HUB_CACHE!r}, and could not be "
            f"downloaded from {address}: {_reason(client.errors, error)}. Download the "
            f"file on another machine and pass weights='path/to/{filename}', or copy "
            "that cache from a machine that has it. The bundled backbone "
            "'resnet_mini' needs no network connection."
        ) from error


def _hidden_progress(**options: object) -> Any:
    """Create a progress bar that shows nothing, whatever options the client has."""
    return tqdm(disable=True)


def _reason(errors: Any, error: BaseException) -> str:
    """Return why a download failed, in a few words."""
    if isinstance(error, errors.GatedRepoError):
        return (
            "its authors require that you accept their terms on the page of the "
            "repository and log in (run `hf auth login`, or set HF_TOKEN)"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            "there is no such repository, or it is private and you must log in (run "
            "`hf auth login`, or set HF_TOKEN)"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return "the repository has no such revision"
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__  # no connection
    elif isinstance(error, errors.EntryNotFoundError):
        return "the repository has no such file"
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
