"""Fine-tuning of the editors: losses, data, adapters, a visible loop."""
