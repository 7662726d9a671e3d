"""Names on the Hugging Face hub: found fast, or refused fast when there is no network."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

TIMEOUT_SECONDS = 5.0


def hub_reachable(timeout: float = TIMEOUT_SECONDS) -> bool:
    """Whether the hub answers at all. The hub's own client retries for half a minute before it says so."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # a proxy resolves names for us, so that only the client itself can tell
    address = urlsplit(constants.ENDPOINT)
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname or "", port), timeout=timeout).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def offline_unless_reachable() -> Iterator[bool]:
    """Without a network, the hub's clients inside look only at what is on this machine. Yields whether there is one."""
    from datasets import config as datasets_config
    from huggingface_hub import constants

    reachable = hub_reachable()
    before = constants.HF_HUB_OFFLINE, datasets_config.HF_HUB_OFFLINE
    if not reachable:
        constants.HF_HUB_OFFLINE = True
        datasets_config.HF_HUB_OFFLINE = True
    try:
        yield reachable
    finally:
        constants.HF_HUB_OFFLINE, datasets_config.HF_HUB_OFFLINE = before
