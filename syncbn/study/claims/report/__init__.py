"""The page on claims: its matrix, sentences, tables and plots; and writing it again from its tables."""
