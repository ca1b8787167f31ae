"""Compensation: kept blocks change so that the model without its removed blocks is nearer to the dense one."""
