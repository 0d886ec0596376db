"""What estimators do while a network trains, and how good their gradients are."""

from abste.diagnostics.monitor import Diagnostics, Record, write_scalars
from abste.diagnostics.probing import ProbeResult, probe

__all__ = ["Diagnostics", "ProbeResult", "Record", "probe", "write_scalars"]
