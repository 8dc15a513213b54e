"""The plots of a comparison, and what all plots of reports share."""
