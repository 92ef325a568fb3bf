"""Whether the HuggingFace hub answers; asked once, so that a missing one costs seconds."""

import os
import socket
from urllib.parse import urlparse

TIMEOUT_S = 3.0
DEFAULT_ENDPOINT = "https://huggingface.co"
PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


def offline_by_choice() -> bool:
    """HF_HUB_OFFLINE is set."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}


def connection_error() -> OSError | None:
    """Why no connection to the hub can be opened, None if one can (or a proxy stands between)."""
    if any(os.environ.get(name) for name in PROXIES):
        return None
    url = urlparse(os.environ.get("HF_ENDPOINT", DEFAULT_ENDPOINT))
    port = url.port or (80 if url.scheme == "http" else 443)
    try:
        socket.create_connection((url.hostname or "", port), timeout=TIMEOUT_S).close()
    except OSError as error:
        return error
    return None


def offline_if_unreachable() -> None:
    """Set HF_HUB_OFFLINE where the hub does not answer: its libraries then use their cache or fail
    at once, instead of after half a minute of retries. To be called before they are imported.
    """
    if not offline_by_choice() and connection_error() is not None:
        os.environ["HF_HUB_OFFLINE"] = "1"
