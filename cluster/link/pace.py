"""How often a stream is told something new: many streams at once are told less often, and more at a time. Policy.

Each message to a client costs the same in the gateway and in Serve's proxy, whatever it holds: unbounded, they take
the CPU from the ranks of the same machine, or fall behind the engine on their own.
"""

MAX_CHUNKS_PER_S = 500.0  # of one gateway, over all its streams, up to as many as the next bound lets be
MAX_INTERVAL_S = 0.1  # a reader sees text flow at ten pieces a second, however many others there are


def chunk_interval_s(num_streams: int) -> float:
    """The least time from one output of a stream to its next, when so many run. The first and the last do not wait."""
    return min(MAX_INTERVAL_S, num_streams / MAX_CHUNKS_PER_S)
