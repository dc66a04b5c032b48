"""What the models are compared with: a dense in-context network, and floors without learning."""

from icseg.baselines.universeg import UniverSeg

__all__ = ["UniverSeg"]
