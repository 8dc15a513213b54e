"""``syncbn init``: a small project to begin with."""
