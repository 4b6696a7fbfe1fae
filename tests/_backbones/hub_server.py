"""A server of the few calls of the Hugging Face Hub that fetch a file."""

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer(ThreadingHTTPServer):
    """Serve files of repositories, with faults.

    Attributes
    ----------
    files : dict of (str, str) to bytes
        Content by repository and name.
    promised : dict of (str, str) to str
        sha256 that the server promises, if it is not that of the content.
    revisions : set of str
        Names of the commit, of all repositories.
    refused : dict of str to (int, str)
        Status and error code by repository.
    max_bytes : int or None
        Number of bytes after which each response is cut off.
    dies : bool
        Whether the server stops when it has cut off a response.
    requests : list of str
        Method and path of each request for a file.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[tuple[str, str], bytes] = {}
        self.promised: dict[tuple[str, str], str] = {}
        self.revisions = {"main", COMMIT}
        self.refused: dict[str, tuple[int, str]] = {}
        self.max_bytes: int | None = None
        self.dies = False
        self.requests: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that have closed their connection."""


@contextlib.contextmanager
def serving() -> Iterator[HubServer]:
    """Run a server inside this context."""
    with HubServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: HubServer

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        content = self._answer()
        limit = self.server.max_bytes
        self.wfile.write(content[:limit])
        if limit is not None and limit < len(content):
            if self.server.dies:
                threading.Thread(target=self.server.server_close).start()
                self.server.shutdown()
            self.close_connection = True

    def _answer(self) -> bytes:
        """Send the headers; return the content."""
        if "/resolve/" not in self.path:
            return self._refuse(404, "")  # the client asks for more than files
        self.server.requests.append(f"{self.command} {self.path}")
        owner, name, _, revision, *rest = self.path.strip("/").split("/")
        repository, filename = f"{owner}/{name}", "/".join(rest)
        content = self.server.files.get((repository, filename))
        if repository in self.server.refused:
            return self._refuse(*self.server.refused[repository])
        if all(repository != each for each, _ in self.server.files):
            return self._refuse(401, "RepoNotFound")
        if revision not in self.server.revisions:
            return self._refuse(404, "RevisionNotFound")
        if content is None:
            return self._refuse(404, "EntryNotFound")
        start = int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0])
        self.send_response(206 if start else 200)
        digest = hashlib.sha256(content).hexdigest()
        digest = self.server.promised.get((repository, filename), digest)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", '"of-the-server"')
        self.send_header("X-Linked-Etag", f'"{digest}"')
        self.send_header("X-Linked-Size", str(len(content)))
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            end = f"{start}-{len(content) - 1}/{len(content)}"
            self.send_header("Content-Range", f"bytes {end}")
        self.end_headers()
        return content[start:]

    def _refuse(self, status: int, code: str) -> bytes:
        self.send_response(status)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()
        return b""

    def log_message(self, format: str, *args: object) -> None:
        """Leave stderr to the tests."""
