"""Settings: schema, validation, derived numbers, and comparison of two configurations."""
