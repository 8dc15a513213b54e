"""What ``norm=`` does to a model and to the Trainer."""
