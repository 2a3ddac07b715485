"""KVM's interface to TDX live migration, over the software TDX module."""

from tdxmig_model.backend.softkvm.device import SoftKvm

__all__ = ["SoftKvm"]
