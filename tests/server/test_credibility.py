"""Confusion and credibility against scikit-learn and numbers by hand; the labelled samples behind them."""

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix

from fedkd.server.credibility import class_credibility, confusion
from fedkd.students import predict


def test_confusion_is_scikit_learns_normalised_over_the_true_classes():
    draw = np.random.default_rng(0)
    logits, labels = draw.normal(size=(200, 5)), draw.integers(5, size=200)

    found = confusion(torch.tensor(logits), torch.tensor(labels))

    expected = confusion_matrix(labels, logits.argmax(1), normalize="true")
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-15)


def test_a_class_without_samples_has_an_empty_row():
    found = confusion(torch.eye(3)[[0, 0, 2]], torch.tensor([0, 2, 2]))  # guesses 0, 0, 2
    assert found.tolist() == [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.5, 0.0, 0.5]]


def test_credibility_by_hand():
    matrix = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.6, 0.1], [0.0, 0.0, 1.0]], dtype=torch.float64)
    # Others taken for class 0: 0.3 and 0.0; for class 1: 0.2 and 0.0; for class 2: 0.1 and 0.1.
    assert class_credibility(matrix).tolist() == pytest.approx([0.7 * 0.7, 0.6 * 0.8, 1.0 * 0.9])


def test_a_model_that_knows_one_class_alone_is_credible_on_none():
    matrix = confusion(torch.tensor([[1.0, 0.0]]).repeat(6, 1), torch.tensor([0, 0, 0, 1, 1, 1]))
    assert class_credibility(matrix).tolist() == [0.0, 0.0]


def test_a_perfect_model_is_credible_where_there_are_samples():
    matrix = confusion(torch.eye(4)[[0, 1, 3]], torch.tensor([0, 1, 3]))
    assert class_credibility(matrix).tolist() == [1.0, 1.0, 0.0, 1.0]


def test_labelled_samples_are_the_servers_own_and_their_logits_the_models(small, federate):
    strategy, _ = federate(small(proxy__server_labels=50), rounds=1)
    server, federation = strategy.server, strategy.server.federation

    logits, labels = server.label_logits("mlp", strategy.students["mlp"])

    ids = federation.server_labels
    assert labels.tolist() == np.asarray(federation.train.labels)[ids].tolist()
    assert not set(ids.tolist()) & {int(k) for shard in federation.shards for k in shard.train}
    model = server.model("mlp", strategy.students["mlp"])
    assert torch.equal(logits, predict(model, federation.train, ids))


def test_outputs_are_computed_on_the_grid_that_there_is_now(small, federate):
    strategy, _ = federate(small(), rounds=1)
    server, old = strategy.server, strategy.server.compute
    assert server.compute is old

    server.grid = type("Replaced", (), {})()

    assert server.compute is not old and server.compute.grid is server.grid
