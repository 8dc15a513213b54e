"""What is done to a network before it trains: initial weights, frozen parts, memory format, compilation."""
