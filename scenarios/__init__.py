"""Scenarios that come with fedkd: one TOML file each, run with ``fedkd run NAME``."""
