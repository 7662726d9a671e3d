"""Other people's programs: the Hugging Face Trainer, models and texts. Each module imports its framework."""
