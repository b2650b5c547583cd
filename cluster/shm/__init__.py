"""Messages between ranks of one host through shared memory; Linux only.

semaphore.py   a counter that another process can wait for
outbox.py      the memory in which one rank writes to all others, and their reading end
watch.py       notices that a peer's process is gone
mesh.py        all of it together for the ranks of one epoch: send, receive, gather
"""
