import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

import spectra
from spectra.backend.version import __version__
from spectra.runs.provenance import device_name, fingerprint, versions


def test_the_fingerprint_depends_on_values_shapes_and_types_alone():
    batch = {"input_ids": torch.arange(6).reshape(2, 3)}
    same = {"input_ids": torch.tensor([[0, 3], [1, 4], [2, 5]]).T}
    assert not same["input_ids"].is_contiguous()
    assert fingerprint([batch]) == fingerprint([same])
    assert len(fingerprint([batch])) == 16
    others = [
        [{"input_ids": torch.arange(1, 7).reshape(2, 3)}],
        [{"input_ids": torch.arange(6).reshape(3, 2)}],
        [{"input_ids": torch.arange(6, dtype=torch.int32).reshape(2, 3)}],
        [batch, batch],
    ]
    assert len({fingerprint(batches) for batches in [[batch], *others]}) == 5


@dataclasses.dataclass
class Sample:
    x: object
    y: object


class Slotted:
    __slots__ = ("x", "y")

    def __init__(self, x, y):
        self.x, self.y = x, y


def nested(*lengths):
    return torch.nested.nested_tensor([torch.ones(n) for n in lengths], layout=torch.jagged)


def loop():
    found = SimpleNamespace(x=torch.ones(2))
    found.self = found
    return found


# each pair holds the same tensors, or none
OTHERS = {
    "array": ({"x": np.ones(3)}, {"x": np.zeros(3)}),
    "array type": ({"x": np.ones(3)}, {"x": np.ones(3, np.float32)}),
    "array shape": ({"x": np.ones((2, 3))}, {"x": np.ones((3, 2))}),
    "array of objects": ({"x": np.array(["a", None])}, {"x": np.array(["b", None])}),
    "list": ({"x": [1, 2, 3]}, {"x": [1, 2, 4]}),
    "list of lists": ({"x": [[1], [2, 3]]}, {"x": [[1, 2], [3]]}),
    "order": ([1, 2], [2, 1]),
    "number": ((torch.ones(2), 1.0), (torch.ones(2), 2.0)),
    "type of a number": ((torch.ones(2), 1), (torch.ones(2), True)),
    "name": ({"scale": 2.0}, {"shift": 2.0}),
    "text": ({"prompt": "one"}, {"prompt": "two"}),
    "set": ({1, 2}, {1, 3}),
    "dataclass": (Sample(torch.ones(2), "a"), Sample(torch.ones(2), "b")),
    "object": (SimpleNamespace(x=torch.ones(2)), SimpleNamespace(x=torch.zeros(2))),
    "slots": (Slotted(torch.ones(2), 1), Slotted(torch.ones(2), 2)),
    "object in an object": (SimpleNamespace(x=[Slotted(1, 2)]), SimpleNamespace(x=[Slotted(1, 3)])),
    "lengths": (nested(2, 3), nested(3, 2)),
    "packed": tuple(pack_sequence([torch.ones(3), torch.full((2,), x)]) for x in (1.0, 2.0)),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_batches_hold_beside_tensors_counts(kind):
    one, other = OTHERS[kind]
    assert fingerprint([one]) == fingerprint([one])
    assert fingerprint([one]) != fingerprint([other])
    assert fingerprint([one]) != fingerprint([one, one])


def test_objects_that_hold_themselves_and_tables():
    assert fingerprint([loop()]) == fingerprint([loop()])
    pandas = pytest.importorskip("pandas")
    one, other = (pandas.DataFrame({"x": [1.0, last]}) for last in (2.0, 3.0))
    assert fingerprint([one]) == fingerprint([one.copy()]) != fingerprint([other])


def test_the_fingerprint_of_tensors_is_that_of_earlier_versions():
    """Runs that an earlier version recorded go on."""
    assert fingerprint([(torch.ones(2), torch.zeros(3))]) == "2c21e36eb596d7fe"
    assert fingerprint([{"x": torch.ones(2), "y": [torch.zeros(3)]}]) == "2c21e36eb596d7fe"


def test_batches_of_objects_are_told_apart_by_runs_and_by_compare(tmp_path):
    def loss(model, batch):
        return model(batch.x).square().mean() * batch.scale

    def probe(scale, out=None):
        torch.manual_seed(0)
        batch = SimpleNamespace(x=torch.randn(6, 3, generator=torch.Generator().manual_seed(1)), scale=scale)
        return spectra.SpectrumProbe(torch.nn.Linear(3, 2), [batch], loss=loss, out=out, probes=1, steps=3)

    probe(1.0, tmp_path).measure(0)
    probe(1.0, tmp_path)
    with pytest.raises(spectra.InputError, match=r"batches: \w+ in the folder, \w+ asked for"):
        probe(2.0, tmp_path)
    densities = [each.density(each.measure(0)[0]) for each in (probe(1.0), probe(2.0))]
    with pytest.warns(UserWarning, match="different batches"):
        spectra.compare(*densities)


def test_bfloat16_has_a_fingerprint():
    one = fingerprint([torch.ones(3, dtype=torch.bfloat16)])
    assert one != fingerprint([torch.zeros(3, dtype=torch.bfloat16)])


def test_versions_and_device_are_named():
    assert versions()["spectra"] == __version__
    assert versions()["torch"] == torch.__version__
    assert device_name(torch.device("cpu")) == "cpu"
