"""The policy's weights on their way to the servers: read from the trainer, carried by file or by GPU."""
