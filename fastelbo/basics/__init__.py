"""What every other room stands on: records, checks of what users pass, layouts, numerics, and what may surround a call."""
