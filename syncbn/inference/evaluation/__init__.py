"""``syncbn evaluate``: tests several checkpoints on several data sets, and shows one table."""
