"""The cost of a step and of the control plane against everything that grows; see `__main__`."""
