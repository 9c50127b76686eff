"""The Flower ClientApp that ``flwr run .`` and deployments load: ``fedkd.client.app:app``."""

from fedkd.client.handlers import make_app

app = make_app()
