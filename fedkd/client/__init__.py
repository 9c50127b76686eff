"""The client: a Flower ClientApp whose local training is absorb → learn → share."""
