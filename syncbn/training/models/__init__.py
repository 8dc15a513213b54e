"""Networks, the LightningModule that classifies, and learning-rate schedules."""
