"""Draw, exchange, global counts and transports between ranks."""
