"""Networks, the LightningModule for classification, and learning-rate schedules."""
