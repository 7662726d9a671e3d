import torch

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


def test_bfloat16_has_a_fingerprint():
    one = fingerprint([torch.ones(3, dtype=torch.bfloat16)])
    assert one != fingerprint([torch.zeros(3, dtype=torch.bfloat16)])


def test_versions_and_device_are_named():
    assert versions()["spectra"] == __version__
    assert versions()["torch"] == torch.__version__
    assert device_name(torch.device("cpu")) == "cpu"
