"""Configurations: what they accept, and that every refusal is one line that names what is supported."""

import dataclasses
import math

import pytest

import qat
from qat.layers.config import AUTO_QUANTIZER, BITS, SUPPORTED_BITS, parse_bits
from spectra.backend.errors import InputError


@pytest.mark.parametrize(
    ("given", "expected"),
    [(1, 1), ("1", 1), (1.58, 1.58), ("1.58", 1.58), (2.0, 2), ("2.0", 2), (3, 3), (4, 4), ("8", 8)],
)
def test_bits_are_parsed_from_numbers_and_text(given, expected):
    bits = parse_bits(given)
    assert bits == expected
    assert type(bits) is type(expected)
    assert qat.QuantConfig(bits=given).bits == expected


@pytest.mark.parametrize("given", [7.3, 0, -2, 5, 16, "two", "", None, True, float("nan"), float("inf"), [2]])
def test_other_bits_are_refused(given):
    with pytest.raises(InputError) as caught:
        qat.QuantConfig(bits=given)
    assert str(caught.value) == f"bits must be one of 1, 1.58, 2, 3, 4, 8; got {given}"


@pytest.mark.parametrize(
    ("bits", "scheme"), [(1, "binary"), (1.58, "seq"), (2, "seq"), (3, "lsq"), (4, "lsq"), (8, "lsq")]
)
def test_auto_picks_the_scheme_by_width(bits, scheme):
    assert qat.QuantConfig(bits=bits).scheme == scheme
    assert qat.QuantConfig(bits=bits, quantizer=scheme).scheme == scheme


def test_auto_covers_every_width_with_a_scheme_that_supports_it():
    assert set(AUTO_QUANTIZER) == set(BITS)
    assert all(bits in SUPPORTED_BITS[scheme] for bits, scheme in AUTO_QUANTIZER.items())


def test_a_pair_that_does_not_exist_is_refused_with_the_way_out():
    for scheme, widths in SUPPORTED_BITS.items():
        for bits in set(BITS) - set(widths):
            with pytest.raises(InputError, match=f"quantizer '{scheme}' supports .* got {bits}: use quantizer='auto'"):
                qat.QuantConfig(bits=bits, quantizer=scheme)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"quantizer": "gptq"},
            "quantizer must be one of auto, rtn, lsq, seq, binary, bitnet, quest, parq; got 'gptq'",
        ),
        ({"quantizer": None}, "quantizer must be one of"),
        ({"group_size": 1}, "group_size must be a whole number of columns, 2 or more, .* got 1"),
        ({"group_size": True}, "group_size must be a whole number"),
        ({"group_size": 32.0}, "group_size must be a whole number"),
        ({"group_size": 32, "bits": 1.58, "quantizer": "bitnet"}, "'bitnet' has one scale for the whole tensor"),
        ({"initial_scale": "mean"}, "initial_scale must be one of max, mse; got 'mean'"),
        ({"initial_scale": "mse", "quantizer": "rtn"}, "quantizer 'rtn' computes its scale from the weights"),
        ({"activation_bits": 5}, r"activation_bits must be 16, 8, 4 \(16: full precision\); got 5"),
        ({"activation_bits": True}, "activation_bits must be 16, 8, 4"),
        ({"activation_bits": "8"}, "activation_bits must be 16, 8, 4"),
        ({"cache_bits": 2}, "cache_bits must be 16, 8, 4"),
        ({"activation_symmetric": 0}, "activation_symmetric must be True or False"),
        ({"skip": 3}, "skip must be a list of globs"),
        ({"skip": (3,)}, "skip must be a list of globs"),
        ({"quantize_head": 1}, "quantize_head must be True or False"),
        ({"quantize_embeddings": "no"}, "quantize_embeddings must be True or False"),
    ],
)
def test_other_fields_are_checked_when_it_is_made(options, message):
    with pytest.raises(InputError, match=message) as caught:
        qat.QuantConfig(**options)
    assert "\n" not in str(caught.value)


def test_skip_takes_one_glob_or_several_and_the_config_is_frozen():
    assert qat.QuantConfig(skip="lm_head").skip == ("lm_head",)
    assert qat.QuantConfig(skip=["a", "b"]).skip == ("a", "b")
    with pytest.raises(dataclasses.FrozenInstanceError):
        qat.QuantConfig().bits = 4


@pytest.mark.parametrize("every", [1, 50, 0.25, 0.999])
@pytest.mark.parametrize("alpha", [0, 0.4, 1])
@pytest.mark.parametrize("sigma", [0, 1e-3])
def test_winq_accepts(every, alpha, sigma):
    config = qat.WinQConfig(every=every, alpha=alpha, sigma=sigma)
    assert (config.every, config.alpha, config.sigma) == (every, alpha, sigma)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be"),
        ({"every": -1}, "every must be"),
        ({"every": 1.0}, "every must be"),
        ({"every": 2.5}, "every must be"),
        ({"every": True}, "every must be"),
        ({"every": "0.25"}, "every must be"),
        ({"every": float("nan")}, "every must be"),
        ({"alpha": -0.1}, "alpha must lie"),
        ({"alpha": 1.1}, "alpha must lie"),
        ({"alpha": None}, "alpha must lie"),
        ({"alpha": float("nan")}, "alpha must lie"),
        ({"sigma": -1e-3}, "sigma must be"),
        ({"sigma": float("inf")}, "sigma must be"),
        ({"noise_scales": 1}, "noise_scales must be"),
    ],
)
def test_winq_refuses(options, message):
    with pytest.raises(InputError, match=message) as caught:
        qat.WinQConfig(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "expected"), [("ternary", 1.58), ("binary", 1), (1.585, 1.58), (math.log2(3), 1.58), ("1.585", 1.58)]
)
def test_bits_have_the_names_and_digits_of_papers(given, expected):
    assert qat.QuantConfig(bits=given) == qat.QuantConfig(bits=expected)


@pytest.mark.parametrize("given", [1.5, 1.6, 1.59, "tern"])
def test_bits_near_those_of_three_levels_are_refused(given):
    with pytest.raises(InputError, match="bits must be one of"):
        qat.QuantConfig(bits=given)
