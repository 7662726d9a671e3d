"""Whether the hub can be reached is known fast, and settings that a load changes are restored."""

import http.server
import socket
import threading
import time

import huggingface_hub
import pytest
from huggingface_hub import constants

from spectra.backend.errors import InputError
from spectra.integrations import hub
from spectra.integrations.loading import load_model, load_tokenizer

PROXIES = [name for scheme in ("HTTP", "HTTPS", "ALL") for name in (f"{scheme}_PROXY", f"{scheme}_proxy".lower())]


@pytest.fixture
def online(monkeypatch):
    """As if nobody had asked for offline mode, or had a proxy."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
    huggingface_hub.close_session()  # a session reads the proxies when it is made
    yield
    huggingface_hub.close_session()


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub on this machine that answers every request with the server's `status` and `headers`."""

    def do_GET(self):
        self.send_response(self.server.status)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *arguments):
        pass


@pytest.fixture
def answering(online, monkeypatch):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.status, server.headers = 200, {}
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        template = f"http://127.0.0.1:{server.server_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server
        server.shutdown()


@pytest.fixture
def silent(online, monkeypatch):
    """A hub that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        yield server


def test_a_hub_that_answers_is_reachable_unless_offline_mode_is_asked_for(answering, monkeypatch):
    assert hub.hub_reachable()
    answering.status = 404
    assert hub.hub_reachable()
    answering.status = 502
    assert not hub.hub_reachable()
    answering.status = 200
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not hub.hub_reachable()


def test_a_hub_that_does_not_listen_is_given_up_at_once(silent):
    silent.close()
    started = time.perf_counter()
    assert not hub.hub_reachable()
    assert time.perf_counter() - started < 4


def test_a_hub_that_listens_and_never_answers_is_given_up_after_the_timeout(silent):
    started = time.perf_counter()
    assert not hub.hub_reachable(timeout=0.2)
    assert time.perf_counter() - started < 4


def test_a_proxy_that_does_not_answer_is_given_up_at_once(answering, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    huggingface_hub.close_session()
    started = time.perf_counter()
    assert not hub.hub_reachable()
    assert time.perf_counter() - started < 4


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (404, "RepoNotFound", "there is no folder nobody/nothing and no such model on the hub"),
        (403, "GatedRepo", "the hub lets only some users have nobody/nothing: ask for access"),
    ],
)
def test_what_the_hub_says_of_a_model_is_told_in_one_line(load, status, code, message, answering):
    answering.status, answering.headers = status, {"X-Error-Code": code}
    with pytest.raises(InputError, match=message) as refused:
        load("nobody/nothing")
    assert "\n" not in str(refused.value)


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
