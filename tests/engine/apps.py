"""ClientApps for the engine's tests, made inside functions so that they are pickled by value, and helpers."""

from flwr.app import ConfigRecord, RecordDict


def counting_app():
    """Adds the client's partition id and its number of calls to what it gets; fails as it is told."""
    import os
    import signal
    import time
    from pathlib import Path

    import numpy as np
    import torch
    from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.train()
    def train(message, context):
        partition = context.node_config["partition-id"]
        config = message.content.config_records.get("config", ConfigRecord())
        calls = context.state.metric_records.get("calls", MetricRecord({"n": 0}))
        context.state["calls"] = MetricRecord({"n": calls["n"] + 1})
        if config.get("raise") == partition:
            raise ValueError("no samples")
        if config.get("exit") == partition:
            raise SystemExit(3)
        if config.get("silent") == partition:
            return None
        if config.get("die") == partition:
            marker = Path(str(config["marker"]))
            if config["always"] or not marker.exists():
                marker.write_text("died")
                os.kill(os.getpid(), signal.SIGKILL)
        if config.get("sleep") == partition:
            time.sleep(config["seconds"])
        arrays = message.content.array_records.get("arrays", ArrayRecord([np.zeros(2, np.float32)]))
        summed = [a + np.float32(partition + calls["n"]) for a in arrays.to_numpy_ndarrays()]
        metrics = {
            "partition": partition,
            "num-partitions": context.node_config["num-partitions"],
            "threads": torch.get_num_threads(),
            "pid": os.getpid(),
            "calls": calls["n"] + 1,
            "num-examples": partition + 1,
            "lr": context.run_config.get("lr", 0.0),
        }
        return Message(RecordDict({"arrays": ArrayRecord(summed), "metrics": MetricRecord(metrics)}), reply_to=message)

    @app.query("forget")
    def forget(message, context):
        context.state.clear()
        return Message(RecordDict(), reply_to=message)

    @app.query("vandal")
    def vandal(message, context):
        """Change whatever can be reached."""
        message.content["arrays"]["0"].dtype = "broken"
        message.content["arrays"].clear()
        message.content["config"]["list"].append(1)
        return Message(message.content, reply_to=message)

    @app.query("env")
    def env(message, context):
        names = ("OMP_NUM_THREADS", "MALLOC_MMAP_THRESHOLD_", "FLWR_TELEMETRY_ENABLED", "PYTHONPATH")
        values = {name: os.environ.get(name, "") for name in names}
        return Message(RecordDict({"env": ConfigRecord(values)}), reply_to=message)

    return app


def learning_app():
    """Linear regression on data of its own, with torch: enough arithmetic for bits to differ."""
    import torch
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp

    app = ClientApp()

    def data(context):
        generator = torch.Generator().manual_seed(context.node_config["partition-id"])
        x = torch.randn(32, 8, generator=generator)
        return x, x.sum(1, keepdim=True) + torch.randn(32, 1, generator=generator)

    @app.train()
    def train(message, context):
        model = torch.nn.Linear(8, 1)
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        x, y = data(context)
        for _ in range(5):
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
        metrics = MetricRecord({"loss": loss.item(), "num-examples": 32})
        content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message, context):
        model = torch.nn.Linear(8, 1)
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        x, y = data(context)
        loss = torch.nn.functional.mse_loss(model(x), y).item()
        content = RecordDict({"metrics": MetricRecord({"eval_loss": loss, "num-examples": 32})})
        return Message(content, reply_to=message)

    return app


def ask(grid, partitions, kind="train", arrays=None, **config):
    """Make messages with one content."""
    records = RecordDict({"config": ConfigRecord(config)})
    if arrays is not None:
        records["arrays"] = arrays
    return [grid.create_message(records, kind, grid.nodes.node_id(p), "1") for p in partitions]


def facts(replies):
    """What must not depend on the engine."""
    seen = []
    for reply in replies:
        if reply.has_error():
            seen.append((reply.metadata.src_node_id, reply.error.code, reply.error.reason))
        else:
            values = [a.data for a in reply.content["arrays"].values()] if "arrays" in reply.content else []
            calls = reply.content["metrics"]["calls"] if "metrics" in reply.content else None
            seen.append((reply.metadata.src_node_id, calls, values))
    return seen


def config(**values):
    """Make a config record."""
    return ConfigRecord(values)


class SumOfArrays:
    """Fold: the float64 sum of the first arrays, and how it was merged; of replies the calls, or what went wrong."""

    def __call__(self, replies):
        """Sum a cohort."""
        import numpy as np

        from fedkd.arrays import view

        notes, total = [], 0.0
        for _, reply in replies:
            if reply.has_error():
                notes.append(reply.error.reason)
                continue
            total += view(reply.content["arrays"]["0"]).astype(np.float64)
            notes.append(reply.content["metrics"]["calls"])
        return notes, (total, str(replies[-1][0]))

    def merge(self, part, other):
        """Sum two parts."""
        return part[0] + other[0], f"({part[1]} {other[1]})"


sum_of_arrays = SumOfArrays()


class SumOfRoots(SumOfArrays):
    """A fold whose sums have other bits in another order: square roots fill all the digits of float64."""

    def __call__(self, replies):
        """Sum a cohort, and take the root."""
        notes, (total, name) = super().__call__(replies)
        return notes, (total**0.5, name)


sum_of_roots = SumOfRoots()


class FailsFor(SumOfArrays):
    """A fold that raises for the cohort of one client."""

    def __init__(self, partition):
        self.partition = partition

    def __call__(self, replies):
        """Sum a cohort, or raise."""
        if any(partition == self.partition for partition, _ in replies):
            raise RuntimeError("out of luck")
        return super().__call__(replies)


def late_app():
    """Make an app whose clients have a state only from when they are told to remember."""
    from flwr.app import Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.train()
    def train(message, context):
        if message.content["config"]["remember"]:
            calls = context.state["m"]["calls"] if "m" in context.state else 0
            context.state["m"] = MetricRecord({"calls": calls + 1})
        return Message(RecordDict(), reply_to=message)

    return app


def meeting_app():
    """Clients that wait until as many processes as they want have come, or fail."""
    import os
    import time
    from pathlib import Path

    from flwr.app import Message
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.train()
    def train(message, context):
        folder, wanted = Path(str(message.content["config"]["folder"])), message.content["config"]["wanted"]
        (folder / str(os.getpid())).touch()
        end = time.monotonic() + 60
        while len(list(folder.iterdir())) < wanted:
            if time.monotonic() > end:
                raise TimeoutError("nobody came")
            time.sleep(0.01)
        return Message(message.content, reply_to=message)

    return app


def first_number(reply, factor):
    """Compute something of a reply."""
    from fedkd.arrays import view

    return float(view(reply.content["arrays"]["0"])[0]) * factor


def note_and_add(table, k, folder):
    """Leave a mark, and return a number of a large table."""
    from pathlib import Path

    (Path(folder) / str(k)).touch()
    return float(table[k])


def divide(a, b):
    """Divide."""
    return a / b


def die_once(k, marker):
    """End the process, once."""
    import os
    from pathlib import Path

    if k == 3 and not Path(marker).exists():
        Path(marker).touch()
        os._exit(1)
    return k
