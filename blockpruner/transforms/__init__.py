"""The methods that change weights instead of removing blocks; each works in place and leaves a model that saves."""
