"""``syncbn predict``: the classes of image files, over the ranks of one machine, as CSV."""
