"""Names on the Hugging Face hub: found fast, or refused fast when there is no network."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
from collections.abc import Iterator
from typing import Any
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
    from huggingface_hub import constants

    settings: list[Any] = [constants]
    if importlib.util.find_spec("datasets") is not None:  # only names from the hub need it; it copies the setting
        settings.append(importlib.import_module("datasets.config"))
    before = [module.HF_HUB_OFFLINE for module in settings]
    reachable = hub_reachable()
    try:
        for module in settings:
            module.HF_HUB_OFFLINE = module.HF_HUB_OFFLINE or not reachable
        yield reachable
    finally:
        for module, offline in zip(settings, before, strict=True):
            module.HF_HUB_OFFLINE = offline
