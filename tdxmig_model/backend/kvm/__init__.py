"""KVM migration stream devices: what a host offers, and a backend that drives one."""
