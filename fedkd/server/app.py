"""The Flower ServerApp that ``flwr run .`` and deployments load: ``fedkd.server.app:app``."""

from fedkd.server.handlers import make_app

app = make_app()
