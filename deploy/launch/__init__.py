"""Starts, watches and stops the whole service in the foreground: what `shoal serve` runs.

ray (own or existing) -> coordinator and expert actors -> Serve, its proxies, the application
-> a real token through every expert shard -> ready -> a signal -> drain -> everything stopped
"""
