"""Optimizers that binary networks want and torch lacks, and a way to use them beside torch's own."""

from abste.optim.bop import Bop
from abste.optim.combined import Combined
from abste.optim.muon import Muon, orthogonalize

__all__ = ["Bop", "Combined", "Muon", "orthogonalize"]
