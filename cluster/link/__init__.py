"""The way of outputs from attention replicas to gateways: one connection per pair, one message per step.

    AttentionReplica -> OutputHub ==(TCP: frames of link.proto)==> OutputLink -> one OutputStream per request

Plain asyncio, no Ray, no torch: the gateway imports it too.
"""
