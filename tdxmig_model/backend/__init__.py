"""Who executes commands: the software TDX module, and KVM migration stream devices."""
