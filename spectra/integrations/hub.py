"""The Hugging Face hub: whether it can be reached, offline mode if not, and which files are in the cache."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

TIMEOUT_SECONDS = 5.0


def hub_reachable(timeout: float = TIMEOUT_SECONDS) -> bool:
    """Whether the hub answers one request. The hub's own loaders retry for half a minute before they give up.

    The request goes through the hub client's session, so that proxies and certificates count as they will in a
    download. Any answer below status 500 counts: whether a model is there is for the loader to say.

    Args:
        timeout: How long to wait for the answer, in seconds.

    Returns:
        False in offline mode, without a network, and behind a proxy that refuses.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        return get_session().head(constants.ENDPOINT, timeout=timeout).status_code < 500
    except Exception:  # no network, a proxy that refuses: the HTTP library under the client has its own classes
        return False


@contextmanager
def offline_unless_reachable() -> Iterator[bool]:
    """A context in which the hub's clients use only the cache of this machine if the hub does not answer.

    Offline mode is a constant that `huggingface_hub` reads at each use, and that `datasets` copies when it is
    imported. Both are set, and put back on exit.

    Yields:
        Whether the hub answers.
    """
    from huggingface_hub import constants

    settings: list[Any] = [constants]
    if importlib.util.find_spec("datasets") is not None:  # an optional dependency
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


def in_cache(name: str, files: Sequence[str]) -> bool:
    """Whether the cache holds one of these files of the hub repository `name`."""
    from huggingface_hub import try_to_load_from_cache

    return any(isinstance(try_to_load_from_cache(name, file), str) for file in files)
