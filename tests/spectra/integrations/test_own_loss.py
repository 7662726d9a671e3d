import sys

import pytest

from spectra.backend.errors import InputError
from spectra.integrations.own_loss import loss_named

MODULE = """
class Scaled:
    def __call__(self, outputs, batch):
        return 3 * outputs

scaled = Scaled()
number = 7

def plain(model, batch):
    return 5
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder with a module of losses, which the process is in."""
    (tmp_path / "losses_of_mine.py").write_text(MODULE)
    (tmp_path / "broken_of_mine.py").write_text("raise ValueError('no luck')\n")
    monkeypatch.chdir(tmp_path)
    yield
    for name in ("losses_of_mine", "broken_of_mine"):
        sys.modules.pop(name, None)


def test_a_module_in_this_folder_is_found_and_the_path_is_put_back():
    before = list(sys.path)
    assert loss_named("losses_of_mine:plain")(None, None) == 5
    assert loss_named("losses_of_mine:scaled")(2, None) == 6
    assert loss_named("losses_of_mine:Scaled.__call__")(None, 1, None) == 3
    assert sys.path == before


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("losses_of_mine", "expected a loss as module:function"),
        (":plain", "expected a loss as module:function"),
        ("losses_of_mine:nothing", "has no nothing: check the name"),
        ("nowhere_at_all:f", "nowhere_at_all of the loss cannot be imported: No module named"),
        ("broken_of_mine:f", "broken_of_mine of the loss cannot be imported: no luck"),
        ("losses_of_mine:number", "is an object of int"),
        ("losses_of_mine:Scaled", "is the class Scaled: name an instance of it"),
    ],
)
def test_a_name_that_is_no_loss_is_refused_in_one_line(name, words):
    before = list(sys.path)
    with pytest.raises(InputError, match=words):
        loss_named(name)
    assert sys.path == before
