"""The server: a Flower ServerApp whose strategies are seven verbs."""
