"""fedkd simulates federated distillation: local students, a global teacher, ensembles distilled on proxy data."""

import os

# Flower and Ray read these at import; a choice that the user made stands.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

__version__ = "0.1.0"
