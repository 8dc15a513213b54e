"""From one command to rank processes, and to the line that reports the exit status; sweeps and pools."""
