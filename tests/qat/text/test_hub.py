"""Whether the hub answers is found out fast, and what is set for the time of a load is put back."""

import socket
import time

import pytest
from huggingface_hub import constants

from qat.text import hub


@pytest.fixture
def online(monkeypatch):
    """As if nobody had asked for offline mode, or had a proxy."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def listening(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        yield server


@pytest.mark.usefixtures("online", "listening")
def test_a_hub_that_answers_is_reachable_unless_offline_mode_is_asked_for(monkeypatch):
    assert hub.hub_reachable()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not hub.hub_reachable()


@pytest.mark.usefixtures("online")
def test_a_hub_that_does_not_answer_is_given_up_at_once(listening):
    listening.close()
    started = time.perf_counter()
    assert not hub.hub_reachable()
    assert time.perf_counter() - started < 4


@pytest.mark.usefixtures("online")
def test_behind_a_proxy_the_client_has_to_find_out(listening, monkeypatch):
    listening.close()
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    assert hub.hub_reachable()


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize("reachable", [True, False])
def test_the_clients_are_offline_inside_and_as_before_outside(reachable, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "hub_reachable", lambda: reachable)
    inside = []

    def load():
        with hub.offline_unless_reachable() as found:
            inside.extend([found, not constants.HF_HUB_OFFLINE, not datasets.config.HF_HUB_OFFLINE])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        load()
    assert inside == [reachable] * 3
    assert constants.HF_HUB_OFFLINE is datasets.config.HF_HUB_OFFLINE is False
