"""Who generates: one small protocol, and the engines that fulfil it."""
