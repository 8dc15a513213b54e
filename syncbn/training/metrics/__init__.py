"""What is measured beside loss and accuracy: metrics of torchmetrics, every test sample, memory, and FLOP/s."""
