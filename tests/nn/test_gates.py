"""The filter gate against Eq. 4."""

from __future__ import annotations

import numpy as np
import torch

from dream_pyg.nn.gates import FilterGate
from tests.oracles import dream
from tests.oracles.gradients import numerical_gradient


def random_gate(num_features: int, embedding_dim: int) -> FilterGate:
    torch.manual_seed(0)
    gate = FilterGate(num_features, embedding_dim).double()
    with torch.no_grad():
        gate.bias.normal_()
    return gate


def test_gate_is_equation_4():
    gate = random_gate(5, 3)
    features, embedding = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    out = gate(gate.project(features), embedding)
    expected = dream.gate(features, embedding, gate.weight.detach(), gate.bias.detach())
    np.testing.assert_allclose(out.detach(), expected, rtol=1e-13, atol=1e-15)


def test_gradient_of_every_parameter_is_that_of_equation_4():
    gate = random_gate(4, 3)
    features, embedding = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    upstream = torch.randn(5, 3, dtype=torch.float64)
    (gate(gate.project(features), embedding) * upstream).sum().backward()

    def objective(W, b):
        return float((dream.gate(features, embedding, W, b) * upstream.numpy()).sum())

    W, b = gate.weight.detach().numpy(), gate.bias.detach().numpy()
    np.testing.assert_allclose(gate.weight.grad, numerical_gradient(lambda W: objective(W, b), W), atol=1e-8)
    np.testing.assert_allclose(gate.bias.grad, numerical_gradient(lambda b: objective(W, b), b), atol=1e-8)


def test_gate_of_a_row_without_features_is_the_sigmoid_of_the_bias():
    gate = random_gate(4, 3)
    embedding = torch.randn(2, 3, dtype=torch.float64)
    out = gate(gate.project(torch.zeros(2, 4)), embedding)
    torch.testing.assert_close(out, embedding / (1 + torch.exp(-gate.bias)), rtol=1e-13, atol=0)


def test_half_precision_features_are_projected_in_the_precision_of_the_weights():
    gate = random_gate(4, 3)
    features = torch.randn(5, 4).half()
    assert torch.equal(gate.project(features), features.double() @ gate.weight)
