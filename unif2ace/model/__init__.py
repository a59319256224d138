"""The transformer: attention, the two levels of grouped mixture of experts, checkpoints."""
