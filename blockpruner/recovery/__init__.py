"""Recovery: a pruned model in memory is trained, as LoRA or whole, on texts or towards the dense model."""
