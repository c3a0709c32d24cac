"""MLflow over its documented REST interface, with the standard library alone.

In: the address of a tracking server. Out: calls, paged run searches and artifact uploads.

Why not the ``mlflow`` package: importing it costs 5 to 17 seconds, and the process that supervises runs must stay light.
Why not a child that imports it: the child would pay the same import for every publish, and each of its client calls is
one request for one value, where ``log-batch`` takes a whole record. What is written here is read back with the real
client in the tests (``load_table``, ``search_runs``).

One connection, one thread: the server's worker is bound by its interpreter lock, so more connections gain nothing
(measured: 57 ms a record with 1 connection, 61 with 2, 63 with 4).
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import ssl
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from harness.mlflow_server import without_password

IDLE_SECONDS = 2.0
"""uvicorn closes a connection that was idle for 5 s; one that was idle for longer than this is opened anew."""


class TrackingError(Exception):
    """The server refused something. The message carries its answer."""

    def __init__(self, message: str, code: str = ""):
        super().__init__(message)
        self.code = code


class TrackingDown(TrackingError):
    """No answer: the server is not there, or the network is not."""


class Rest:
    """A tracking server. Not for use from several threads at once."""

    def __init__(self, uri: str, timeout: float = 30.0):
        parts = urlsplit(uri)
        self._secure = parts.scheme == "https"
        self._host = parts.hostname or ""
        self._port = parts.port
        self._prefix = parts.path.rstrip("/")
        self._timeout = timeout
        self._headers = {"Content-Type": "application/json", **_authorization(parts.username, parts.password)}
        self._connection: http.client.HTTPConnection | None = None
        self._last_use = 0.0
        self.uri = without_password(uri)
        """The address without a password, fit to be shown."""

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """One call of the interface ``/api/2.0/mlflow/...``. Raises TrackingError."""
        data = None if body is None else json.dumps(body, allow_nan=False).encode()
        answer = self._request(method, f"/api/2.0/mlflow/{path}", data)
        return json.loads(answer) if answer else {}

    def search_runs(self, experiment_id: str, query: str = "") -> Iterator[dict[str, Any]]:
        """All runs of an experiment that are not deleted."""
        body: dict[str, Any] = {"experiment_ids": [experiment_id], "filter": query, "max_results": 1000}
        while True:
            answer = self.call("POST", "runs/search", body)
            yield from answer.get("runs", [])
            token = answer.get("next_page_token")
            if not token:
                return
            body["page_token"] = token

    def put_artifact(self, artifact_uri: str, name: str, data: bytes) -> None:
        """Upload through the server. Raises TrackingError where the server does not pass artifacts on."""
        parts = urlsplit(artifact_uri)
        if parts.scheme != "mlflow-artifacts":
            raise TrackingError(
                f"{self.uri} stores artifacts at {parts.scheme or 'file'}://, where only its clients can write; "
                "start it with --artifacts-destination (and without --default-artifact-root)",
                "NO_ARTIFACT_PROXY",
            )
        path = quote(f"{unquote(parts.path).strip('/')}/{name}")
        self._request("PUT", f"/api/2.0/mlflow-artifacts/artifacts/{path}", data)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _request(self, method: str, path: str, data: bytes | None) -> bytes:
        for attempt in range(3):
            try:
                status, answer = self._send(method, path, data)
            except (OSError, http.client.HTTPException) as error:
                self.close()
                # A refused connection did nothing, so asking again cannot do it twice; the caller decides on the rest.
                if attempt == 0 and isinstance(error, http.client.RemoteDisconnected | BrokenPipeError):
                    continue
                raise TrackingDown(f"{self.uri} does not answer ({error or type(error).__name__})") from error
            if status < 400:
                return answer
            if status in (429, 500, 502, 503, 504) and attempt < 2:
                time.sleep(0.5 * (attempt + 1))
                continue
            raise _refusal(self.uri, method, path, status, answer)
        raise AssertionError("unreachable")

    def _send(self, method: str, path: str, data: bytes | None) -> tuple[int, bytes]:
        if self._connection is not None and time.monotonic() - self._last_use > IDLE_SECONDS:
            self.close()
        if self._connection is None:
            self._connection = self._open()
        self._connection.request(method, self._prefix + path, body=data, headers=self._headers)
        response = self._connection.getresponse()
        answer = response.read()
        self._last_use = time.monotonic()
        return response.status, answer

    def _open(self) -> http.client.HTTPConnection:
        if self._secure:
            return http.client.HTTPSConnection(self._host, self._port, timeout=self._timeout, context=ssl.create_default_context())
        return http.client.HTTPConnection(self._host, self._port, timeout=self._timeout)


def _authorization(user: str | None, password: str | None) -> dict[str, str]:
    """The header that MLflow's own environment variables ask for."""
    if token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        return {"Authorization": f"Bearer {token}"}
    user = unquote(user) if user else os.environ.get("MLFLOW_TRACKING_USERNAME")
    password = unquote(password) if password else os.environ.get("MLFLOW_TRACKING_PASSWORD", "")
    if not user:
        return {}
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


def _refusal(uri: str, method: str, path: str, status: int, answer: bytes) -> TrackingError:
    try:
        body = json.loads(answer)
        code, message = str(body.get("error_code", "")), str(body.get("message", ""))
    except (ValueError, AttributeError):
        code, message = "", answer.decode(errors="replace")
    mend = ""
    if status == 403:
        mend = '; a server that is reached by a name needs --allowed-hosts "NAME:PORT,localhost:*,127.0.0.1:*"'
    elif status == 401:
        mend = "; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
    error = TrackingDown if status in (502, 503, 504) else TrackingError
    return error(f"{uri}: {method} {path}: {status} {code} {message[:300]}{mend}", code)
