"""Ray shells: the only place under `cluster` that imports ray. Each class forwards to a plain one."""
