"""Contrastive learning: the modules, their losses and their network."""
