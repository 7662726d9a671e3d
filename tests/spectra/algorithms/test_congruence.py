"""A change of variables: the inertia stays whatever it is, the kurtosis falls, and zeros are left out."""

import numpy as np
import pytest
import torch
from oracles import generator
from tiny_models import causal_lm, conv_net, images, token_batches

import qat
import spectra
from spectra.algorithms.balancing import positive_definite
from spectra.algorithms.congruence import find_congruence, shapes_of
from spectra.algorithms.kronecker import KroneckerTransform, blocks_of
from spectra.operators.derived import MeanOperator

SHAPES = ((5, 7), (7,), (4, 3, 3, 3), (2, 9, 8), (), (6, 1), (3, 2, 4), (0, 4), (2, 7, 9))


class Shaped(spectra.DenseOperator):
    """A matrix whose vectors are the parameters of these shapes, laid end to end."""

    def __init__(self, matrix, shapes):
        super().__init__(matrix)
        self.space = type("Space", (), {"shapes": shapes})


def kronecker_spectrum(*, rows=40, columns=30, seed=0):
    """(A kron B) S (A kron B) for ill-conditioned A and B and random signs S: two thirds are positive."""
    g = generator(seed)
    sides = []
    for side in (rows, columns):
        q = torch.linalg.qr(torch.randn(side, side, generator=g, dtype=torch.float64))[0]
        sides.append((q * torch.logspace(-2, 0, side, dtype=torch.float64)) @ q.T)
    root = torch.kron(*sides)
    signs = torch.where(torch.rand(rows * columns, generator=g, dtype=torch.float64) < 1 / 3, -1.0, 1.0)
    q = torch.linalg.qr(torch.randn(rows * columns, rows * columns, generator=g, dtype=torch.float64))[0]
    matrix = root @ (q * signs) @ q.T @ root
    return (matrix + matrix.T) / 2, int((signs < 0).sum())


def random_transform(seed=0):
    g, blocks = generator(seed), blocks_of(SHAPES)
    identity = KroneckerTransform.identity(blocks, torch.device("cpu"))
    left, right = (
        tuple(f + 0.3 * torch.randn(f.shape, generator=g, dtype=torch.float64) for f in factors)
        for factors in (identity.left, identity.right)
    )
    return KroneckerTransform(blocks, left, right)


def dense(transform):
    return transform.apply(torch.eye(transform.blocks[-1].stop, dtype=torch.float64)).T


def test_every_shape_is_seen_as_matrices_that_cover_the_vector_once():
    blocks = blocks_of(SHAPES)
    sizes = [(block.count, block.rows, block.columns) for block in blocks]
    assert sizes == [(1, 5, 7), (1, 7, 1), (1, 4, 27), (2, 9, 8), (1, 1, 1), (1, 6, 1), (1, 3, 8), (1, 2, 63)]
    assert [block.start for block in blocks] == [0, *np.cumsum([c * r * k for c, r, k in sizes])[:-1]]


def test_a_kronecker_transform_is_a_kronecker_product_a_matrix():
    transform = random_transform()
    matrix = dense(transform)
    first = torch.kron(transform.left[0][0], transform.right[0][0])
    assert torch.allclose(matrix[:35, :35], first, atol=1e-12)
    assert torch.count_nonzero(matrix[:35, 35:]) == 0
    back = transform.apply_transposed(torch.eye(len(matrix), dtype=torch.float64)).T
    assert torch.allclose(back, matrix.T, atol=1e-12)
    symmetric = dense(positive_definite(transform))
    assert torch.allclose(symmetric[:35, :35] @ symmetric[:35, :35].T, matrix[:35, :35] @ matrix[:35, :35].T, atol=1e-9)


@pytest.mark.parametrize("shift", [0.0, 0.02])
def test_kronecker_structure_is_taken_out_and_the_inertia_stays(shift):
    matrix, negative = kronecker_spectrum()
    op = Shaped(matrix, ((40, 30),))
    found = find_congruence(op, shift=shift)
    assert found.products == op.products == 26 + 3  # three for the linearity gap
    below = int((torch.linalg.eigvalsh(matrix) < shift).sum())
    assert shift or below == negative
    assert int((torch.linalg.eigvalsh(found.operator(op).to_dense()) < 0).sum()) == below
    if not shift:
        assert found.kurtosis < found.kurtosis_before / 5
    warm = find_congruence(op, shift=shift, start=found, seed=1)
    assert warm.products == 20 + 3
    assert warm.kurtosis < 1.5 * found.kurtosis


