"""Data of two views of each image, for contrastive learning."""
