"""Implements the setting ``norm=``: changes of the model, plugins and callbacks for the Trainer."""
