"""The gateway: wire formats, validation, and the life of a request in front of the engine. No Ray here."""
