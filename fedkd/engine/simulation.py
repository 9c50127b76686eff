"""Any Flower app on this engine, unchanged: what `flwr run` does, without a SuperLink."""

from __future__ import annotations

import importlib
import sys
import tomllib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.config import flatten_dict, parse_config_args
from flwr.serverapp import ServerApp

from fedkd.engine.grid import SERVER, SimulationGrid
from fedkd.engine.inline import InlineGrid
from fedkd.engine.nodes import Nodes
from fedkd.engine.ray_grid import RayGrid
from fedkd.engine.worker import AppFactory
from fedkd.errors import ScenarioError

Value = bool | int | float | str


def simulate(
    server_app: ServerApp,
    client_app: ClientApp | AppFactory,
    num_supernodes: int,
    *,
    run_config: Mapping[str, Value] | None = None,
    engine: Literal["ray", "inline"] = "ray",
    workers: int = 0,
    gpus_per_worker: float = 0.0,
    address: str = "",
) -> Context:
    """Run a Flower app: the ServerApp here, the ClientApp of every node on Ray workers.

    Parameters
    ----------
    server_app : ServerApp
        Gets our grid; everything that it does with Flower's message API works.
    client_app : ClientApp or callable
        Answers the messages of all nodes. A callable without arguments makes it in each worker, for an app that cannot
        be pickled.
    num_supernodes : int
        Number of nodes. They have the partition ids 0, 1, … in ``context.node_config["partition-id"]``.
    run_config : mapping, optional
        What both apps find in ``context.run_config``.
    engine : "ray" or "inline"
        Ray workers (default), or everything in this process.
    workers, gpus_per_worker, address
        As in `RayGrid`; by default one worker for each CPU of this machine, or of the cluster that is joined.

    Returns
    -------
    Context
        The ServerApp's context. Its ``state`` holds what the app left there.

    Raises
    ------
    fedkd.errors.RunError
        Ray cannot hold so many workers, or the ClientApp cannot be loaded.
    ValueError
        There are no nodes.

    Examples
    --------
    >>> from flwr.app import Message, MetricRecord
    >>> client, server = ClientApp(), ServerApp()
    >>> @client.query()
    ... def square(message, context):
    ...     number = context.node_config["partition-id"]
    ...     return Message(RecordDict({"answer": MetricRecord({"square": number**2})}), reply_to=message)
    >>> @server.main()
    ... def main(grid, context):
    ...     asked = [Message(RecordDict(), node, "query") for node in grid.get_node_ids()]
    ...     answers = [reply.content["answer"]["square"] for reply in grid.send_and_receive(asked)]
    ...     context.state["total"] = MetricRecord({"squares": sum(answers)})
    >>> simulate(server, client, num_supernodes=4, engine="inline").state["total"]["squares"]
    14
    """
    if num_supernodes < 1:
        raise ValueError(f"num_supernodes must be at least 1, is {num_supernodes}")
    settings = dict(run_config or {})
    nodes = Nodes.alike(num_supernodes)
    make = partial(_itself, client_app) if isinstance(client_app, ClientApp) else client_app
    grid: SimulationGrid
    if engine == "inline":
        grid = InlineGrid(make, nodes, settings)
    else:
        grid = RayGrid(make, nodes, settings, workers=workers, gpus_per_worker=gpus_per_worker, address=address)
    context = Context(
        run_id=grid.run.run_id, node_id=SERVER, node_config={}, state=RecordDict(), run_config=dict(settings)
    )
    with grid:
        server_app(grid, context)
    return context


def _itself(app: ClientApp) -> ClientApp:
    return app


class FlowerApp(NamedTuple):
    """What ``pyproject.toml`` says about a Flower app: arguments for `simulate`."""

    server_app: ServerApp
    client_app: AppFactory
    run_config: dict[str, Value]


def load_app(folder: Path, overrides: str = "") -> FlowerApp:
    """Load the Flower app in a folder, as `flwr run` finds it.

    Parameters
    ----------
    folder : Path
        Holds ``pyproject.toml`` with ``[tool.flwr.app.components]`` and the modules that are named there. It becomes
        the last folder of the import path.
    overrides : str
        ``key=value`` settings, separated by spaces, that replace those of ``[tool.flwr.app.config]``.

    Raises
    ------
    ScenarioError
        The folder holds no Flower app, a part of it cannot be loaded, or it has no such setting.
    """
    file = folder / "pyproject.toml"
    try:
        declared = tomllib.loads(file.read_text(encoding="utf-8"))["tool"]["flwr"]["app"]
        names = [declared["components"][part] for part in ("serverapp", "clientapp")]
    except (OSError, KeyError, TypeError, tomllib.TOMLDecodeError) as error:
        problem = f"no Flower app is declared there ({type(error).__name__}: {error})"
        hint = "name a folder whose pyproject.toml has [tool.flwr.app.components] with serverapp and clientapp"
        raise ScenarioError(problem, file=str(file), hint=hint) from error
    config: dict[str, Any] = dict(flatten_dict(declared.get("config", {})))
    for key, value in parse_config_args([overrides]).items():
        if key not in config:
            problem = f"the app has no setting {key!r}"
            raise ScenarioError(problem, key="--run-config", hint=f"it has: {', '.join(config) or 'none'}")
        config[key] = value
    where = str(folder.absolute())
    server_app, client_app = (_load(name, where, kind) for name, kind in zip(names, (ServerApp, ClientApp)))
    assert isinstance(server_app, ServerApp) and client_app is not None
    return FlowerApp(server_app, partial(_load, names[1], where, ClientApp), config)


def _load(name: str, folder: str, kind: type) -> Any:
    """Import ``module:attribute``, an app, in any process."""
    if folder not in sys.path:
        sys.path.append(folder)  # last, so that it hides no installed package
    module, _, attributes = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for attribute in attributes.split("."):
            found = getattr(found, attribute)
    except Exception as error:  # whatever the app's modules raise when they are imported
        problem = f"{name} cannot be loaded: {type(error).__name__}: {error}"
        raise ScenarioError(problem, file=folder, hint="it needs the app's own dependencies") from error
    if not isinstance(found, kind):
        raise ScenarioError(f"{name} is no {kind.__name__} but {type(found).__name__}", file=folder)
    return found
