"""pfl-research: Apple's simulator, FederatedAveraging in its own multi-process mode over gloo.

Rank 0 is the side's process and starts the others. pfl reads its ranks when it is imported.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import Any

from common import WORKERS, Clock, Side, make_model

RANK, ADDRESSES = "PFL_WORKER_RANK", "PFL_WORKER_ADDRESSES"


def run(side: Side, clock: Clock) -> dict[str, Any]:
    others = []
    if RANK not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        os.environ |= {RANK: "0", ADDRESSES: ",".join([address] * WORKERS)}
        others = [
            subprocess.Popen(sys.orig_argv, env=os.environ | {RANK: str(rank)}, stdout=subprocess.DEVNULL)
            for rank in range(1, WORKERS)
        ]
    try:
        simulate(side, clock)
        return clock.result()
    finally:
        for other in others:
            other.wait(timeout=60)


def simulate(side: Side, clock: Clock) -> None:
    """Run all rounds; every rank calls this."""
    import torch
    import torch.nn.functional as F
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.aggregate.weighting import WeightByDatapoints
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam import NNTrainHyperParams
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel

    torch.set_num_threads(1)
    load = side.load

    class Idle(FederatedAveraging):
        """Clients return the weights unchanged."""

        def train_one_user(self, initial_model_state, model, user_dataset, central_context):
            return model.get_model_difference(initial_model_state), Metrics()

    class Timer(TrainingProcessCallback):
        def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
            clock.tick()
            return False, Metrics()

    module: Any = make_model(load)
    module.loss = lambda x, y: F.cross_entropy(module(x).logits, y)
    module.metrics = lambda x, y: {}
    model = PyTorchModel(
        module,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
    )
    sampler = get_user_sampler("minimize_reuse", range(load.clients))
    data = FederatedDataset(lambda client: Dataset(side.shards(client), user_id=str(client)), sampler)
    algorithm = FederatedAveraging() if load.steps else Idle()
    algorithm.run(
        NNAlgorithmParams(
            central_num_iterations=clock.total,
            evaluation_frequency=clock.total + 1,
            train_cohort_size=load.selected,
            val_cohort_size=None,
        ),
        SimulatedBackend(data, data, postprocessors=[WeightByDatapoints()]),
        model,
        NNTrainHyperParams(
            local_num_epochs=1,  # the steps of the workload: a client has just so many samples
            local_learning_rate=load.lr,
            local_batch_size=load.batch,
        ),
        callbacks=[Timer()],
        send_metrics_to_platform=False,
    )
