"""What one does with a trained network: load it (:func:`syncbn.load`) and export it. Imports no Lightning."""
