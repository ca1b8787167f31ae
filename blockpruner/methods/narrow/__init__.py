"""Narrower MLPs: channels leave where the residual stream loses least."""