def test_zero_coordinates_are_masked_and_the_rest_stays_nonsingular():
    matrix, _ = kronecker_spectrum(rows=20, columns=16)
    kept = torch.rand(320, generator=generator(3)) < 0.55
    matrix = matrix * kept * kept[:, None]
    op = Shaped(matrix, ((20, 16),))
    found = find_congruence(op)
    assert torch.equal(found.mask, kept)
    inside = torch.linalg.eigvalsh(found.operator(op).to_dense()[kept][:, kept])
    want = torch.linalg.eigvalsh(matrix[kept][:, kept])
    assert int((inside < 0).sum()) == int((want < 0).sum()) > 0
    assert int((inside > 0).sum()) == int((want > 0).sum())


def test_there_is_no_congruence_without_matrices_and_for_a_zero_operator():
    diagonal = spectra.DiagonalOperator(np.linspace(-1, 1, 50))
    assert find_congruence(diagonal) is None
    assert diagonal.products == 0
    assert find_congruence(Shaped(np.eye(12), ((12,),))) is None
    assert find_congruence(Shaped(np.zeros((12, 12)), ((3, 4),))) is None
    assert find_congruence(Shaped(np.eye(12), ((3, 5),))) is None  # shapes of another size say nothing


def test_shapes_come_from_the_model_and_from_the_members_of_a_mean():
    model = conv_net()
    op = spectra.HessianOperator(model, images((6,)), loss=torch.nn.functional.cross_entropy)
    assert shapes_of(op) == tuple(tuple(p.shape) for p in model.parameters())
    assert shapes_of(MeanOperator([op, op])) == shapes_of(op)
    found = find_congruence(op)
    values = torch.linalg.eigvalsh(op.to_dense())
    changed = found.operator(op).to_dense()
    kept = torch.ones(len(values), dtype=torch.bool) if found.mask is None else found.mask
    size = values.abs().max()
    assert int((torch.linalg.eigvalsh(changed[kept][:, kept]) < -1e-9).sum()) >= int((values < -1e-6 * size).sum())


def test_a_quantized_language_model_keeps_its_inertia():
    model = causal_lm("llama", seed=2)
    qat.quantize_model(model, qat.QuantConfig(bits=1))
    op = qat.hessian_operator(model, token_batches(((8, 8, 8, 8), (8, 8))), "ste")
    found = find_congruence(op)
    assert found.mask is not None
    assert 0.2 < found.mask.double().mean() < 0.9
    kept = found.mask
    values = torch.linalg.eigvalsh(op.to_dense()[kept][:, kept])
    changed = torch.linalg.eigvalsh(found.operator(op).to_dense()[kept][:, kept])
    sure = values.abs() > 1e-9 * values.abs().max()
    assert sure.double().mean() > 0.5
    unsure = int((~sure).sum())
    assert abs(int((changed < 0).sum()) - int((values < 0).sum())) <= unsure
    assert found.kurtosis < found.kurtosis_before


@pytest.mark.parametrize(("factor", "found"), [(1.0, True), (1.5, False)])
def test_products_with_errors_beside_rounding_are_left_alone(factor, found):
    class Inexact(Shaped):
        def rounding(self):
            return factor * spectra.LinearOperator.rounding(self)

    matrix, _ = kronecker_spectrum(rows=20, columns=16)
    op = Inexact(matrix, ((20, 16),))
    assert (find_congruence(op) is not None) is found
    assert (find_congruence(MeanOperator([Shaped(matrix, ((20, 16),)), op])) is not None) is found


def test_products_in_a_lower_precision_are_left_alone():
    class Lower(Shaped):
        def precision_error(self):
            return 1e-6

    assert find_congruence(Lower(kronecker_spectrum(rows=20, columns=16)[0], ((20, 16),))) is None
